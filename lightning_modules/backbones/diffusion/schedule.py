"""Noise schedules: how a network's samples are noised, what it predicts, and which samplers fit.

This module alone decides what the scheduler beside a network means, from the scheduler's class and configuration. It
knows two kinds. A schedule of betas (DDPM, arXiv 2006.11239) noises a sample x with noise e to
sqrt(abar_t) x + sqrt(1 - abar_t) e, and the network predicts e, x or the velocity. A rectified flow (arXiv 2209.03003)
noises it to (1 - s) x + s e, and the network predicts e - x. Any other schedule is refused by name.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from lightning_modules.backbones.diffusion.pipeline_parts import hide_diffusers_warnings

FLOW = "flow_prediction"
"""the prediction type of a rectified flow"""
BETA_PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""the prediction types of a schedule of betas"""
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
"""diffusers' samplers of a rectified flow, and nothing else"""
EITHER_SCHEDULERS = (
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "SASolverScheduler"),
)
"""diffusers' samplers of a rectified flow where `use_flow_sigmas` is set, else of a schedule of betas"""
BETA_SCHEDULERS = (
    *("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"),
    *("LCMScheduler", "TCDScheduler"),
)
"""diffusers' samplers of a schedule of betas, and nothing else"""
FLOW_FIELDS = (
    *("num_train_timesteps", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len"),
    *("max_image_seq_len", "time_shift_type", "shift_terminal"),
)
"""fields of FlowMatchEulerDiscreteScheduler, besides `shift`, that belong to the flow and not to one sampler"""
LEVEL_FIELDS = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    "prediction_type",
)
"""fields that give the noise levels of a schedule of betas, and what the network predicts"""
LEARNED = ("learned", "learned_range")
"""values of `variance_type` under which the network predicts the variance of a sampling step"""
SAME_LEVEL = 1e-6
"""largest difference of abar_t between schedules that count as one; diffusers writes 2^-24 for a last abar of 0"""


def prediction_type(scheduler: Any) -> str:
    """Return what a network predicts under a scheduler: epsilon, v_prediction, sample or flow_prediction.

    Raises ValueError, naming the scheduler's class and prediction type and the supported ones, where the scheduler
    stands for another kind of schedule.
    """
    predicted = _known_prediction(scheduler)
    if predicted is None:
        raise _refusal(scheduler)
    return predicted


def training_schedule(scheduler: Any) -> Any:
    """Return the schedule a network was trained under, for a scheduler that samples from the network.

    It is a DDPMScheduler of the same noise levels and prediction type, or a FlowMatchEulerDiscreteScheduler of the same
    flow; `scheduler` itself, where it is of one of these classes. Raises ValueError as `prediction_type` does.
    """
    if prediction_type(scheduler) == FLOW:
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return scheduler
        config = scheduler.config
        fields = {key: config[key] for key in FLOW_FIELDS if key in config}
        return FlowMatchEulerDiscreteScheduler(shift=config.get("flow_shift", config.get("shift", 1.0)), **fields)
    if isinstance(scheduler, DDPMScheduler):
        return scheduler
    # Samples may be latents, which are not clipped; so they are clipped only where the configuration says so.
    clip = scheduler.config.get("clip_sample", False)
    try:
        schedule = DDPMScheduler.from_config(_portable_config(scheduler), clip_sample=clip)
    except NotImplementedError as error:
        raise _refusal(scheduler) from error
    if not _has_same_noise_levels(scheduler, schedule):
        raise _refusal(scheduler)
    return schedule


def load_schedule(folder: Path) -> Any:
    """Return the training schedule of the scheduler_config.json in a folder; raises ValueError as `prediction_type`."""
    config = json.loads((folder / "scheduler_config.json").read_text())
    name = config.get("_class_name", "DDPMScheduler")
    if name not in (*BETA_SCHEDULERS, *EITHER_SCHEDULERS, *FLOW_SCHEDULERS):
        raise _refusal_of(name, config)
    return training_schedule(getattr(diffusers, name).from_pretrained(folder))


def add_noise(schedule: Any, sample: Tensor, noise: Tensor, steps_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return noised samples, the timesteps that the network takes with them, and what it has to predict.

    `schedule` is a training schedule, `sample` and `noise` are (N,C,H,W), and `steps_N` numbers the noise levels of the
    schedule from 0. Timesteps are these numbers, or of a flow 1,000 times the noise level, (N,).
    """
    predicted = prediction_type(schedule)
    if predicted == FLOW:
        sigmas = schedule.sigmas.to(sample)[steps_N].view(-1, 1, 1, 1)
        noisy = (1 - sigmas) * sample + sigmas * noise
        return noisy, schedule.timesteps.to(sample)[steps_N], noise - sample
    target = sample
    if predicted == "epsilon":
        target = noise
    elif predicted == "v_prediction":
        target = schedule.get_velocity(sample, noise, steps_N)
    return schedule.add_noise(sample, noise, steps_N), steps_N, target


def split_output(schedule: Any, output: Tensor, noisy: Tensor, steps_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the clean sample and the noise that a prediction implies, both (N,C,H,W).

    They are x and e in noisy = sqrt(abar_t) x + sqrt(1 - abar_t) e.

    Args:
        schedule: a training schedule of betas.
        output: what the network predicts for the noised samples, (N,C,H,W): noise, velocity or clean samples.
        noisy: the noised samples, (N,C,H,W).
        steps_N: their steps of the schedule.
    """
    alpha, sigma = get_levels(schedule, noisy, steps_N)
    predicted = prediction_type(schedule)
    assert predicted in BETA_PREDICTIONS, "what needs a schedule of betas refuses flows"
    if predicted == "epsilon":
        return (noisy - sigma * output) / alpha, output
    if predicted == "v_prediction":
        return alpha * noisy - sigma * output, alpha * output + sigma * noisy
    return output, (noisy - alpha * output) / sigma


def take_ddim_step(schedule: Any, output: Tensor, noisy: Tensor, steps_N: Tensor, earlier_N: Tensor) -> Tensor:
    """Return noised samples of the steps `earlier_N` by one step of DDIM with eta = 0 (arXiv 2010.02502, equation 12).

    It is a step of a first-order solver of the probability flow ODE (section 4.3 there). Nothing is clipped. The other
    arguments are those of `split_output`.
    """
    clean, noise = split_output(schedule, output, noisy, steps_N)
    alpha, sigma = get_levels(schedule, noisy, earlier_N)
    return alpha * clean + sigma * noise


def get_levels(schedule: Any, sample: Tensor, steps_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(abar_t) and sqrt(1 - abar_t) at steps of a schedule of betas, (N,1,1,1), like `sample`."""
    abar = schedule.alphas_cumprod.to(sample)[steps_N].view(-1, 1, 1, 1)
    return abar.sqrt(), (1 - abar).sqrt()


def signal_to_noise(schedule: Any) -> Tensor:
    """Return the ratio of the variances of signal and noise at each step of a training schedule, (T,), in float64."""
    if prediction_type(schedule) == FLOW:
        sigmas_T = schedule.sigmas[: schedule.config.num_train_timesteps].double()
        return ((1 - sigmas_T) / sigmas_T).square()
    abar_T = schedule.alphas_cumprod.double()
    return abar_T / (1 - abar_T)


def clean_error_factor(schedule: Any) -> Tensor:
    """Return the squared error of the clean sample for each one of the network's prediction, (T,), in float64.

    At every step the noised sample is known, so that an error of the prediction is one of the clean sample that it
    implies: of noise, the error times 1 / SNR, of a velocity times 1 / (SNR + 1) (Salimans & Ho 2022, arXiv
    2202.00512, section 4), of a flow times sigma^2.
    """
    predicted = prediction_type(schedule)
    if predicted == FLOW:
        return schedule.sigmas[: schedule.config.num_train_timesteps].double().square()
    abar_T = schedule.alphas_cumprod.double()
    factors = {"epsilon": (1 - abar_T) / abar_T, "v_prediction": 1 - abar_T, "sample": torch.ones_like(abar_T)}
    return factors[predicted]


def make_sampler(sampler: Callable[..., Any], schedule: Any) -> Any:
    """Return the diffusers scheduler that `sampler` makes from the configuration of a training schedule.

    For a flow the configuration also has the fields by which samplers of both kinds know one, so that
    `sampler=dpm_solver` fits either. Under a learned `variance_type` some samplers of diffusers cut the network's
    output to three channels, for pictures with a variance beside the prediction; those get the prediction alone.
    """
    config = _portable_config(schedule)
    if prediction_type(schedule) == FLOW:
        config |= {"use_flow_sigmas": True, "prediction_type": FLOW, "flow_shift": schedule.config.shift}
    with hide_diffusers_warnings():  # diffusers warns of fields that one of its classes does not have
        scheduler = sampler(config)
    if scheduler.config.get("variance_type") in LEARNED and not takes_variance(scheduler):
        scheduler.register_to_config(variance_type=None)
    return scheduler


def check_sampler(sampler: Any, schedule: Any, predicts_variance: bool) -> None:
    """Raise ValueError where a sampler would draw wrong samples from a network trained under a schedule.

    `predicts_variance` is whether the network gives a variance beside its prediction.
    """
    name, expected = type(sampler).__name__, prediction_type(schedule)
    if _known_prediction(sampler) != expected:
        raise ValueError(
            f"{name} cannot sample from this teacher, which predicts {expected!r}; choose sampler="
            f"{'flow_euler or dpm_solver' if expected == FLOW else 'dpm_solver, ddim, ddpm or euler'}"
        )
    if expected == FLOW:
        if sampler.config.get("use_dynamic_shifting") and not takes_argument(sampler.set_timesteps, "mu"):
            raise ValueError(
                f"{name} cannot shift its steps by the size of samples, as this teacher's schedule wants "
                "(use_dynamic_shifting=True); choose sampler=flow_euler"
            )
        return
    if not _has_same_noise_levels(sampler, schedule):
        zero = bool(schedule.config.get("rescale_betas_zero_snr"))
        raise ValueError(
            f"{name} has other noise levels than this teacher's schedule"
            + (
                ", because it ignores rescale_betas_zero_snr=True (a terminal signal-to-noise ratio of 0)"
                if zero
                else ""
            )
            + "; choose sampler=dpm_solver, ddim, ddpm or euler"
        )
    if takes_variance(sampler) and not predicts_variance:
        raise ValueError(
            f"{name} has variance_type={sampler.config.variance_type!r}, but this teacher predicts no variance; choose "
            "sampler=ddim, or +sampler.scheduler.variance_type=fixed_small"
        )


def takes_variance(sampler: Any) -> bool:
    """Return whether a sampler takes a predicted variance beside the network's prediction."""
    is_ancestral = _is_one_of(sampler, ("DDPMScheduler", "DDPMParallelScheduler"))
    return is_ancestral and sampler.config.variance_type in LEARNED


def takes_argument(function: Any, name: str) -> bool:
    """Return whether a function has a parameter of this name."""
    return name in inspect.signature(function).parameters


def _known_prediction(scheduler: Any) -> str | None:
    """Return what a network predicts under a scheduler, or None where the scheduler is not supported."""
    config = scheduler.config
    only_flow, either = _is_one_of(scheduler, FLOW_SCHEDULERS), _is_one_of(scheduler, EITHER_SCHEDULERS)
    predicted: str = config.get("prediction_type", FLOW if only_flow else "epsilon")
    if only_flow or (either and config.get("use_flow_sigmas")):
        return FLOW if predicted == FLOW and not config.get("invert_sigmas") else None
    if not (either or _is_one_of(scheduler, BETA_SCHEDULERS)) or predicted not in BETA_PREDICTIONS:
        return None
    # Under "continuous" the network takes log(sigma) / 4 as its timestep, as in EDM (arXiv 2206.00364, table 1).
    return None if config.get("timestep_type") == "continuous" else predicted


def _portable_config(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's configuration, from which another class makes the same noise levels.

    diffusers notes which fields were left at their defaults, and another class then takes its own defaults for them.
    """
    config = dict(scheduler.config)
    defaults = config.get("_use_default_values", ())
    return config | {"_use_default_values": [field for field in defaults if field not in LEVEL_FIELDS]}


def _is_one_of(scheduler: Any, names: tuple[str, ...]) -> bool:
    """Return whether a scheduler's class or one of its base classes has one of these names."""
    return any(cls.__name__ in names for cls in type(scheduler).__mro__)


def _has_same_noise_levels(scheduler: Any, schedule: Any) -> bool:
    """Return whether two schedules of betas have the same abar_t at every step."""
    levels, expected = scheduler.alphas_cumprod, schedule.alphas_cumprod
    return levels.shape == expected.shape and torch.allclose(levels.to(expected), expected, rtol=0, atol=SAME_LEVEL)


def _refusal(scheduler: Any) -> ValueError:
    return _refusal_of(type(scheduler).__name__, scheduler.config)


def _refusal_of(name: str, config: Any) -> ValueError:
    fields = ("prediction_type", "use_flow_sigmas", "timestep_type", "beta_schedule", "invert_sigmas")
    values = ", ".join(f"{key}={config[key]!r}" for key in fields if config.get(key) not in (None, False))
    return ValueError(
        f"the noise schedule {name} ({values or 'no prediction_type'}) is not supported: scores and losses would be "
        "computed on wrongly noised samples. Supported are schedules of betas with timesteps 0, 1, ... and "
        f"prediction_type {', '.join(BETA_PREDICTIONS)} ({', '.join(BETA_SCHEDULERS + EITHER_SCHEDULERS)}), and "
        f"rectified flows ({', '.join(FLOW_SCHEDULERS)}; or, with use_flow_sigmas=True and prediction_type={FLOW}, "
        f"{', '.join(EITHER_SCHEDULERS)})"
    )
