"""Consistency distillation: its identities, its parts beside those of diffusers, and what it refuses."""

import copy
import itertools
import os
import signal
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from pytorch_lightning.callbacks import Callback
from support.distillation import REMOVED, distillation, losses_of
from support.networks import CROSS, SMALLER, bypasses, tiny_backbone, tiny_batch, tiny_seeds
from support.pipelines import LATENT, tiny_pipeline
from support.results import differences, trained_state
from torch import Tensor, nn

from conf.schema import ConfigError
from datamodules.seeding import torch_rng
from lightning_modules.backbones.diffusion.load import load_teacher
from lightning_modules.backbones.diffusion.schedule import split_output, take_ddim_step
from lightning_modules.backbones.diffusion.unet import UNetBackbone, embed_guidance
from lightning_modules.backbones.loading import load_network
from lightning_modules.modules.consistency import (
    SIGMA_DATA,
    TIMESTEP_SCALING,
    Consistency,
    estimate_clean,
    measure_distance,
    scale_boundary,
)
from lightning_modules.modules.training_inputs import drop_conditions
from lightning_modules.training.memory import TrainingSettings, estimate_memory
from lightning_modules.training.trainer import fit

PREDICTIONS = ("epsilon", "v_prediction", "sample")
EMBEDDING = CROSS | {"cross_attention_dim": 6, "time_cond_proj_dim": 7}
"""A U-Net that takes the guidance scale as an argument"""


def consistency(student: Any, teacher: Any, **options: Any) -> Consistency:
    module = distillation(student, teacher, cls=Consistency, **options)
    assert isinstance(module, Consistency)
    return module


def pair(family: str = "UNet2DModel") -> tuple[Any, Any]:
    """A teacher, and a student of it without some units."""
    teacher = tiny_backbone(family)
    return teacher.pruned(bypasses(REMOVED)), teacher


def noise_like(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The boundary parametrisation


def test_the_boundary_scalings_are_those_of_the_scheduler_that_samples():
    scheduler, steps_N = LCMScheduler(), torch.arange(1000)
    assert scheduler.config.timestep_scaling == TIMESTEP_SCALING
    c_skip, c_out = scale_boundary(steps_N)
    for step in (0, 1, 19, 39, 499, 999):
        expected = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(float(step)))
        assert torch.equal(c_skip[step], expected[0]) and torch.equal(c_out[step], expected[1])
    assert scheduler.sigma_data == SIGMA_DATA


@pytest.mark.parametrize("predicted", PREDICTIONS)
def test_at_step_0_the_consistency_function_is_the_identity(predicted):
    teacher = tiny_backbone("UNet2DModel")
    teacher.noise_scheduler = DDPMScheduler(prediction_type=predicted)
    sample = noise_like((3, 3, 8, 8))
    inputs = {"sample": sample, "timestep": torch.zeros(3, dtype=torch.long), "conditions": {}}
    with torch.no_grad():
        assert torch.equal(estimate_clean(teacher, inputs), sample)
        later = estimate_clean(teacher, inputs | {"timestep": torch.full((3,), 19)})
    assert not torch.equal(later, sample)


@pytest.mark.parametrize("predicted", PREDICTIONS)
def test_the_consistency_function_is_what_the_scheduler_returns_in_its_last_step(predicted):
    teacher = tiny_backbone("UNet2DModel")
    teacher.noise_scheduler = DDPMScheduler(prediction_type=predicted)
    scheduler = LCMScheduler(prediction_type=predicted, beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    scheduler.set_timesteps(1)
    (step,) = scheduler.timesteps
    inputs = {"sample": noise_like((3, 3, 8, 8)), "timestep": step.expand(3), "conditions": {}}
    with torch.no_grad():
        output = teacher.predict(inputs)
        expected = scheduler.step(output, step, inputs["sample"], return_dict=False)[1]
        torch.testing.assert_close(estimate_clean(teacher, inputs), expected, rtol=1e-6, atol=1e-6)


# The solver


@pytest.mark.parametrize("predicted", PREDICTIONS)
@pytest.mark.parametrize("ddim_steps", [50, 20])
def test_a_step_back_is_a_step_of_diffusers_ddim_bit_for_bit(predicted, ddim_steps):
    schedule = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=predicted, clip_sample=False)
    scheduler = DDIMScheduler.from_config(schedule.config, timestep_spacing="trailing", set_alpha_to_one=False)
    scheduler.set_timesteps(ddim_steps)
    student, teacher = pair()
    module = consistency(student, teacher, ddim_steps=ddim_steps)
    assert module.steps_N.tolist() == scheduler.timesteps.flip(0).tolist()
    for step in scheduler.timesteps:
        noisy, output = noise_like((2, 3, 4, 4), 1), noise_like((2, 3, 4, 4), 2)
        expected = scheduler.step(output, step, noisy, return_dict=False)[0]
        steps_N = step.expand(2)
        found = take_ddim_step(schedule, output, noisy, steps_N, (steps_N - module.skip).clamp(min=0))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("predicted", PREDICTIONS)
def test_a_prediction_that_is_right_implies_the_sample_and_the_noise(predicted):
    schedule = DDPMScheduler(prediction_type=predicted)
    sample, noise, steps_N = noise_like((4, 3, 2, 2), 1), noise_like((4, 3, 2, 2), 2), torch.tensor([19, 299, 599, 999])
    target = {"epsilon": noise, "v_prediction": schedule.get_velocity(sample, noise, steps_N), "sample": sample}
    found = split_output(schedule, target[predicted], schedule.add_noise(sample, noise, steps_N), steps_N)
    torch.testing.assert_close(found[0], sample, rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1], noise, rtol=0, atol=1e-4)


# A Gaussian, for which the ODE has a closed solution


class Gaussian:
    """Stands for a backbone whose data are N(0, s^2): the teacher with the exact noise, or the exact student.

    The probability flow keeps z_t / sqrt(v_t), where v_t = abar_t s^2 + 1 - abar_t is the variance at t. So the exact
    student is f(z_t, t) = z_t sqrt(v_0 / v_t), and the exact prediction of noise sqrt(1 - abar_t) z_t / v_t.
    """

    def __init__(self, schedule: Any, s: float, is_student: bool) -> None:
        self.noise_scheduler, self.is_student = schedule, is_student
        self.abar_T = schedule.alphas_cumprod.double()
        self.variance_T = self.abar_T * s**2 + 1 - self.abar_T

    def predict(self, inputs: dict[str, Any]) -> Any:
        noisy, steps_N = inputs["sample"], inputs["timestep"]
        abar, variance = (values[steps_N].view(-1, 1, 1, 1) for values in (self.abar_T, self.variance_T))
        if not self.is_student:
            return KeepsDouble((1 - abar).sqrt() * noisy / variance)
        c_skip, c_out = (values.double().view(-1, 1, 1, 1) for values in scale_boundary(steps_N))
        end = noisy * (self.variance_T[0] / variance).sqrt()
        clean = torch.where(c_out > 0, (end - c_skip * noisy) / c_out, noisy)
        return KeepsDouble((noisy - abar.sqrt() * clean) / (1 - abar).sqrt())


class KeepsDouble:
    """A prediction in float64, whatever precision is asked for: the differences here are smaller than float32 shows."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __getitem__(self, index: Any) -> Any:
        return SimpleNamespace(float=lambda: self.values[index])


def self_consistency(s: float, skip: int, steps_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return estimates and targets of the exact student for a skipping step, in float64."""
    schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    schedule.alphas_cumprod = schedule.alphas_cumprod.double()
    student, teacher = (Gaussian(schedule, s, is_student) for is_student in (True, False))
    module = SimpleNamespace(teacher=teacher, skip=skip)
    module.predict_guided = lambda inputs, batch: teacher.predict(inputs)[:, :].float()
    noisy = noise_like((len(steps_N), 1, 4, 4), 3, torch.float64) * teacher.variance_T[steps_N].sqrt().view(-1, 1, 1, 1)
    inputs = {"sample": noisy, "timestep": steps_N, "conditions": {}}
    earlier = Consistency.step_back(module, inputs, {})
    return estimate_clean(student, inputs), estimate_clean(student, earlier)


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_the_exact_solution_for_a_gaussian_is_self_consistent_up_to_the_error_of_the_solver(s):
    """A step of DDIM has a local error of O(k^2), so the mean squared error at given steps falls by 16 for half k."""
    steps_N = torch.arange(199, 1000, 16)
    losses = [float(measure_distance(*self_consistency(s, skip, steps_N), None)) for skip in (16, 8, 4, 2)]
    assert losses[0] < 1e-5
    rates = [coarse / fine for coarse, fine in pairwise(losses)]
    assert abs(rates[-1] - 16) < 0.2 and all(abs(rate - 16) < 1 for rate in rates)


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_the_exact_solution_does_not_change_along_an_exact_trajectory(s):
    schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    student, steps_N = Gaussian(schedule, s, True), torch.tensor([0, 1, 19, 499, 999])
    scales = student.variance_T[steps_N].sqrt().view(-1, 1, 1, 1)
    ends = estimate_clean(
        student, {"sample": noise_like((1, 1, 4, 4), 3, torch.float64) * scales, "timestep": steps_N, "conditions": {}}
    )
    torch.testing.assert_close(ends, ends[:1].expand_as(ends), rtol=1e-6, atol=1e-6)


# The module


def fitted(folder: Path, conf: Any, module: Consistency, *callbacks: Any) -> dict[str, Tensor]:
    """Train a module on the same batch for ever; return all of its weights, the target's among them."""
    fit(module, Batches(tiny_batch(module.student)), conf, folder, "consistency", callbacks=callbacks)
    return {name: value.clone() for name, value in module.state_dict().items()}


class Batches(pl.LightningDataModule):
    def __init__(self, batch: dict[str, Any]) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> Any:
        return itertools.repeat(self.batch)


class Stop(Callback):
    """Ends the process after its second step, as a signal would."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_gradients_reach_the_student_alone():
    module = consistency(*pair())
    losses_of(module, tiny_batch(module.student))["loss"].backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in module.student.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in module.student.parameters()) == len(list(module.student.parameters()))
    assert module.target is not None
    for network in (module.target, module.teacher):
        assert not network.training
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    trained = module.configure_optimizers()["optimizer"].param_groups[0]["params"]
    assert {id(p) for p in trained} == {id(p) for p in module.student.parameters()}


def test_the_target_is_the_moving_average_of_the_student_after_each_step(configure, tmp_path):
    module, seen = consistency(*pair(), target_decay=0.75), []
    expected = [p.detach().clone() for p in module.student.parameters()]

    class Watch(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            weights = [p.detach() for p in module.student.parameters()]
            for average, weight in zip(expected, weights, strict=True):
                average.lerp_(weight, 0.25)
            seen.append(all(map(torch.equal, expected, module.target.parameters())))
            assert not any(map(torch.equal, weights, expected))

    fitted(tmp_path, configure("debug=tiny", "trainer=cpu").trainer, module, Watch())
    assert seen == [True] * 4


@pytest.mark.parametrize("options", [{}, {"target_decay": None}], ids=["average", "student"])
def test_a_training_resumes_with_the_same_bits(configure, tmp_path, options):
    conf = configure("debug=tiny", "trainer=cpu").trainer
    expected = fitted(tmp_path / "whole", conf, consistency(*pair(), **options))
    assert any(name.startswith("target.") for name in expected) == (not options)
    assert not any(name.startswith("reference") for name in expected)
    with pytest.raises(SystemExit):
        fitted(tmp_path / "stopped", conf, consistency(*pair(), **options), Stop())
    assert differences(fitted(tmp_path / "stopped", conf, consistency(*pair(), **options)), expected) == []
    ends = [tmp_path / name / "checkpoints" / "consistency" / "step=0000004.ckpt" for name in ("whole", "stopped")]
    assert differences(*map(trained_state, ends)) == []


def test_without_an_average_the_target_is_the_student():
    student, teacher = pair()
    module, with_average = (consistency(copy.deepcopy(student), teacher, target_decay=d) for d in (None, 0.5))
    assert module.target is None and list(module.networks()) == [module.student, module.teacher]
    found, expected = (losses_of(each, tiny_batch(student)) for each in (module, with_average))
    assert torch.equal(found["loss"], expected["loss"])  # before the first step the average is the student


def test_the_loss_is_the_distance_of_the_two_estimates():
    module, batch = consistency(*pair(), ddim_steps=20), tiny_batch(tiny_backbone("UNet2DModel"))
    loss = losses_of(module, batch)["loss"]
    torch.manual_seed(3)
    inputs = module.draw_inputs(batch)
    assert set(inputs["timestep"].tolist()) <= set(range(49, 1000, 50))
    with torch.no_grad():
        earlier = module.step_back(inputs, batch)
        difference = estimate_clean(module.student, inputs) - estimate_clean(module.target, earlier)
    assert torch.equal(earlier["timestep"], (inputs["timestep"] - 50).clamp(min=0))
    c = module.huber
    assert torch.equal(loss, ((difference**2 + c**2).sqrt() - c).mean())
    assert torch.equal(measure_distance(difference, torch.zeros(()), None), (difference**2).mean())


def test_a_predicted_variance_is_left_out():
    teacher = tiny_backbone("dit")
    assert teacher.predicts_variance
    module = consistency(teacher.pruned(bypasses(teacher.survivors()[1:2])), teacher)
    losses_of(module, tiny_batch(teacher))["loss"].backward()


def test_the_memory_of_a_training_is_estimated(tmp_path):
    module = consistency(*pair())
    estimate = estimate_memory(module, TrainingSettings(4, averages=False), (3, 8, 8))
    trained = sum(p.nbytes for p in module.student.parameters())
    assert estimate.gradients == trained and estimate.activations > trained / 10
    assert estimate.networks == 2 * trained + sum(p.nbytes for p in module.teacher.parameters())


# Guidance


def test_the_teacher_is_guided_as_in_generation():
    teacher = tiny_backbone("sd")
    module = consistency(teacher.pruned(bypasses(REMOVED)), teacher, guidance_min=4.0, guidance_max=4.0)
    batch = tiny_batch(teacher)
    torch.manual_seed(0)
    with torch.no_grad():
        inputs = module.draw_inputs(batch)
        assert torch.equal(inputs["guidance"], torch.full((4,), 4.0)) and "timestep_cond" not in inputs["conditions"]
        empty = teacher.empty_conditions({"seed": torch.arange(4)}, inputs["conditions"])
        output, without = teacher.predict(inputs), teacher.predict(inputs | {"conditions": empty})
        torch.testing.assert_close(module.predict_guided(inputs, batch), without + 4.0 * (output - without))
        stored = batch | {"empty_text": teacher.pipeline_parts.encode_empty_text(1, torch.device("cpu"))}
        assert torch.equal(module.predict_guided(inputs, stored), module.predict_guided(inputs, batch))


@pytest.mark.parametrize("family", ["dit", "UNet2DModel"])
def test_classes_are_guided_and_unconditional_networks_are_not(family):
    teacher = tiny_backbone(family)
    student = teacher.pruned(bypasses(teacher.survivors()[1:2]))
    module = consistency(student, teacher, guidance_min=4.0, guidance_max=4.0)
    torch.manual_seed(0)
    with torch.no_grad():
        inputs = module.draw_inputs(tiny_batch(teacher))
        output = teacher.predict(inputs)[:, : inputs["sample"].shape[1]]
        assert torch.equal(module.predict_guided(inputs, {}), output) == (family == "UNet2DModel")


def embedding_teacher() -> UNetBackbone:
    torch.manual_seed(0)
    return UNetBackbone(UNet2DConditionModel(**EMBEDDING).eval(), DDPMScheduler())


def test_a_scale_is_drawn_for_each_sample_and_embedded():
    teacher = embedding_teacher()
    student = teacher.pruned(bypasses(REMOVED[:1]))
    module = consistency(student, teacher, guidance_min=3.0, guidance_max=15.0)
    batch = tiny_batch(tiny_backbone("UNet2DConditionModel"))
    inputs = module.draw_inputs(batch)
    scales = inputs["guidance"].tolist()
    assert len(set(scales)) == 4 and all(3 <= scale <= 15 for scale in scales)
    single = torch.cat([embed_guidance(scale, 7) for scale in scales])
    torch.testing.assert_close(inputs["conditions"]["timestep_cond"], single, rtol=0, atol=1e-6)
    with torch.no_grad():  # a teacher that embeds the scale is guided by it, in one pass
        assert torch.equal(module.predict_guided(inputs, batch), teacher.predict(inputs))
    losses_of(module, batch)["loss"].backward()
    assert student.network.time_embedding.cond_proj.weight.grad.any()


def test_a_student_can_be_given_an_embedding_of_the_scale(tmp_path):
    teacher = tiny_backbone("sd")
    student, plain = (teacher.pruned(bypasses(REMOVED[:1])) for _ in range(2))
    module = consistency(student, teacher, guidance_min=3.0, guidance_max=15.0, guidance_embedding=16)
    batch = tiny_batch(teacher)
    inputs = module.draw_inputs(batch)
    with torch.no_grad():  # at first the student is what it was, and the teacher never sees the embedding
        torch.testing.assert_close(student.predict(inputs), plain.predict(inputs), rtol=0, atol=1e-6)
        scales = inputs["guidance"].view(-1, 1, 1, 1)
        empty = teacher.predict(inputs | {"conditions": drop_conditions(teacher, inputs, batch)})
        expected = empty + scales * (teacher.predict(inputs) - empty)
        torch.testing.assert_close(module.predict_guided(inputs, batch), expected)
    losses_of(module, batch)["loss"].backward()
    weight = student.network.time_embedding.cond_proj.weight
    assert weight.grad.any() and isinstance(module.target.network.time_embedding.cond_proj, nn.Linear)
    with torch.no_grad():
        weight.normal_()
    # It is written and read as diffusers does, and costs what it has.
    student.save(tmp_path)
    read = teacher.adopt(load_network(tmp_path), bypasses(REMOVED[:1]))
    assert read.embeds_guidance and read.params() == plain.params() + weight.numel()
    with torch.no_grad():
        torch.testing.assert_close(read.predict(inputs), student.predict(inputs), rtol=0, atol=1e-6)
        assert (read.predict(inputs) - plain.predict(inputs)).abs().max() > 1e-3
    for network in (student.meta_network(), UNet2DConditionModel(**SMALLER["sd"] | {"time_cond_proj_dim": 16})):
        assert network.state_dict()["time_embedding.cond_proj.weight"].shape == weight.shape
    given = read.calibration_inputs(batch, 0)  # of the joint loss: the teacher takes them without the embedding
    assert "timestep_cond" in given["conditions"]
    assert torch.equal(teacher.predict(given), teacher.predict(teacher.calibration_inputs(batch, 0)))


# Sampling


def initial_noise(backbone: Any) -> Tensor:
    """The noise from which samples of the seeds 0 and 1 are generated."""
    return torch.stack([torch.randn(backbone.data_shape(), generator=torch_rng("sample", seed)) for seed in (0, 1)])


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples_are_those_of_the_stock_pipeline_with_its_scheduler(tmp_path, steps):
    folder = tiny_pipeline("sd", tmp_path)
    teacher, pipeline = load_teacher(str(folder), sample_size=LATENT), StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    batch = tiny_seeds(teacher, 2)
    found = teacher.generate(batch, LCMScheduler.from_config, steps, 1.0)
    expected = pipeline(
        batch["caption"],
        latents=initial_noise(teacher),
        generator=[torch_rng("sampler", seed) for seed in (0, 1)],
        num_inference_steps=steps,
        guidance_scale=1.0,
        output_type="latent",
    ).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_step_is_the_consistency_function():
    teacher = tiny_backbone("UNet2DModel")
    teacher.noise_scheduler = DDPMScheduler(clip_sample=False)
    found = teacher.generate(tiny_seeds(teacher, 2), LCMScheduler.from_config, 1, 1.0)
    inputs = {"sample": initial_noise(teacher), "timestep": torch.tensor([999, 999]), "conditions": {}}
    torch.testing.assert_close(found, estimate_clean(teacher, inputs), rtol=1e-6, atol=1e-6)


# Refusals

SETTINGS = {"name": "lcm", "ddim_steps": 50, "guidance_min": 1.0, "guidance_max": 1.0, "guidance_embedding": None}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a flow": ("sd3", {}, r"distillation=lcm: a SD3Transformer2DModel predicts 'flow_prediction', .* Choose distill"),
    "a language model": ("llama", {}, r"distillation=lcm: a LlamaForCausalLM has no timesteps; .* output_only, task_"),
    "other steps": ("UNet2DModel", {"ddim_steps": 30}, r"ddim_steps=30 does not divide the 1000 .* such as 20, 25, 40"),
    "no range": ("sd", {"guidance_min": 5.0}, r"guidance_min=5, distillation\.guidance_max=1: the range is empty"),
    "a range": ("sd", {"guidance_max": 9.0}, r"guidance_max=9: this UNet2DConditionModel does not .*_embedding=256$"),
    "no text": ("UNet2DModel", {"guidance_max": 9.0}, r"this UNet2DModel does not .* one scale for both fields$"),
    "no place": ("UNet2DModel", {"guidance_embedding": 8}, r"=8: a UNet2DModel cannot embed a .* scale; choose null"),
    "a second one": ("embedding", {"guidance_embedding": 8}, r"=8: a UNet2DConditionModel embeds .* already; choose"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(wrong):
    family, change, message = REFUSED[wrong]
    with pytest.raises(ValueError, match=message):
        teacher = embedding_teacher() if family == "embedding" else tiny_backbone(family)
        Consistency.check_settings(SETTINGS | change, teacher, False)


def test_a_schedule_without_a_last_signal_needs_another_prediction():
    teacher = tiny_backbone("UNet2DModel")
    teacher.noise_scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    teacher.noise_scheduler.alphas_cumprod[-1] = 0
    with pytest.raises(ValueError, match="this schedule ends without signal while the network predicts 'epsilon'"):
        Consistency.check_settings(SETTINGS, teacher, False)
    teacher.noise_scheduler.register_to_config(prediction_type="v_prediction")
    Consistency.check_settings(SETTINGS, teacher, False)


@pytest.mark.parametrize(
    ("field", "valid"),
    [
        ("ddim_steps=0", "a whole number of 1 or more"),
        ("guidance_min=0.5", r"1 \(no guidance\) or more"),
        ("target_decay=1.0", "0 <= target_decay < 1, or null for the student itself"),
        ("huber=0", "more than 0, or null for the mean squared error"),
    ],
)
def test_values_out_of_range_are_refused_before_a_model_loads(configure, field, valid):
    with pytest.raises(ConfigError, match=rf"distillation\.{field} is out of range; choose {valid}"):
        configure("distillation=lcm", f"distillation.{field}")
