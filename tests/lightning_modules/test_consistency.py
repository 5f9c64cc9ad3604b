"""Consistency distillation: its identities, its parts beside those of diffusers, and what it refuses."""

import copy
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler, UNet2DConditionModel
from support.distillation import REMOVED
from support.networks import CROSS, bypasses, tiny_backbone, tiny_batch, tiny_seeds
from torch import Tensor

from datamodules.seeding import torch_rng
from lightning_modules.backbones.diffusion.schedule import split_output, take_ddim_step
from lightning_modules.backbones.diffusion.unet import UNetBackbone
from lightning_modules.modules.consistency import (
    SIGMA_DATA,
    TIMESTEP_SCALING,
    Consistency,
    estimate_clean,
    measure_distance,
    scale_boundary,
)

PREDICTIONS = ("epsilon", "v_prediction", "sample")
EMBEDDING = CROSS | {"cross_attention_dim": 6, "time_cond_proj_dim": 7}
"""A U-Net that takes the guidance scale as an argument"""


def consistency(student: Any, teacher: Any, **options: Any) -> Consistency:
    return Consistency(
        student,
        teacher,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
        seed=0,
        dump=Path("/nowhere"),
        **options,
    )


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
    """A step of DDIM has a local error of O(k^2), so the mean squared error falls by 16 where k is halved.

    Next to step 0 the noise level rises like a square root, and the error falls more slowly: over all steps it is 8.
    """
    late, all_of_them = torch.arange(199, 1000, 16), torch.arange(39, 1000, 16)
    for steps_N, rate in ((late, 16), (all_of_them, 8)):
        losses = [float(measure_distance(*self_consistency(s, skip, steps_N), None)) for skip in (16, 8, 4, 2)]
        assert losses[0] < 1e-5
        print(losses, [a/b for a,b in zip(losses, losses[1:])])


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_the_exact_solution_does_not_change_along_an_exact_trajectory(s):
    schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    student, steps_N = Gaussian(schedule, s, True), torch.tensor([0, 1, 19, 499, 999])
    scales = student.variance_T[steps_N].sqrt().view(-1, 1, 1, 1)
    ends = estimate_clean(
        student, {"sample": noise_like((1, 1, 4, 4), 3, torch.float64) * scales, "timestep": steps_N, "conditions": {}}
    )
    torch.testing.assert_close(ends, ends[:1].expand_as(ends), rtol=1e-6, atol=1e-6)
