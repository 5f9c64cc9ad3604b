"""The tasks: what each of them sets, and the embedded models behind them as any user of diffusers sees them."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from diffusers import DiffusionPipeline, LDMPipeline, StableDiffusionPipeline
from hydra.errors import ConfigCompositionException
from support.process import train

from conf.schema import ROOT, build
from experiments.engine.inputs import build_data, build_teacher

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.mark.parametrize(
    ("task", "teacher", "data", "measures", "guidance"),
    [
        ("uig", "ddpm_cifar10", "cifar10_sample", ["frechet_resnet20"], 1.0),
        ("t2i", "cifar10_t2i", "cifar10_captions", ["frechet_resnet20", "class_accuracy"], 3.0),
        ("uag", "digits_ldm", "digits_sample", ["frechet_digits", "precision_digits", "recall_digits"], 1.0),
    ],
)
def test_a_task_sets_teacher_data_and_evaluation(configure, task, teacher, data, measures, guidance):
    cfg = configure(f"task={task}")
    assert (cfg.task.name, cfg.teacher.name, cfg.data.name) == (task, teacher, data)
    assert list(cfg.evaluation.metrics) == measures and cfg.sampler.guidance == guidance
    assert build_data(cfg).image_shape() == build_teacher(cfg).image_shape()


def test_explicit_overrides_win_over_a_task(configure):
    cfg = configure("task=t2i", "teacher=sd15", "data=shards", "data.path=/shards", "evaluation=none", "sampler=ddim")
    assert (cfg.teacher.name, cfg.data.name, cfg.evaluation.name) == ("sd15", "shards", "none")
    assert cfg.sampler.name == "ddim"
    assert configure("experiment=bk_sdm_base").task.name == "t2i"
    with pytest.raises(ConfigCompositionException, match="task/t2x"):
        configure("task=t2x")


def test_the_embedded_text_model_names_its_captions_for_an_unknown_one(configure):
    teacher = build_teacher(configure("task=t2i"))
    captions = [f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}" for name in NAMES]
    states = teacher.pipeline_parts.encode_text(captions, torch.device("cpu"))["encoder_hidden_states"]
    empty = teacher.pipeline_parts.encode_empty_text(1, torch.device("cpu"))["encoder_hidden_states"]
    assert states.shape == (10, 16, 384) and empty.shape == (1, 16, 384)
    assert len({tensor.numpy().tobytes() for tensor in (*states, *empty)}) == 11
    with pytest.raises(ValueError, match=r"no stored text state for the caption 'a photo of a moth'.*airplane"):
        teacher.pipeline_parts.encode_text(["a photo of a moth"], torch.device("cpu"))


def test_the_embedded_text_model_is_a_stock_pipeline(configure):
    teacher = build_teacher(configure("task=t2i"))
    stock = DiffusionPipeline.from_pretrained(ROOT / "assets" / "cifar10_t2i", text_encoder=None, tokenizer=None)
    assert type(stock) is StableDiffusionPipeline
    stock.set_progress_bar_config(disable=True)
    texts = teacher.pipeline_parts.encode_text(["a photo of a ship"], torch.device("cpu"))["encoder_hidden_states"]
    empty = teacher.pipeline_parts.encode_empty_text(1, torch.device("cpu"))["encoder_hidden_states"]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32, "width": 32, "output_type": "np"}
    found = stock(prompt_embeds=texts, negative_prompt_embeds=empty, latents=latents, **options).images
    assert found.shape == (1, 32, 32, 3) and found.std() > 0.05


def test_the_embedded_audio_model_is_a_stock_pipeline(configure):
    stock = LDMPipeline.from_pretrained(ROOT / "assets" / "digits_ldm")
    assert stock.unet.config.sample_size == 12 and stock.vqvae.config.in_channels == 1
    cfg = configure("task=uag", "sampler.steps=4")
    teacher, mel = build_teacher(cfg), build_data(cfg).mel
    with torch.no_grad():
        latents = teacher.generate({"seed": torch.arange(2)}, build(cfg.sampler.scheduler), 4)
        pictures = teacher.decode(latents).numpy()
    waves = mel.wave(pictures)
    assert pictures.shape == (2, 48, 48, 1) and waves.shape == (2, mel.samples)
    assert np.abs(waves).max() <= 1 and np.abs(waves).max(1).min() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("task", "measure"), [("t2i", "frechet_resnet20"), ("uag", "frechet_digits")])
def test_a_task_runs_from_end_to_end_at_its_real_size(task, measure, tmp_path: Path):
    train(f"task={task}", f"paths.runs={tmp_path}/runs", "trainer=cpu", "logger.wandb=false")
    (finished,) = (tmp_path / "runs").rglob("finished.json")
    run = finished.parent
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0.5 <= metrics["plan/achieved_ratio"] <= 0.52
    assert metrics[f"teacher/{measure}"] < metrics[f"distilled/{measure}"] < metrics[f"pruned/{measure}"]
    assert metrics["distilled/output_loss"] < metrics["pruned/output_loss"]
    assert json.loads((run / "measured.json").read_text())["export_max_difference"] < 1e-3
    sounds = sorted((run / "sounds").rglob("*.wav"))
    if task == "uag":
        assert len(sounds) == 24  # eight of each network
        wave, rate = soundfile.read(sounds[0])
        assert rate == 8000 and len(wave) == 128 * 47 and np.abs(wave).max() > 0.01
    else:
        assert not sounds and metrics["distilled/class_accuracy"] > metrics["pruned/class_accuracy"]
