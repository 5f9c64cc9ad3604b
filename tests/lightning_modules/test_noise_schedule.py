"""Whose noise schedule counts: the teacher's own, unless the configuration says another."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from support.networks import bypasses, tiny_batch
from support.pipelines import BETAS, tiny_pipeline

from conf.schema import build
from datamodules.seeding import torch_rng
from experiments.engine.identity import fingerprint
from experiments.engine.pipeline import run_pipeline
from experiments.engine.stages.score import Score
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.backbones.diffusion.load import load_teacher
from lightning_modules.backbones.files import list_weight_files
from lightning_modules.export.export import export

V = {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}


@pytest.fixture
def saved_with(teacher_folder: Path, tmp_path: Path):
    """saved_with(scheduler) -> the tiny teacher in a folder, with this scheduler beside its weights, or with none."""

    def make(scheduler: Any) -> str:
        folder = shutil.copytree(teacher_folder, tmp_path / "saved")
        (folder / "scheduler_config.json").unlink()
        if scheduler is not None:
            scheduler.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture
def teacher_of(configure, overrides, monkeypatch):
    """teacher_of(path, *more) -> the teacher that a job loads."""

    def load(path: str, *more: str) -> DiffusionBackbone:
        found = []
        monkeypatch.setattr(Score, "check", lambda self, job: found.append(job.teacher) or 1 / 0)
        job = [override for override in overrides if not override.startswith("teacher.path=")]
        with pytest.raises(ZeroDivisionError):
            run_pipeline(configure(*job, f"teacher.path={path}", *more))
        return found[0]

    return load


def terms(backbone: DiffusionBackbone, schedule: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The target of some calibration samples, and the noise and the velocity that they have under a schedule."""
    batch = tiny_batch(backbone)
    inputs = backbone.calibration_inputs(batch, seed=0)
    clean = backbone.latents(batch, [torch_rng(0, "calibration", "latent", n) for n in batch["number"].tolist()])
    kept = schedule.alphas_cumprod[inputs["timestep"]].view(-1, 1, 1, 1)
    noise = (inputs["sample"] - kept.sqrt() * clean) / (1 - kept).sqrt()
    return inputs["target"], noise, kept.sqrt() * noise - (1 - kept).sqrt() * clean


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_the_schedule_and_the_prediction_are_those_saved_with_the_teacher(saved_with, teacher_of):
    schedule = DDPMScheduler(**V)
    backbone = teacher_of(saved_with(schedule))
    assert torch.equal(backbone.noise_scheduler.alphas_cumprod, schedule.alphas_cumprod)
    target, noise, velocity = terms(backbone, schedule)
    assert close(target, velocity) and not close(target, noise)


def test_a_schedule_of_the_configuration_wins_over_the_teachers(saved_with, teacher_of):
    backbone = teacher_of(saved_with(DDPMScheduler(**V)), "noise_scheduler=linear")
    schedule = DDPMScheduler()
    assert torch.equal(backbone.noise_scheduler.alphas_cumprod, schedule.alphas_cumprod)
    target, noise, velocity = terms(backbone, schedule)
    assert close(target, noise) and not close(target, velocity)


def test_the_schedule_of_a_pipeline_is_that_behind_its_sampler(tmp_path):
    backbone, schedule = load_teacher(str(tiny_pipeline("sd_v", tmp_path))), DDIMScheduler(**BETAS)
    assert torch.equal(backbone.noise_scheduler.alphas_cumprod, schedule.alphas_cumprod)
    target, noise, velocity = terms(backbone, schedule)
    assert close(target, velocity) and not close(target, noise)


@pytest.mark.parametrize("sampler", ["dpm_solver", "ddim", "ddpm"])
def test_samplers_are_told_what_the_teacher_predicts(configure, saved_with, sampler):
    backbone = load_teacher(saved_with(DDPMScheduler(**V)))
    made = build(configure(f"sampler={sampler}").sampler.scheduler)(backbone.noise_scheduler.config)
    assert made.config.prediction_type == "v_prediction"
    assert torch.equal(made.alphas_cumprod, backbone.noise_scheduler.alphas_cumprod)


def test_a_network_without_a_schedule_is_refused_before_anything_is_scored(configure, overrides, saved_with, tmp_path):
    path = saved_with(None)
    job = [override for override in overrides if not override.startswith("teacher.path=")]
    expected = f"{path} holds a network without its pipeline, so its noise schedule is not known"
    with pytest.raises(Exception, match=f"{re.escape(expected)}; say it: noise_scheduler=linear "):
        run_pipeline(configure(*job, f"teacher.path={path}"))
    assert not list(tmp_path.rglob("scores.json"))


def test_the_configuration_can_say_the_schedule_of_a_network_that_has_none(saved_with, teacher_of):
    backbone = teacher_of(saved_with(None), "noise_scheduler=linear", "noise_scheduler.beta_end=0.01")
    assert torch.equal(backbone.noise_scheduler.alphas_cumprod, DDPMScheduler(beta_end=0.01).alphas_cumprod)


def test_another_schedule_beside_the_same_weights_is_another_teacher(saved_with, tmp_path):
    path = saved_with(DDPMScheduler())
    before = fingerprint(list_weight_files(path), tmp_path / "cache")
    config = Path(path) / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    assert fingerprint(list_weight_files(path), tmp_path / "cache") != before


def test_an_export_samples_with_the_schedule_that_was_given(tmp_path):
    """And not with the one that stands in the teacher's pipeline."""
    path = tiny_pipeline("sd_v", tmp_path / "sd_v")
    backbone = load_teacher(str(path), DDPMScheduler(prediction_type="epsilon", beta_end=0.03))
    export(backbone.pruned(bypasses([backbone.units()[0].name])), tmp_path / "export")
    written = json.loads((tmp_path / "export" / "scheduler" / "scheduler_config.json").read_text())
    assert (written["prediction_type"], written["beta_end"]) == ("epsilon", 0.03)
