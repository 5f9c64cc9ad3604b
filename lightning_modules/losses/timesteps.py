"""Which timesteps the training of a diffusion network draws, and how much the loss of a sample at each counts."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from criteria.base import Batch
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.diffusion.schedule import FLOW, clean_error_factor, prediction_type, signal_to_noise
from lightning_modules.nested import count_samples


class Timesteps:
    """Draws the timesteps of training samples, and weighs the samples' task and output terms by them.

    `weight` is a function of the signal-to-noise ratio: the weight of the squared error of the *clean sample*. A
    squared error of what the network predicts is such an error times a factor that depends on the noise level and the
    prediction type alone (`clean_error_factor`), so that one function serves all prediction types. The weights are
    divided by their mean over the distribution of timesteps: it is 1, and a choice of weights is no choice of a
    learning rate. Without weights, all squared errors of the prediction count alike.

    Args:
        weight: function (signal-to-noise ratios (T,)) -> weights (T,); None weighs nothing.
        distribution: function (levels (T+1,), shift) -> the probability that the position of a timestep in the
            schedule, from 0 (clean) to 1 (noise), is at most `level`. `shift` is what a flow adds to the logit of the
            position for the size of its samples. None is the uniform distribution.
        clip: the largest weight of a squared error of the prediction, before the division by the mean; None is none.
    """

    def __init__(
        self,
        weight: Callable[[Tensor], Tensor] | None = None,
        distribution: Callable[[Tensor, float], Tensor] | None = None,
        clip: float | None = None,
    ) -> None:
        if clip is not None and (weight is None or clip <= 0):
            reason = "there are no weights to clip; choose null" if weight is None else "choose more than 0, or null"
            raise ValueError(f"timesteps.clip={clip}: {reason}")
        self.weight, self.distribution, self.clip = weight, distribution, clip

    def check(self, backbone: NetworkBackbone) -> None:
        """Raise ValueError for a network that has no timesteps, and for weights that are not finite at one of them."""
        if self.weight is None and self.distribution is None:
            return
        if backbone.noise_scheduler is None:
            raise ValueError(
                f"timesteps: a {type(backbone.network).__name__} has no timesteps to draw or weigh; choose "
                "timesteps=uniform"
            )
        if self.weight is not None and not self.compute_weights(backbone).isfinite().all():
            raise ValueError(
                "timesteps.weight is not finite at every step of this schedule, which ends without signal while the "
                f"network predicts {prediction_type(backbone.noise_scheduler)!r}; choose timesteps=uniform, or for x0 "
                "and v a timesteps.clip"
            )

    def training_inputs(self, backbone: NetworkBackbone, batch: Batch) -> Batch:
        """Return `backbone.training_inputs` at timesteps of this distribution, with the samples' "weight" (N,)."""
        if self.distribution is not None:
            batch = batch | {"noise_step": self.draw(backbone, count_samples(batch))}
        inputs = backbone.training_inputs(batch)
        if self.weight is None:
            return inputs
        steps_N = find_steps(backbone.noise_scheduler, inputs["timestep"])
        return inputs | {"weight": self.compute_weights(backbone).float().to(steps_N.device)[steps_N]}

    def draw(self, backbone: NetworkBackbone, count: int) -> Tensor:
        """Return `count` steps of the schedule, (N,), from the global CPU generator."""
        cumulative_T = self.compute_probabilities(backbone).cumsum(0)
        values_N = torch.rand(count, dtype=torch.float64) * cumulative_T[-1]
        return torch.searchsorted(cumulative_T, values_N, right=True).clamp(max=len(cumulative_T) - 1)

    def compute_probabilities(self, backbone: NetworkBackbone) -> Tensor:
        """Return the probability of each step of the schedule, (T,), in float64."""
        schedule = backbone.noise_scheduler
        steps = schedule.config.num_train_timesteps
        if self.distribution is None:
            return torch.full((steps,), 1 / steps, dtype=torch.float64)
        edges = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        probabilities_T = self.distribution(edges, shift_for_size(backbone)).diff()
        return probabilities_T.flip(0) if prediction_type(schedule) == FLOW else probabilities_T

    def compute_weights(self, backbone: NetworkBackbone) -> Tensor:
        """Return the weight of a squared error of the prediction at each step of the schedule, (T,), in float64."""
        assert self.weight is not None
        schedule = backbone.noise_scheduler
        weights_T = self.weight(signal_to_noise(schedule)) * clean_error_factor(schedule)
        weights_T = weights_T if self.clip is None else weights_T.clamp(max=self.clip)
        return weights_T / (self.compute_probabilities(backbone) * weights_T).sum()


def find_steps(schedule: Any, timesteps_N: Tensor) -> Tensor:
    """Return the steps of the schedule, numbered from 0, of timesteps that a network takes, (N,)."""
    if prediction_type(schedule) != FLOW:
        return timesteps_N
    return (schedule.timesteps.to(timesteps_N) - timesteps_N[:, None]).abs().argmin(1)


def shift_for_size(backbone: Any) -> float:
    """Return what a flow adds to the logit of noise levels for the size of samples; 0 where its schedule has the shift.

    A level t becomes s t / (1 + (s - 1) t) with a shift of s (arXiv 2403.03206, section 5.3.2), so that its logit grows
    by log s.
    """
    mu = backbone.step_options(backbone.noise_scheduler, 1).get("mu")
    if mu is None:
        return 0.0
    return float(mu) if backbone.noise_scheduler.config.time_shift_type == "exponential" else math.log(mu)


# Distributions


def logit_normal(levels: Tensor, shift: float, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Return the probability that sigmoid(x) is at most each of `levels`, where x is normal with mean + shift and std.

    Stable Diffusion 3 (arXiv 2403.03206, section 3.1) draws the noise levels of a flow so, more in the middle than at
    the ends, and shifts them for the size of samples (section 5.3.2).
    """
    return torch.special.ndtr((levels.logit() - mean - shift) / std)


# Weights of the clean sample's squared error


def clean_sample(ratios: Tensor) -> Tensor:
    """Return 1: the loss is the squared error of the clean sample."""
    return torch.ones_like(ratios)


def velocity(ratios: Tensor) -> Tensor:
    """Return SNR + 1: the loss is the squared error of the velocity (Salimans & Ho 2022, arXiv 2202.00512, section 4).

    Of a flow it is the velocity of the process with the same signal-to-noise ratios that preserves the variance.
    """
    return ratios + 1


def min_snr(ratios: Tensor, gamma: float = 5.0) -> Tensor:
    """Return min(SNR, gamma): Min-SNR weighting (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    On the squared error of predicted noise it is min(SNR, gamma) / SNR, on that of a velocity min(SNR, gamma) /
    (SNR + 1).
    """
    return ratios.clamp(max=gamma)


def p2(ratios: Tensor, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """Return SNR / (k + SNR)^gamma: P2 weighting (Choi et al. 2022, arXiv 2204.00227, section 3).

    On the squared error of predicted noise it is 1 / (k + SNR)^gamma.
    """
    return ratios / (k + ratios) ** gamma
