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
from lightning_modules.training.checkpoints import (
    AtomicCheckpoints,
    newest_checkpoint,
    remove_partial_checkpoints,
)
from lightning_modules.training.history import History
from lightning_modules.training.progress import StageBar
from lightning_modules.training.sigterm import SIGTERM_EXIT_CODE, CheckpointOnSigterm, EndOnSigterm


def accelerator_of(name: str) -> str:
    """Return "cuda" or "cpu" for a `trainer.accelerator`; raises ValueError where it is gpu and none is visible."""
    if name == "gpu" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator='gpu', but no CUDA device is visible; choose trainer=cpu or trainer=auto")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def precision_of(name: str, device: str) -> str:
    """Return the precision that `name` means on "cuda" or "cpu".

    `auto` is bf16 mixed precision on a GPU that computes in it, else float32.
    """
    if name != "auto":
        return name
    return "bf16-mixed" if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def autocast(name: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context with the precision of `make_trainer`, for computations without a Trainer."""
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    dtype = dtypes.get(precision_of(name, device.type))
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def make_trainer(conf: Any, stage: str, precision: str, **arguments: Any) -> pl.Trainer:
    """Return a Trainer on the devices of `conf` (the trainer group), with one progress bar named after the stage.

    `arguments` are further ones of Lightning's Trainer. `conf.options` has no effect here, only in `fit`.
    """
    device = accelerator_of(conf.accelerator)
    torch.backends.cuda.matmul.allow_tf32 = False  # scores and metrics on a GPU are to equal those on a CPU
    torch.backends.cudnn.allow_tf32 = False
    callbacks = [StageBar(stage), EndOnSigterm(), *arguments.pop("callbacks", [])]
    return pl.Trainer(
        accelerator=device,
        devices=conf.devices,
        num_nodes=conf.num_nodes,
        strategy=conf.strategy,
        precision=precision_of(precision, device),  # type: ignore[arg-type]
        deterministic="warn",
        plugins=[AtomicCheckpoints()],
        callbacks=callbacks,
        logger=arguments.pop("logger", False),
        enable_model_summary=False,
        enable_checkpointing=arguments.pop("enable_checkpointing", False),
        use_distributed_sampler=False,  # the streams and the steps share the data out themselves
        **arguments,
    )


def make_callbacks(nodes: DictConfig) -> list[Callback]:
    """Return the callbacks of the group `callbacks`; raises ConfigError naming one that cannot be made."""
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


def fit(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    conf: Any,
    folder: Path,
    stage: str,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train a module for `conf.steps` optimiser steps, resuming from the newest checkpoint where there is one.

    A resumed run ends in the same bits as an undisturbed one on the same devices: batch order and noise are
    functions of (seed, position), and the loader's position is in the checkpoint. On SIGTERM the step is taken to its
    end, a checkpoint is written, and SystemExit raised.

    Args:
        module: the module; it holds the trained weights (their moving average, with that callback) afterwards.
        data: gives the training batches, endlessly.
        conf: the group `trainer`.
        folder: the run's folder; checkpoints go to checkpoints/<stage>, logged values to history/<stage>.csv.
        stage: name of the stage, also of the progress bar.
        loggers: further loggers.
        callbacks: further callbacks.
    """
    checkpoints = folder / "checkpoints" / stage
    checkpoints.mkdir(parents=True, exist_ok=True)
    resume = newest_checkpoint(checkpoints)
    if resume is None and conf.resume == "required":
        raise ValueError(
            f"trainer.resume='required', but there is no checkpoint in {checkpoints}; choose trainer.resume=auto"
        )
    history = History(folder / "history" / f"{stage}.csv")
    history.rewind(resume[1] if resume else 0)
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
    trainer = make_trainer(
        conf,
        stage,
        conf.precision,
        callbacks=[saver, stopper, *callbacks],
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
        **build(conf.options),
    )
    if trainer.world_size > 1 and any(isinstance(part, _BatchNorm) for part in module.modules()):
        warnings.warn(
            f"{stage}: batch norms take the statistics of each rank's own samples, so that the result depends on "
            "trainer.devices",
            stacklevel=2,
        )
    if trainer.is_global_zero:
        remove_partial_checkpoints(checkpoints)
    if resume and resume[1] >= conf.steps:  # killed between the last step and what follows
        module.load_state_dict(torch.load(resume[0], map_location="cpu", weights_only=True)["state_dict"])
        return
    if resume:
        print(f"{stage}: resuming from step {resume[1]} of {conf.steps} ({resume[0].name})", flush=True)
    trainer.fit(module, datamodule=data, ckpt_path=resume[0] if resume else None, weights_only=True)
    if trainer.is_global_zero:  # a resumed Trainer does not know the earlier process's checkpoints
        for old in sorted(checkpoints.glob("step=*.ckpt"))[:-2]:
            old.unlink()
    if stopper.received or stopper.stopped:
        if not trainer.is_global_zero:
            # Lightning kills rank 0, which still closes logs and dashboards, where a rank that it has started ends with
            # an error.
            raise SystemExit(0)
        print(f"{stage}: stopped by SIGTERM after step {trainer.global_step}; the same command goes on from there")
        raise SystemExit(SIGTERM_EXIT_CODE)
