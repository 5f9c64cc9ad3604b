"""The Lightning Trainer of every stage: devices, precision, progress, checkpoints and resuming."""

import contextlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import Logger
from torch.nn.modules.batchnorm import _BatchNorm

from conf.schema import ConfigError, build
from lightning_modules.backbones.rounding import AUTOCAST_DTYPES
from lightning_modules.modules.base import TrainedModule
from lightning_modules.training.checkpoints import (
    AtomicCheckpoints,
    find_newest_checkpoint,
    remove_partial_checkpoints,
)
from lightning_modules.training.history import History
from lightning_modules.training.monitor import TrainingMonitor
from lightning_modules.training.parts import compute_in_parts
from lightning_modules.training.progress import StageBar
from lightning_modules.training.sharding import FullySharded
from lightning_modules.training.sigterm import (
    SIGTERM_EXIT_CODE,
    CheckpointOnSigterm,
    EndOnSigterm,
    is_true_on_any_rank,
)

SHARDED = "fsdp"
"""The value of `trainer.strategy` with which networks are distributed over the ranks while they are trained."""


def resolve_accelerator(name: str) -> str:
    """Return "cuda" or "cpu" for `trainer.accelerator`; raise ValueError if it is "gpu" and no GPU is visible."""
    if name == "gpu" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator='gpu', but no CUDA device is visible; choose trainer=cpu or trainer=auto")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def resolve_precision(name: str, device: str) -> str:
    """Return Lightning's name of a precision on "cuda" or "cpu".

    `auto` is bf16 mixed precision on a GPU that supports it in hardware, else float32.
    """
    if name != "auto":
        return name
    return "bf16-mixed" if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def autocast(name: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context that computes in the precision that `make_trainer` would use, for code without a Trainer."""
    dtype = AUTOCAST_DTYPES.get(resolve_precision(name, device.type))
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def make_trainer(conf: Any, stage: str, precision: str, deterministic: bool = True, **arguments: Any) -> pl.Trainer:
    """Return a Trainer on the devices of `conf` (the trainer group), with one progress bar named after the stage.

    `arguments` are further arguments of Lightning's Trainer. The fields of `conf` that choose how fast and with how
    much memory networks are trained, and `conf.options`, have an effect in `fit` only. Networks are sharded in `fit`
    only, too; otherwise every rank has all of them.
    """
    device = resolve_accelerator(conf.accelerator)
    torch.backends.cuda.matmul.allow_tf32 = False  # so that scores and metrics on a GPU equal those on a CPU
    torch.backends.cudnn.allow_tf32 = False
    # No operation here reads memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    callbacks = [StageBar(stage), EndOnSigterm(), *arguments.pop("callbacks", [])]
    return pl.Trainer(
        accelerator=device,
        devices=conf.devices,
        num_nodes=conf.num_nodes,
        strategy=arguments.pop("strategy", "ddp" if conf.strategy == SHARDED else conf.strategy),
        precision=resolve_precision(precision, device),  # type: ignore[arg-type]
        deterministic="warn" if deterministic else False,
        benchmark=not deterministic,
        plugins=[AtomicCheckpoints()],
        callbacks=callbacks,
        logger=arguments.pop("logger", False),
        enable_model_summary=False,
        enable_checkpointing=arguments.pop("enable_checkpointing", False),
        use_distributed_sampler=False,  # the data modules and test steps give each rank its samples
        **arguments,
    )


def make_callbacks(nodes: DictConfig) -> list[Callback]:
    """Return the callbacks of the group `callbacks`; raise ConfigError, which names it, if one cannot be made."""
    callbacks: list[Callback] = []
    for name, node in dict(nodes).items():
        try:
            callback = build(node)
        except Exception as error:
            raise ConfigError(f"callbacks.{name!s} cannot be made: {error.__cause__ or error}") from error
        if not isinstance(callback, Callback):
            raise ConfigError(f"callbacks.{name!s}._target_={node._target_!r} makes no Callback of Lightning")
        callbacks.append(callback)
    return callbacks


def warn_without_networks(module: pl.LightningModule, stage: str) -> None:
    """Warn that fields of speed and memory have no effect on a module that does not say which networks it runs."""
    if not isinstance(module, TrainedModule) or not module.networks():
        warnings.warn(
            f"{stage}: trainer.compile and trainer.checkpoint_activations have no effect, as {type(module).__name__} "
            "lists no networks (TrainedModule.networks)",
            stacklevel=3,
        )


def fit(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    conf: Any,
    folder: Path,
    stage: str,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[Callback] = (),
    section: str = "train",
) -> None:
    """Train a module for `conf.steps` optimiser steps, from the newest checkpoint if there is one.

    A resumed run ends with the same bits as an uninterrupted one on the same devices: the order of batches and the
    noise are functions of (seed, position), and the loader's position is in the checkpoint. With `conf.compile`, or
    without `conf.deterministic`, it may differ by rounding. On SIGTERM the current step
    is completed, a checkpoint is written, and SystemExit is raised. Raises ValueError for trainer.resume=required
    without a checkpoint, and CorruptCheckpoint if none of the checkpoints can be read.

    Args:
        module: the module; afterwards it holds the trained weights, or their moving average with that callback.
        data: data module whose training loader never ends.
        conf: the group `trainer`.
        folder: the run's folder; checkpoints go to checkpoints/<stage>, logged values to history/<stage>.csv.
        stage: name of the stage, also shown by the progress bar.
        loggers: loggers in addition to the CSV file.
        callbacks: callbacks in addition to those for checkpoints, progress, SIGTERM and what is logged.
        section: the first part of the names of the logged values.
    """
    checkpoints = folder / "checkpoints" / stage
    checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint, steps_taken = find_newest_checkpoint(checkpoints) or (None, 0)
    if checkpoint is None and conf.resume == "required":
        raise ValueError(
            f"trainer.resume='required', but there is no checkpoint in {checkpoints}; choose trainer.resume=auto"
        )
    history = History(folder / "history" / f"{stage}.csv")
    history.rewind(steps_taken)
    saver = ModelCheckpoint(
        dirpath=checkpoints,
        filename="{step:07d}",
        monitor="step",
        mode="max",
        save_top_k=2,
        every_n_train_steps=conf.checkpoint_every,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )
    stopper = CheckpointOnSigterm(checkpoints, conf.checkpoint_every)
    sharded = FullySharded(module) if conf.strategy == SHARDED else None
    trainer = make_trainer(
        conf,
        stage,
        conf.precision,
        conf.deterministic,
        callbacks=[saver, stopper, TrainingMonitor(section), *callbacks],
        logger=[history, *loggers],
        enable_checkpointing=True,
        max_epochs=1,
        max_steps=conf.steps,
        limit_train_batches=conf.steps * conf.accumulate_grad_batches,
        accumulate_grad_batches=conf.accumulate_grad_batches,
        gradient_clip_val=conf.gradient_clip_val,
        log_every_n_steps=conf.log_every_n_steps,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        strategy=sharded or conf.strategy,
        **build(conf.options),
    )
    if trainer.world_size > 1 and any(isinstance(part, _BatchNorm) for part in module.modules()):
        warnings.warn(
            f"{stage}: batch norms use the statistics of each rank's own samples, so the result depends on "
            "trainer.devices",
            stacklevel=2,
        )
    if trainer.is_global_zero:
        remove_partial_checkpoints(checkpoints)
    if (
        checkpoint and steps_taken >= conf.steps
    ):  # the process was killed after the last step, before the result was saved
        module.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])
        return
    if checkpoint:
        print(f"{stage}: resuming from step {steps_taken} of {conf.steps} ({checkpoint.name})", flush=True)
    trained = sharded.make_trained_copy() if sharded else module
    in_parts: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if conf.compile or conf.checkpoint_activations != "none":
        warn_without_networks(trained, stage)
    if isinstance(trained, TrainedModule):
        trained.prepare(str(trainer.precision))
        in_parts = compute_in_parts(trained, conf.compile, conf.checkpoint_activations)
    if sharded:
        sharded.separate(trained)
    with in_parts:
        trainer.fit(trained, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if trainer.is_global_zero:  # a resumed Trainer does not know the checkpoints of earlier processes
        for old in sorted(checkpoints.glob("step=*.ckpt"))[:-2]:
            old.unlink()
    # A signal after the last step may have reached one rank alone.
    if is_true_on_any_rank(stopper.received or stopper.stopped, trainer.strategy.root_device):
        if not trainer.is_global_zero:
            # If a rank that Lightning has started ended with an error, Lightning would kill rank 0, which still has to
            # close logs and dashboards.
            raise SystemExit(0)
        print(f"{stage}: stopped by SIGTERM after step {trainer.global_step}; the same command goes on from there")
        raise SystemExit(SIGTERM_EXIT_CODE)
