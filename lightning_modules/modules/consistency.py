"""Consistency distillation: a student that generates in a few steps, learnt along the teacher's sampling ODE."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from criteria.base import Batch
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.diffusion.schedule import (
    FLOW,
    clean_error_factor,
    prediction_type,
    split_output,
    take_ddim_step,
)
from lightning_modules.modules.base import DistillationModule, Optimizer, Schedule
from lightning_modules.modules.training_inputs import drop_conditions
from lightning_modules.nested import count_samples

SIGMA_DATA = 0.5
"""sigma_data of the boundary parametrisation, as in diffusers' LCMScheduler"""
TIMESTEP_SCALING = 10.0
"""factor of timesteps in the boundary parametrisation, the default of diffusers' LCMScheduler"""


class Consistency(DistillationModule):
    """Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378).

    The student f maps a noised sample z_t to the end of its trajectory under the probability flow ODE of the teacher,
    with classifier-free guidance of scale g. It minimises (section 4.3, the loss with a skipping step)

        L = d(f(z_{t+k}, g, t+k), f_target(z^_t, g, t)),

    where z_{t+k} is a noised training sample, z^_t follows from it by one step of DDIM with the teacher's guided
    prediction (section 4.2, the augmented PF-ODE, whose omega is g - 1), and no gradient flows through f_target. f is
    the boundary parametrisation of section 4.1 around the student's network (see `scale_boundary`). t+k is drawn
    uniformly from the `ddim_steps` time steps of DDIM, k training steps apart, on which diffusers' LCMScheduler samples
    as well where its `original_inference_steps` is the same number.

    The defaults below are those of diffusers' training script, which draws g from 5 to 15; k = 20 of 1,000 steps is the
    paper's as well.

    Args:
        student: see DistillationModule.
        teacher: see DistillationModule; the unpruned network, whatever the student's shape.
        ddim_steps: number of time steps, a divisor of the training schedule's; k is their distance.
        guidance_min: the smallest guidance scale of the teacher; 1 is none. Without captions or classes it has no
            effect.
        guidance_max: the largest one. A scale is drawn uniformly for each sample. More than `guidance_min` only for a
            student that takes the scale as an argument (`time_cond_proj_dim` of a U-Net, section 4.2).
        guidance_embedding: width of the embedding of the guidance scale that a U-Net without one is given; its weights
            begin with 0. None leaves the student as it is.
        target_decay: decay of the moving average of the student's weights that f_target has, 0 to below 1; None takes
            the student itself.
        huber: c of the pseudo-Huber distance d(x, y) = sqrt((x - y)^2 + c^2) - c, a mean over the values of a sample
            (Song & Dhariwal 2023, arXiv 2310.14189, section 3.3; there on norms of samples). None is the mean squared
            error.
        optimizer: see TrainedModule.
        lr_scheduler: see TrainedModule.
        seed: see TrainedModule.
        dump: see TrainedModule.
    """

    def __init__(
        self,
        student: NetworkBackbone,
        teacher: NetworkBackbone,
        ddim_steps: int = 50,
        guidance_min: float = 1.0,
        guidance_max: float = 1.0,
        guidance_embedding: int | None = None,
        target_decay: float | None = 0.95,
        huber: float | None = 0.001,
        *,
        optimizer: Optimizer,
        lr_scheduler: Schedule,
        seed: int,
        dump: Path,
    ) -> None:
        super().__init__(student, teacher, optimizer, lr_scheduler, seed, dump)
        check_guidance(guidance_min, guidance_max, guidance_embedding, student)
        if guidance_embedding is not None:
            unet: Any = student
            unet.add_guidance_embedding(guidance_embedding)
        self.guidance_min, self.guidance_max, self.huber = guidance_min, guidance_max, huber
        self.skip = student.noise_scheduler.config.num_train_timesteps // ddim_steps
        self.steps_N = torch.arange(1, ddim_steps + 1) * self.skip - 1
        """the time steps of DDIM, as steps of the training schedule"""
        self.target_decay = target_decay
        self.target: NetworkBackbone | None = None
        """the network of f_target, a part of checkpoints; None where it is the student"""
        if target_decay is not None:
            self.target = copy.deepcopy(student).eval().requires_grad_(False)

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any], teacher: NetworkBackbone, narrower: bool) -> None:
        """Raise ValueError for settings and teachers that consistency distillation cannot work with."""
        schedule, name = teacher.noise_scheduler, type(teacher.network).__name__
        if schedule is None or prediction_type(schedule) == FLOW:
            reason = "has no timesteps" if schedule is None else f"predicts {FLOW!r}, a rectified flow"
            raise ValueError(
                f"distillation={settings.get('name', 'lcm')}: a {name} {reason}; consistency distillation here is for "
                "diffusion networks that predict epsilon, v_prediction or sample. Choose distillation=normalized, "
                "output_only, task_only or none"
            )
        check_steps(settings.get("ddim_steps", 50), schedule)
        lowest, highest = (settings.get(f"guidance_{end}", 1.0) for end in ("min", "max"))
        check_guidance(lowest, highest, settings.get("guidance_embedding"), teacher)

    def networks(self) -> dict[NetworkBackbone, list[nn.Module]]:
        return super().networks() | ({} if self.target is None else {self.target: []})

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        inputs = self.network_inputs = self.draw_inputs(batch)
        estimate = estimate_clean(self.student, inputs)
        with torch.no_grad():
            earlier = self.step_back(inputs, batch)
            target = estimate_clean(self.student if self.target is None else self.target, earlier)
        return {"loss": measure_distance(estimate, target, self.huber)}

    def draw_inputs(self, batch: Batch) -> Batch:
        """Return the student's inputs for a batch at random time steps of DDIM, and their "guidance" scales (N,)."""
        count = count_samples(batch)
        steps_N = self.steps_N[torch.randint(len(self.steps_N), (count,))]
        guidance_N = self.guidance_min + (self.guidance_max - self.guidance_min) * torch.rand(count)
        inputs = self.student.training_inputs(batch | {"noise_step": steps_N})
        conditions = with_guidance(self.student, inputs["conditions"], guidance_N)
        return inputs | {"conditions": conditions, "guidance": guidance_N}

    def step_back(self, inputs: Batch, batch: Batch) -> Batch:
        """Return the inputs k training steps earlier, by one step of DDIM with the teacher; step 0 is the earliest."""
        steps_N = inputs["timestep"]
        earlier_N = (steps_N - self.skip).clamp(min=0)
        output = self.predict_guided(inputs, batch)
        sample = take_ddim_step(self.teacher.noise_scheduler, output, inputs["sample"], steps_N, earlier_N)
        return inputs | {"sample": sample, "timestep": earlier_N}

    def predict_guided(self, inputs: Batch, batch: Batch) -> Tensor:
        """Return the teacher's prediction with classifier-free guidance (arXiv 2207.12598), (N,C,H,W) in float32.

        A teacher that takes the scale as an argument is called once, as it is where there are no conditions to leave
        out. As a step of DDIM is linear in the prediction, guiding this is guiding the step (section 4.2).
        """
        teacher, conditions = self.teacher, inputs["conditions"]
        given = with_guidance(teacher, conditions, inputs["guidance"])
        output = predict_sample(teacher, inputs | {"conditions": given})
        if not conditions or teacher.embeds_guidance or self.guidance_max <= 1:
            return output
        without = predict_sample(teacher, inputs | {"conditions": drop_conditions(teacher, inputs, batch)})
        return without + inputs["guidance"].to(output.device).view(-1, 1, 1, 1) * (output - without)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.target is not None:
            self.update_target()

    @torch.no_grad()
    def update_target(self) -> None:
        """Move the target's weights towards the student's (Song et al. 2023, arXiv 2303.01469, equation 8)."""
        assert self.target is not None and self.target_decay is not None
        averages: list[Tensor] = list(self.target.parameters())
        weights: list[Tensor] = list(self.student.parameters())
        torch._foreach_lerp_(averages, weights, 1 - self.target_decay)
        for average, buffer in zip(self.target.buffers(), self.student.buffers(), strict=True):
            average.copy_(buffer)


# The consistency function


def estimate_clean(backbone: NetworkBackbone, inputs: Batch) -> Tensor:
    """Return f(z_t, t) = c_skip(t) z_t + c_out(t) x(z_t, t), (N,C,H,W) in float32 (arXiv 2310.04378, section 4.1).

    x is the clean sample that the network's prediction implies, whatever its type.
    """
    noisy, steps_N = inputs["sample"], inputs["timestep"]
    clean, _ = split_output(backbone.noise_scheduler, predict_sample(backbone, inputs), noisy, steps_N)
    c_skip, c_out = scale_boundary(steps_N)
    return c_skip.view(-1, 1, 1, 1) * noisy + c_out.view(-1, 1, 1, 1) * clean


def scale_boundary(steps_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return c_skip and c_out at steps of the training schedule, (N,) in float32, as diffusers' LCMScheduler has them.

    At step 0 they are 1 and 0, the boundary condition of consistency models (Song et al. 2023, arXiv 2303.01469,
    equation 5): f(z, 0) = z.
    """
    times_N = steps_N.float() * TIMESTEP_SCALING
    variances_N = times_N**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / variances_N, times_N / variances_N**0.5


def measure_distance(estimate: Tensor, target: Tensor, huber: float | None) -> Tensor:
    """Return the mean pseudo-Huber distance with c = `huber`, or the mean squared error if that is None; a scalar."""
    squares = (estimate - target).square()
    return squares.mean() if huber is None else ((squares + huber**2).sqrt() - huber).mean()


def predict_sample(backbone: Any, inputs: Batch) -> Tensor:
    """Return the network's prediction, (N,C,H,W) in float32, without a variance beside it."""
    output: Tensor = backbone.predict(inputs)[:, : inputs["sample"].shape[1]].float()
    return output


def with_guidance(backbone: Any, conditions: dict[str, Any], guidance_N: Tensor) -> dict[str, Any]:
    """Return the conditions with the guidance scales of the samples, for networks that take these."""
    guided: dict[str, Any] = backbone.with_guidance(conditions, guidance_N)
    return guided


# Checks


def check_steps(ddim_steps: int, schedule: Any) -> None:
    """Raise ValueError for time steps that do not divide the schedule, or at which nothing of the signal is left."""
    total = schedule.config.num_train_timesteps
    if total % ddim_steps:
        divisors = [n for n in range(1, total + 1) if total % n == 0]
        nearest = sorted(sorted(divisors, key=lambda n: abs(n - ddim_steps))[:3])
        raise ValueError(
            f"distillation.ddim_steps={ddim_steps} does not divide the {total} steps of the training schedule; choose "
            f"a divisor of them, such as {', '.join(map(str, nearest))}"
        )
    if not clean_error_factor(schedule).isfinite().all():
        raise ValueError(
            f"distillation: this schedule ends without signal while the network predicts {prediction_type(schedule)!r},"
            " which says nothing about the clean sample there; choose a teacher that predicts v_prediction or sample, "
            "or another noise_scheduler"
        )


def check_guidance(guidance_min: float, guidance_max: float, guidance_embedding: int | None, network: Any) -> None:
    """Raise ValueError for a range of guidance scales, or an embedding of them, that a network cannot have."""
    fields = f"distillation.guidance_min={guidance_min:g}, distillation.guidance_max={guidance_max:g}"
    if guidance_min > guidance_max:
        raise ValueError(f"{fields}: the range is empty; choose guidance_min of at most {guidance_max:g}")
    name = type(network.network).__name__
    if guidance_embedding is not None and (network.embeds_guidance or not network.can_embed_guidance):
        reason = "embeds the guidance scale already" if network.embeds_guidance else "cannot embed a guidance scale"
        raise ValueError(f"distillation.guidance_embedding={guidance_embedding}: a {name} {reason}; choose null")
    if guidance_min < guidance_max and guidance_embedding is None and not network.embeds_guidance:
        choice = " or distillation.guidance_embedding=256" if network.can_embed_guidance else ""
        raise ValueError(
            f"{fields}: this {name} does not take the guidance scale, so that it cannot learn a range of them; choose "
            f"one scale for both fields{choice}"
        )
