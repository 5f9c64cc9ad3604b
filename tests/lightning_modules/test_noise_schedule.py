"""Noise schedules: where they come from, how samples are noised under them, and which samplers fit."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    SASolverScheduler,
    SCMScheduler,
    ScoreSdeVeScheduler,
    TCDScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import FrozenDict
from support.networks import CROSS, TINY, bypasses, tiny_backbone, tiny_batch
from support.pipelines import BETAS, tiny_pipeline

from conf.schema import build
from datamodules.seeding import torch_rng
from experiments.engine.identity import fingerprint
from experiments.engine.pipeline import run_pipeline
from experiments.engine.stages.score import Score
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.backbones.diffusion.load import load_teacher
from lightning_modules.backbones.diffusion.schedule import add_noise, check_sampler, make_sampler, training_schedule
from lightning_modules.backbones.diffusion.unet import UNetBackbone, check_channels
from lightning_modules.backbones.files import list_weight_files
from lightning_modules.export.export import export
from lightning_modules.modules.denoiser import new_denoiser
from lightning_modules.modules.distillation import Distillation

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
def build_teacher(configure, overrides, monkeypatch):
    """build_teacher(path, *more) -> the teacher that a job loads."""

    def load(path: str, *more: str) -> DiffusionBackbone:
        teachers = []
        monkeypatch.setattr(Score, "check", lambda self, job: teachers.append(job.teacher) or 1 / 0)
        job = [override for override in overrides if not override.startswith("teacher.path=")]
        with pytest.raises(ZeroDivisionError):
            run_pipeline(configure(*job, f"teacher.path={path}", *more))
        return teachers[0]

    return load


def terms(backbone: DiffusionBackbone, schedule: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the target of some calibration samples, and their noise and velocity under a schedule."""
    batch = tiny_batch(backbone)
    inputs = backbone.calibration_inputs(batch, seed=0)
    clean = backbone.latents(batch, [torch_rng(0, "calibration", "latent", n) for n in batch["number"].tolist()])
    kept = schedule.alphas_cumprod[inputs["timestep"]].view(-1, 1, 1, 1)
    noise = (inputs["sample"] - kept.sqrt() * clean) / (1 - kept).sqrt()
    return inputs["target"], noise, kept.sqrt() * noise - (1 - kept).sqrt() * clean


def close(values: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(values, expected, rtol=1e-3, atol=1e-3)


def test_the_schedule_and_the_prediction_are_those_saved_with_the_teacher(saved_with, build_teacher):
    schedule = DDPMScheduler(**V)
    backbone = build_teacher(saved_with(schedule))
    assert torch.equal(backbone.noise_scheduler.alphas_cumprod, schedule.alphas_cumprod)
    target, noise, velocity = terms(backbone, schedule)
    assert close(target, velocity) and not close(target, noise)


def test_a_schedule_of_the_configuration_wins_over_the_teachers(saved_with, build_teacher):
    backbone = build_teacher(saved_with(DDPMScheduler(**V)), "noise_scheduler=linear")
    schedule = DDPMScheduler()
    assert torch.equal(backbone.noise_scheduler.alphas_cumprod, schedule.alphas_cumprod)
    target, noise, velocity = terms(backbone, schedule)
    assert close(target, noise) and not close(target, velocity)


def test_a_pipeline_has_the_schedule_of_its_sampler(tmp_path):
    backbone, schedule = load_teacher(str(tiny_pipeline("sd_v", tmp_path))), DDIMScheduler(**BETAS)
    assert torch.equal(backbone.noise_scheduler.alphas_cumprod, schedule.alphas_cumprod)
    target, noise, velocity = terms(backbone, schedule)
    assert close(target, velocity) and not close(target, noise)


@pytest.mark.parametrize("sampler", ["dpm_solver", "ddim", "ddpm"])
def test_samplers_know_what_the_teacher_predicts(configure, saved_with, sampler):
    backbone = load_teacher(saved_with(DDPMScheduler(**V)))
    made = build(configure(f"sampler={sampler}").sampler.scheduler)(backbone.noise_scheduler.config)
    assert made.config.prediction_type == "v_prediction"
    assert torch.equal(made.alphas_cumprod, backbone.noise_scheduler.alphas_cumprod)


def test_a_network_without_a_schedule_is_refused_before_scoring(configure, overrides, saved_with, tmp_path):
    path = saved_with(None)
    job = [override for override in overrides if not override.startswith("teacher.path=")]
    expected = f"{path} holds a network without its pipeline, so its noise schedule is not known"
    with pytest.raises(Exception, match=f"{re.escape(expected)}; set it: noise_scheduler=linear "):
        run_pipeline(configure(*job, f"teacher.path={path}"))
    assert not list(tmp_path.rglob("scores.json"))


def test_the_configuration_gives_a_bare_network_its_schedule(saved_with, build_teacher):
    backbone = build_teacher(saved_with(None), "noise_scheduler=linear", "noise_scheduler.beta_end=0.01")
    assert torch.equal(backbone.noise_scheduler.alphas_cumprod, DDPMScheduler(beta_end=0.01).alphas_cumprod)


def test_another_schedule_beside_the_same_weights_is_another_teacher(saved_with, tmp_path):
    path = saved_with(DDPMScheduler())
    before = fingerprint(list_weight_files(path), tmp_path / "cache")
    config = Path(path) / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    assert fingerprint(list_weight_files(path), tmp_path / "cache") != before


def test_an_export_has_the_configured_schedule_and_not_its_pipelines(tmp_path):
    path = tiny_pipeline("sd_v", tmp_path / "sd_v")
    backbone = load_teacher(str(path), DDPMScheduler(prediction_type="epsilon", beta_end=0.03))
    export(backbone.pruned(bypasses([backbone.units()[0].name])), tmp_path / "export")
    written = json.loads((tmp_path / "export" / "scheduler" / "scheduler_config.json").read_text())
    assert (written["prediction_type"], written["beta_end"]) == ("epsilon", 0.03)


# Which schedules are read, and how

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SOLVERS = (
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    UniPCMultistepScheduler,
    DEISMultistepScheduler,
    SASolverScheduler,
)
FLOWS = [
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    FlowMatchHeunDiscreteScheduler(shift=3.0),
    FlowMatchLCMScheduler(shift=3.0),
    *(solver(**FLOW) for solver in SOLVERS),
]
ZERO_SNR = DDPMScheduler(**BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction")


def name_of(scheduler: Any) -> str:
    return type(scheduler).__name__


@pytest.mark.parametrize("scheduler", FLOWS, ids=name_of)
def test_a_flow_is_trained_as_a_flow_whatever_samples_from_it(scheduler):
    sample, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    noisy, timesteps, target = add_noise(training_schedule(scheduler), sample, noise, torch.tensor([0, 500]))
    level = 0.5 * 3 / (1 + 2 * 0.5)  # shifted by 3
    assert timesteps.tolist() == [1000, 1000 * level]
    torch.testing.assert_close(noisy, torch.stack([noise[0], level * noise[1] + (1 - level) * sample[1]]))
    assert torch.equal(target, noise - sample)


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMDPMSolverMultistepScheduler(),
        EDMEulerScheduler(prediction_type="v_prediction"),
        EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous"),
        ScoreSdeVeScheduler(),
        CMStochasticIterativeScheduler(),
        SCMScheduler(),
        CogVideoXDDIMScheduler(),
        HeunDiscreteScheduler(beta_schedule="exp"),
        DPMSolverMultistepScheduler(use_flow_sigmas=True),
        UniPCMultistepScheduler(prediction_type="flow_prediction"),
        DDIMScheduler(prediction_type="flow_prediction"),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    ],
    ids=name_of,
)
def test_a_schedule_of_another_kind_is_refused_by_name(scheduler):
    kind = scheduler.config.get("prediction_type")
    with pytest.raises(ValueError, match=f"the noise schedule {name_of(scheduler)} ") as caught:
        UNetBackbone(UNet2DModel(**TINY), scheduler)
    message = str(caught.value)
    assert "Supported are" in message and "DDPMScheduler" in message and "FlowMatchEulerDiscreteScheduler" in message
    assert "no prediction_type" in message or "invert_sigmas" in message or f"prediction_type={kind!r}" in message


def test_an_edm_pipeline_is_refused_before_scoring(configure, overrides, saved_with, tmp_path):
    path = saved_with(EDMEulerScheduler())
    job = [override for override in overrides if not override.startswith("teacher.path=")]
    with pytest.raises(Exception, match="the noise schedule EDMEulerScheduler"):
        run_pipeline(configure(*job, f"teacher.path={path}"))
    assert not list(tmp_path.rglob("scores.json"))


def test_a_network_without_its_pipeline_keeps_the_flow_saved_beside_it(saved_with):
    backbone = load_teacher(saved_with(FlowMatchHeunDiscreteScheduler(shift=3.0)))
    assert torch.equal(backbone.noise_scheduler.sigmas, FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas)


@pytest.mark.parametrize("cls", [LCMScheduler, TCDScheduler, KDPM2DiscreteScheduler, HeunDiscreteScheduler])
def test_betas_left_at_the_defaults_of_one_class_are_kept_by_another(cls):
    schedule = training_schedule(cls())
    torch.testing.assert_close(schedule.alphas_cumprod, cls().alphas_cumprod, rtol=0, atol=1e-6)
    assert torch.equal(make_sampler(cls.from_config, DDPMScheduler()).alphas_cumprod, DDPMScheduler().alphas_cumprod)


# Which samplers fit


@pytest.mark.parametrize("name", ["dpm_solver", "ddim", "ddpm", "euler", "lcm", "pndm"])
def test_samplers_that_drop_zero_terminal_snr_are_refused(configure, name):
    backbone = UNetBackbone(UNet2DModel(**TINY), ZERO_SNR)
    sampler = build(configure(f"sampler={name}").sampler.scheduler)
    if name != "pndm":
        return backbone.check_sampler(sampler, 4)
    with pytest.raises(
        ValueError, match=r"PNDMScheduler has other noise levels .* ignores rescale_betas_zero_snr=True"
    ):
        backbone.check_sampler(sampler, 4)


@pytest.mark.parametrize("scheduler", FLOWS, ids=name_of)
@pytest.mark.parametrize("name", ["flow_euler", "dpm_solver", "ddim", "euler"])
def test_samplers_of_flows_fit_flows(configure, name, scheduler):
    schedule = training_schedule(scheduler)
    sampler = make_sampler(build(configure(f"sampler={name}").sampler.scheduler), schedule)
    if name in ("flow_euler", "dpm_solver"):
        return check_sampler(sampler, schedule, predicts_variance=False)
    with pytest.raises(ValueError, match="predicts 'flow_prediction'; choose sampler=flow_euler or dpm_solver"):
        check_sampler(sampler, schedule, predicts_variance=False)


def test_a_sampler_of_flows_is_refused_for_a_schedule_of_betas(configure, teacher):
    with pytest.raises(ValueError, match=r"FlowMatchEuler.* predicts 'epsilon'; choose sampler=dpm_solver, ddim"):
        teacher.check_sampler(build(configure("sampler=flow_euler").sampler.scheduler), 4)


@pytest.mark.parametrize("cls", [FlowMatchEulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@torch.no_grad()
def test_a_flow_that_points_at_one_sample_is_followed_to_it(cls, teacher):
    """The exact velocity from x to a sample c at noise level s is (x - c) / s, and every step ends on a line to c."""
    teacher = UNetBackbone(teacher.network, FlowMatchEulerDiscreteScheduler(shift=3.0))
    sample = torch.full((1, *teacher.data_shape()), 0.5)
    teacher.predict = lambda inputs: (inputs["sample"] - sample) / (inputs["timestep"].view(-1, 1, 1, 1) / 1000)
    generated = teacher.generate({"seed": torch.arange(2)}, cls.from_config, 8)
    torch.testing.assert_close(generated, sample.expand(2, -1, -1, -1), rtol=0, atol=0.02)  # solvers round timesteps


# A predicted variance


def with_variance(**scheduler: Any) -> UNetBackbone:
    torch.manual_seed(0)
    return UNetBackbone(UNet2DModel(**TINY | {"out_channels": 6}).eval(), DDPMScheduler(**scheduler))


@torch.no_grad()
def test_distillation_compares_the_variance_and_the_task_loss_does_not():
    backbone = with_variance()
    inputs = backbone.calibration_inputs(tiny_batch(backbone), seed=0)
    output = backbone.predict(inputs)
    other = output.clone()
    other[:, 3:] += 1
    assert output.shape[1] == 6
    assert torch.equal(backbone.losses(other, inputs), backbone.losses(output, inputs))
    torch.testing.assert_close(backbone.distance(other, output, inputs), torch.tensor(0.5))


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver"])
@torch.no_grad()
def test_samplers_take_a_variance_or_leave_it(configure, name):
    sampler = build(configure(f"sampler={name}").sampler.scheduler)
    samples = []
    for variance in ("learned_range", "fixed_small"):
        backbone = with_variance(variance_type=variance)
        backbone.check_sampler(sampler, 2)
        samples.append(backbone.generate({"seed": torch.arange(2)}, sampler, 2))
    assert torch.equal(*samples) == (name != "ddpm")


def test_a_learned_variance_that_the_network_does_not_predict_is_refused(configure):
    backbone = UNetBackbone(UNet2DModel(**TINY), DDPMScheduler(variance_type="learned_range"))
    backbone.check_sampler(build(configure("sampler=ddim").sampler.scheduler), 2)
    with pytest.raises(ValueError, match="variance_type='learned_range', but this teacher predicts no variance"):
        backbone.check_sampler(build(configure("sampler=ddpm").sampler.scheduler), 2)


def test_distillation_warns_when_the_variance_is_not_trained(caplog):
    Distillation.check_settings({"w_out": 0.0}, with_variance(), narrower=False)
    assert "distillation.w_out=0.0: the student's predicted variance is not trained" in caplog.text
    caplog.clear()
    Distillation.check_settings({"w_out": 1.0}, with_variance(), narrower=False)
    assert not caplog.text


def test_training_from_nothing_is_refused_for_a_network_with_variances(tmp_path):
    network = TINY | {"_class_name": "UNet2DModel", "out_channels": 6}
    options = {"optimizer": torch.optim.AdamW, "lr_scheduler": None, "seed": 0, "dump": tmp_path}
    with pytest.raises(ValueError, match=r"pretrain\.network\.out_channels=6: half .* choose out_channels=3"):
        new_denoiser(network, DDPMScheduler(), **options)


# Configurations of networks


def test_a_network_without_a_sample_size_asks_for_it():
    network = UNet2DModel(**TINY | {"sample_size": None})
    assert UNetBackbone(network, DDPMScheduler(), sample_size=8).data_shape() == (3, 8, 8)
    with pytest.raises(ValueError, match=r"teacher\.sample_size=null: .* set teacher\.sample_size"):
        UNetBackbone(network, DDPMScheduler()).data_shape()


def test_widths_of_cross_attention_by_stage_are_read_or_refused():
    listed = UNetBackbone(UNet2DConditionModel(**CROSS, cross_attention_dim=(5, 6)), DDPMScheduler())
    assert listed.example_conditions(1)["encoder_hidden_states"].shape == (1, 77, 6)  # the first stage attends to none
    assert listed.macs().linear == tiny_backbone("UNet2DConditionModel").macs().linear
    config = listed.network.config | {"down_block_types": ("CrossAttnDownBlock2D",) * 2}
    with pytest.raises(ValueError, match=r"cross_attention_dim=\[5, 6\]: its stages want text states of 2 widths"):
        check_channels(FrozenDict(config), "teacher")


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_class_embeds", 10), ("class_embed_type", "timestep"), ("addition_embed_type", "image")],
)
def test_a_network_that_takes_other_conditions_is_refused(field, value):
    config = FrozenDict(tiny_backbone("UNet2DConditionModel").network.config | {field: value})
    with pytest.raises(ValueError, match=f"teacher.path='unknown' has {field}={value!r}: it takes conditions"):
        check_channels(config, "unknown")
