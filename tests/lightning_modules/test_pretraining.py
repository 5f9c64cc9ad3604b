"""Training from nothing, of each kind: what is saved is a stock pipeline that a job takes as its teacher."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, LDMPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from support.pipelines import TOKENS, tiny_pipeline
from support.results import differences, the_run, trained_state

from datamodules.readers.base import MissingData
from datamodules.seeding import torch_rng
from experiments.engine.inputs import build_data
from experiments.engine.pipeline import run_pipeline
from lightning_modules.backbones.diffusion.load import load_teacher
from lightning_modules.backbones.diffusion.new import build_new_backbone
from lightning_modules.modules.denoiser import Denoiser, new_denoiser
from lightning_modules.modules.training_inputs import drop_captions

SIZE = 4
"""of the latents of the tiny data, 8x8 pictures"""
NAMES = ["cat", "dog", "owl"]
CAPTIONS = ["a cat", "a dog", "an owl"]
UNET = {
    "sample_size": SIZE,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "digits_ldm": UNET,
    "cifar10_t2i": UNET | {"cross_attention_dim": 8},
    "cifar10_dit": {
        "sample_size": SIZE,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "num_embeds_ada_norm": 3,
    },
}
"""{recipe: what is smaller in it}"""
VAE = {
    "sample_size": 8,
    "block_out_channels": [4, 8],
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
STOCK = {"digits_ldm": LDMPipeline, "cifar10_t2i": StableDiffusionPipeline, "cifar10_dit": DiTPipeline}
SCHEDULE = DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders of a tiny VAE and of a tiny text encoder with its tokenizer."""
    pipeline, text = tiny_pipeline("sd", tmp_path_factory.mktemp("parts")), tmp_path_factory.mktemp("text")
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(pipeline / part, text, dirs_exist_ok=True)
    return {"vae": str(pipeline / "vae"), "text_encoder": str(text)}


def given(values: dict[str, Any], prefix: str) -> list[str]:
    return [f"++{prefix}.{key}={str(value).replace(' ', '')}" for key, value in values.items()]


@pytest.fixture
def job(parts: dict[str, str], tmp_path: Path) -> Callable[[str], list[str]]:
    """job(recipe) -> the recipe's arguments on tiny data, for a tiny network."""

    def make(recipe: str) -> list[str]:
        found = [f"experiment=pretrain_{recipe}", "debug=tiny", "data=tiny", "data.batch_size=4", "trainer=cpu"]
        found += [f"paths.runs={tmp_path}/runs", "evaluation.loss_samples=16", "evaluation.batch_size=8"]
        if recipe == "cifar10_vae":
            return [*found, *given(VAE, "pretrain.vae")]
        found += [f"pretrain.vae={parts['vae']}", *given(NETWORKS[recipe], "pretrain.network")]
        if recipe == "cifar10_t2i":
            found += [f"pretrain.text_encoder={parts['text_encoder']}", f"pretrain.text_tokens={TOKENS}"]
            found += [f"pretrain.captions=[{','.join(CAPTIONS)}]"]
            found += [f"+data.{split}.names=[{','.join(NAMES)}]" for split in ("train", "holdout")]
            found += [f"+data.{split}.caption='a {{}}'" for split in ("train", "holdout")]
        return found

    return make


FINISHED: dict[str, Path] = {}
"""Runs by recipe: made once for all tests."""


@pytest.fixture
def trained(job, configure, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """trained(recipe) -> the folder of a finished run of it, as `job` asks for it."""

    def make(recipe: str) -> Path:
        if recipe not in FINISHED:
            run_pipeline(configure(*job(recipe)))
            FINISHED[recipe] = tmp_path_factory.mktemp("finished") / "runs"
            shutil.move(tmp_path / "runs", FINISHED[recipe])
        shutil.copytree(FINISHED[recipe], tmp_path / "runs")
        return the_run(tmp_path / "runs")

    return make


# Autoencoders


def test_scaled_latents_of_a_new_autoencoder_have_unit_variance(job, trained, configure):
    run = trained("cifar10_vae")
    vae = AutoencoderKL.from_pretrained(run / "weights", torch_dtype=torch.float32)
    metrics = json.loads((run / "metrics.json").read_text())
    assert vae.config.scaling_factor == 1 / metrics["latent_std"] and metrics["test_images"] == 16
    images = torch.cat([b["image"] for b in build_data(configure(*job("cifar10_vae"))).subset("holdout", 16, 0, 16)])
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        decoded = vae.decode(latents).sample.clamp(-1, 1)
    assert float((latents * vae.config.scaling_factor).std(correction=0)) == pytest.approx(
        1, rel=5e-3
    )  # half precision
    psnr = 10 * np.log10(4 / float((decoded - images).square().mean()))
    assert psnr == pytest.approx(metrics["test_psnr_db"], abs=0.02)


# Diffusion models


@pytest.mark.parametrize("recipe", NETWORKS)
def test_a_new_model_generates_alike_as_stock_pipeline_and_as_teacher(trained, recipe):
    run = trained(recipe)
    metrics = json.loads((run / "metrics.json").read_text())
    assert np.isfinite(metrics["test_task_loss"]) and metrics["test_images"] == 16
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    pipeline = STOCK[recipe].from_pretrained(run / "weights", **(absent if recipe == "cifar10_t2i" else {}))
    teacher = load_teacher(str(run / "weights"))
    pipeline.set_progress_bar_config(disable=True)
    assert not teacher.noise_scheduler.config.clip_sample  # samples are latents
    assert teacher.image_shape() == (3, 8, 8)

    batch = {"seed": torch.tensor([3, 4]), "caption": CAPTIONS[:2], "label": torch.tensor([0, 2])}
    sampler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=False)
    pipeline.scheduler = sampler
    made = teacher.decode(teacher.generate(batch, lambda config: DDIMScheduler.from_config(sampler.config), 3))
    options: dict[str, Any] = {"generator": [torch_rng("sample", seed) for seed in (3, 4)], "num_inference_steps": 3}
    if recipe == "digits_ldm":
        options["batch_size"] = 2
    elif recipe == "cifar10_dit":
        options |= {"class_labels": [0, 2], "guidance_scale": 1.0}
    else:
        states = teacher.pipeline_parts.encode_text(CAPTIONS[:2], torch.device("cpu"))["encoder_hidden_states"]
        options |= {"prompt_embeds": states, "guidance_scale": 1.0, "height": 8, "width": 8}
    stock = np.asarray(pipeline(**options, output_type="np").images)
    np.testing.assert_allclose(made.numpy() / 255, stock, atol=0.51 / 255)


@pytest.mark.parametrize("recipe", ["cifar10_vae", "cifar10_t2i"])
def test_training_from_nothing_resumes_in_the_same_bits(job, trained, configure, capsys, recipe):
    run = trained(recipe)
    last = run / "checkpoints" / "train" / "step=0000004.ckpt"
    whole = {file.name: file.read_bytes() for file in (run / "weights").rglob("*.safetensors")}
    state, metrics = trained_state(last), (run / "metrics.json").read_bytes()
    for file in (last, run / "metrics.json", run / "finished.json"):
        file.unlink()
    shutil.rmtree(run / "weights")
    run_pipeline(configure(*job(recipe)))
    assert "resuming from step 2 of 4" in capsys.readouterr().out
    assert whole == {file.name: file.read_bytes() for file in (run / "weights").rglob("*.safetensors")}
    assert differences(trained_state(last), state) == [] and (run / "metrics.json").read_bytes() == metrics


def test_a_finished_run_is_not_trained_again(job, trained, configure, capsys, monkeypatch):
    run = trained("digits_ldm")
    monkeypatch.setattr("experiments.engine.stages.train.train", None)
    run_pipeline(configure(*job("digits_ldm")))
    assert f"finished already: {run}" in capsys.readouterr().out


# Text


def test_stored_captions_stand_in_for_the_text_encoder(trained, parts):
    weights = trained("cifar10_t2i") / "weights"
    assert not (weights / "text_encoder").exists() and not (weights / "tokenizer").exists()
    network = json.loads((weights / "unet" / "config.json").read_text())
    encoder = build_new_backbone(network, SCHEDULE, **parts, text_tokens=TOKENS).pipeline_parts
    teacher, cpu = load_teacher(str(weights)), torch.device("cpu")
    assert list(teacher.pipeline_parts.table) == ["", *CAPTIONS]
    found = teacher.pipeline_parts.encode_text(CAPTIONS, cpu)["encoder_hidden_states"]
    assert found.shape == (3, TOKENS, 8)
    assert torch.equal(found, encoder.encode_text(CAPTIONS, cpu)["encoder_hidden_states"].half().float())
    assert torch.equal(
        teacher.pipeline_parts.encode_empty_text(2, cpu)["encoder_hidden_states"],
        encoder.encode_empty_text(2, cpu)["encoder_hidden_states"].half().float(),
    )
    with pytest.raises(
        ValueError, match=r"no stored text state for the caption 'a cow'; 3 captions are stored, .*a cat; a dog; an owl"
    ):
        teacher.pipeline_parts.encode_text(["a cow"], cpu)


def text_denoiser(parts: dict[str, str], drop_text: float) -> Denoiser:
    network = UNET | {
        "_class_name": "UNet2DConditionModel",
        "cross_attention_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    options: dict[str, Any] = dict.fromkeys(("optimizer", "lr_scheduler", "dump"))
    return new_denoiser(network, SCHEDULE, seed=0, **options, **parts, text_tokens=TOKENS, drop_text=drop_text)


def test_dropped_captions_are_replaced_by_the_empty_one(parts):
    backbone, cpu = text_denoiser(parts, drop_text=0.3).backbone, torch.device("cpu")
    pipeline_parts = backbone.pipeline_parts
    own, empty = (
        pipeline_parts.encode_text([CAPTIONS[i % 3] for i in range(200)], cpu),
        pipeline_parts.encode_empty_text(1, cpu),
    )
    torch.manual_seed(5)
    chosen = torch.rand(200) < 0.3
    assert 40 < int(chosen.sum()) < 80
    inputs = {"sample": torch.zeros(200, 4, 4, 4), "conditions": own}
    torch.manual_seed(5)
    found = drop_captions(backbone, inputs, {}, 0.3)["encoder_hidden_states"]
    expected = torch.where(chosen[:, None, None], empty["encoder_hidden_states"], own["encoder_hidden_states"])
    assert torch.equal(found, expected)
    assert not torch.equal(empty["encoder_hidden_states"][0], own["encoder_hidden_states"][0])
    torch.manual_seed(5)
    empty_text = {"encoder_hidden_states": torch.zeros(1, TOKENS, 8)}
    stored = drop_captions(backbone, inputs, {"empty_text": empty_text}, 0.3)
    assert (stored["encoder_hidden_states"] == 0).flatten(1).all(1).equal(chosen)


@pytest.mark.parametrize(("drop_text", "seen"), [(0.0, CAPTIONS), (1.0, [""] * 3)])
def test_the_loss_uses_the_captions_that_are_not_dropped(parts, drop_text, seen):
    denoiser = text_denoiser(parts, drop_text)
    batch = {"image": torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), "caption": CAPTIONS}
    torch.manual_seed(1)
    with torch.no_grad():
        loss = denoiser.losses(batch)["loss"]
        torch.manual_seed(1)
        backbone = denoiser.backbone
        losses = [backbone.loss(backbone.training_inputs(batch | {"caption": seen}))]
        torch.manual_seed(1)
        losses.append(backbone.loss(backbone.training_inputs(batch | {"caption": ["dog"] * 3})))
    torch.testing.assert_close(loss, losses[0])
    assert not torch.isclose(loss, losses[1], rtol=1e-5)


# What a network needs


def test_the_seed_alone_decides_the_fresh_weights(parts):
    def made(seed: int) -> dict[str, torch.Tensor]:
        options: dict[str, Any] = dict.fromkeys(("optimizer", "lr_scheduler", "dump"))
        network = NETWORKS["cifar10_dit"] | {"_class_name": "DiTTransformer2DModel", "in_channels": 4}
        return new_denoiser(network, SCHEDULE, seed=seed, vae=parts["vae"], **options).backbone.weights()

    first = made(0)
    assert differences(first, made(0)) == []
    assert "transformer_blocks.1.attn1.to_q.weight" in differences(first, made(1))


@pytest.mark.parametrize(
    ("name", "changed", "error", "message"),
    [
        ("UNet3D", {}, ValueError, r"_class_name='UNet3D' is unknown; choose one of: .*UNet2DModel"),
        ("DiTTransformer2DModel", {"vae": None}, ValueError, r"pretrain\.vae=null: a DiTTransformer2DModel works on"),
        ("UNet2DConditionModel", {"vae": None}, ValueError, r"pretrain\.vae=null: a UNet2DConditionModel works on"),
        ("UNet2DConditionModel", {"text_encoder": None}, ValueError, r"pretrain\.text_encoder=null: .* takes text"),
        ("UNet2DModel", {"vae": "/nowhere"}, MissingData, r"pretrain\.vae='/nowhere' can be read neither from there"),
        ("UNet2DConditionModel", {"text_encoder": "/nowhere"}, MissingData, r"pretrain\.text_encoder='/nowhere' can"),
        ("PixArtTransformer2DModel", {}, ValueError, r"training from nothing is for UNet2DModel, UNet2DConditionModel"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_field(parts, name, changed, error, message):
    transformers = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 4, "caption_channels": 8}
    network = UNET | {"_class_name": name} | ({} if "UNet" in name else transformers)
    if "UNet" in name:
        network |= {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    with pytest.raises(error, match=message):
        build_new_backbone(network, SCHEDULE, **(parts | changed))


@pytest.mark.parametrize("value", [None, torch.nan])
def test_a_vae_with_missing_or_damaged_weights_is_refused(parts, tmp_path, value):
    folder, key = shutil.copytree(parts["vae"], tmp_path / "vae"), "quant_conv.bias"
    (file,) = folder.glob("*.safetensors")
    state = load_file(file)
    state[key] = state[key] * (value or 0)
    save_file({name: tensor for name, tensor in state.items() if value or name != key}, file, {"format": "pt"})
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    network = UNET | blocks | {"_class_name": "UNet2DModel"}
    with pytest.raises(ValueError, match=rf"the weights in {folder} .*(missing_keys|not finite): {key}"):
        build_new_backbone(network, SCHEDULE, vae=str(folder))
