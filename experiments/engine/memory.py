"""Whether a training fits the memory of its device: a check before it, and advice where it did not fit."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig

from conf.schema import ConfigError
from datamodules.base import DataModule
from experiments.engine.clock import explain_out_of_memory, take_first_line
from experiments.engine.ranks import is_rank_zero
from lightning_modules.modules.base import TrainedModule
from lightning_modules.training.memory import (
    MemoryEstimate,
    TrainingSettings,
    copy_to_meta,
    estimate_held_memory,
    estimate_memory,
    list_encoders,
)
from lightning_modules.training.trainer import resolve_precision

log = logging.getLogger(__name__)

MARGIN = 0.15
"""By what share of the free memory an estimate may exceed it before a training is refused"""

Option = tuple[str, Mapping[str, Any]]
"""Overrides of the configuration that save memory, and the fields of TrainingSettings that they change"""


@contextlib.contextmanager
def guard_memory(
    cfg: DictConfig, module: Any, stage: str, device: torch.device, data: DataModule, note: str = ""
) -> Iterator[None]:
    """Check that a training fits the memory of a device, and explain where it runs out of memory all the same.

    On a CPU nothing is refused, and of several ranks the first one checks for all. A module that is no TrainedModule is
    not estimated, nor is one that does not run on the meta device.

    Args:
        cfg: the configuration of the stage.
        module: the module that is trained in the context.
        stage: name of the stage.
        device: the device of the training.
        data: the data of the training.
        note: follows the advice.

    Raises:
        ConfigError: before the training, where the estimate is more than what is free by more than MARGIN.
        OutOfMemory: where the training runs out of memory. Both messages name what would save memory, and how much is
            needed then.
    """
    if not isinstance(module, TrainedModule):
        yield
        return
    try:
        module = copy_to_meta(module)  # as it is now: a training leaves weights and batches on the device
        settings = describe_training(cfg, module, device.type)
        held = estimate_held_memory(module, settings)
    except Exception as error:  # a module or an optimiser of one's own may read the values of tensors
        log.warning("%s: the memory of a %s cannot be estimated: %s", stage, type(module).__name__, error)
        yield
        return
    if device.type != "cuda":
        log.info("%s: %s besides activations; on a CPU, nothing is refused", stage, describe_estimate(held))
    elif is_rank_zero():  # the current device of a rank that Lightning has started is not yet its own
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        check_fits(cfg, module, stage, settings, data.sample_shape(), free, note)

    def explain(error: BaseException) -> str:
        advice = advise(cfg, module, settings, data.sample_shape())
        return f"out of memory in stage {stage!r} ({take_first_line(error)}). {advice}{note}"

    with explain_out_of_memory(explain):
        yield


def check_fits(
    cfg: DictConfig,
    module: TrainedModule,
    stage: str,
    settings: TrainingSettings,
    sample_shape: tuple[int, ...],
    free: int,
    note: str = "",
) -> None:
    """Log what a training needs, and raise ConfigError where that is more than the `free` bytes and MARGIN allow."""
    estimate = try_to_estimate(module, settings, sample_shape)
    if estimate is None:
        return
    log.info("%s: %s; free are %s", stage, describe_estimate(estimate), format_gib(free))
    if estimate.total > free * (1 + MARGIN):
        raise ConfigError(
            f"{stage}: {describe_estimate(estimate)}, but free on the device are {format_gib(free)}. "
            f"{advise(cfg, module, settings, sample_shape)}{note}"
        )


def describe_training(cfg: DictConfig, module: TrainedModule, device: str) -> TrainingSettings:
    """Return what the memory of a training depends on; `device` is cuda or cpu."""
    trainer = cfg.trainer
    world = trainer.devices * trainer.num_nodes
    return TrainingSettings(
        batch_size=max(1, cfg.data.batch_size // world),
        precision=resolve_precision(trainer.precision, device),
        checkpoint_activations=trainer.checkpoint_activations,
        averages=cfg.ema_decay is not None,
        copies_gradients=world > 1 and trainer.strategy != "fsdp",
        encodes=cfg.latents is None and bool(list_encoders(module)),
        shards=world if trainer.strategy == "fsdp" else 1,
    )


def list_options(cfg: DictConfig, settings: TrainingSettings) -> list[Option]:
    """Return what would save memory, by itself, and as the last entry all of it together where there is more."""
    world, accumulated = cfg.trainer.devices * cfg.trainer.num_nodes, cfg.trainer.accumulate_grad_batches
    options: list[Option] = []
    divisors = [n for n in range(2, settings.batch_size + 1) if settings.batch_size % n == 0]
    if divisors:
        parts = divisors[0]
        smaller = settings.batch_size // parts
        text = f"data.batch_size={smaller * world} trainer.accumulate_grad_batches={accumulated * parts}"
        options.append((text, {"batch_size": smaller}))
    if settings.precision == "32-true":
        options.append(("trainer.precision=bf16-mixed", {"precision": "bf16-mixed"}))
    if settings.averages:
        options.append(("ema_decay=null", {"averages": False}))
    if settings.encodes:
        options.append(("latents=FOLDER (python -m experiments.precompute)", {"encodes": False}))
    if settings.copies_gradients and settings.precision != "16-mixed" and not cfg.trainer.compile:
        options.append(("trainer=fsdp", {"copies_gradients": False, "shards": world}))
    if settings.checkpoint_activations == "none":
        options.append(("trainer.checkpoint_activations=blocks", {"checkpoint_activations": "blocks"}))
    if len(options) > 1:
        changes = {key: value for _, change in options for key, value in change.items()}
        options.append((" ".join(text for text, _ in options), changes))
    return options


def advise(cfg: DictConfig, module: TrainedModule, settings: TrainingSettings, sample_shape: tuple[int, ...]) -> str:
    """Return what would save memory, with the estimate of each option, the least memory first."""
    log.info("estimating the memory of other settings")
    estimates = []
    for text, changes in list_options(cfg, settings):
        estimate = try_to_estimate(module, replace(settings, **changes), sample_shape)
        if estimate is not None:
            estimates.append((estimate.total, f"\n  {format_gib(estimate.total)}: {text}"))
    now = try_to_estimate(module, settings, sample_shape)
    if now is None or not estimates:
        return "Choose a smaller data.batch_size, or a network with fewer parameters"
    lines = "".join(text for total, text in sorted(estimates) if total < now.total)
    others = f"; with others:{lines}" if lines else "; no other setting needs less"
    return f"Estimated memory with these settings: {format_gib(now.total)}{others}"


def try_to_estimate(
    module: TrainedModule, settings: TrainingSettings, sample_shape: tuple[int, ...]
) -> MemoryEstimate | None:
    """Return the memory of a training; None, with a warning, for a module that cannot run on the meta device."""
    try:
        return estimate_memory(module, settings, sample_shape)
    except Exception as error:  # a module of one's own may read the values of tensors
        log.warning("the memory of a %s cannot be estimated: %s", type(module).__name__, error)
        return None


def describe_estimate(estimate: MemoryEstimate) -> str:
    """Return what is needed and for what, in words."""
    parts = ", ".join(f"{name} {format_gib(size)}" for name, size in vars(estimate).items() if size)
    return f"about {format_gib(estimate.total)} of memory are needed ({parts})"


def format_gib(size: int) -> str:
    """Return a number of bytes in GiB, with three digits after the point below 1 GiB."""
    return f"{size / 2**30:.{1 if size >= 2**30 else 3}f} GiB"
