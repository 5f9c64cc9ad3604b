"""The Lightning Trainer of every stage: devices, precision, progress, checkpoints, and what to resume from."""

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import Logger

from lightning_modules.training.checkpoints import AtomicCheckpoints, newest_checkpoint
from lightning_modules.training.history import History
from lightning_modules.training.progress import StageBar


def accelerator_of(name: str) -> str:
    """ "cuda" or "cpu" for `trainer.accelerator`; raises ValueError for a GPU that is not there."""
    if name == "gpu" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator='gpu', but no CUDA device is visible; choose trainer=cpu or trainer=auto")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def precision_of(name: str, device: str) -> str:
    """What a precision is on "cuda" or "cpu": `auto` is bf16 mixed precision on a GPU that has it, else float32."""
    if name != "auto":
        return name
    return "bf16-mixed" if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def autocast(name: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The precision of `make_trainer`, for what runs without a trainer."""
    kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    kind = kinds.get(precision_of(name, device.type))
    return contextlib.nullcontext() if kind is None else torch.autocast(device.type, kind)


def make_trainer(conf: Any, stage: str, precision: str, **options: Any) -> pl.Trainer:
    """A Trainer as `conf` (the trainer group) says, with one progress bar named after the stage."""
    device = accelerator_of(conf.accelerator)
    torch.backends.cuda.matmul.allow_tf32 = False  # scores and metrics on a GPU are to equal those on a CPU
    torch.backends.cudnn.allow_tf32 = False
    arguments: dict[str, Any] = {
        "accelerator": device,
        "devices": conf.devices,
        "num_nodes": conf.num_nodes,
        "strategy": conf.strategy,
        "precision": precision_of(precision, device),
        "deterministic": "warn",
        "plugins": [AtomicCheckpoints()],
        "callbacks": [StageBar(stage), *options.pop("callbacks", [])],
        "logger": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,  # the streams and the steps share the data out themselves
        **options,
    }
    check_options(conf.options, arguments)
    return pl.Trainer(**arguments, **conf.options)


TAKEN = (
    *("max_epochs", "max_steps", "limit_train_batches", "accumulate_grad_batches", "gradient_clip_val"),
    *("log_every_n_steps", "num_sanity_val_steps", "limit_val_batches", "default_root_dir"),
)
"""Arguments of Lightning's Trainer that fields of the configuration, or the pipeline, decide in some stage."""


def check_options(options: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for a key of `trainer.options` that Lightning's Trainer has not, or that is decided already."""
    valid = [name for name in inspect.signature(pl.Trainer).parameters if name not in (*arguments, *TAKEN)]
    for name in options:
        if name not in valid:
            reason = "is decided by another field, or by the pipeline" if name in (*arguments, *TAKEN) else "is unknown"
            raise ValueError(f"trainer.options.{name} {reason}; choose from: {', '.join(valid)}")


def fit(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    conf: Any,
    folder: Path,
    stage: str,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train for `conf.steps` optimiser steps, resuming from `folder`/checkpoints/<stage> where there is one.

    A resumed run ends in the same bits as an undisturbed one on the same devices: batch order and noise are
    functions of (seed, position), and the loader's position is in the checkpoint.
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
    trainer = make_trainer(
        conf,
        stage,
        conf.precision,
        callbacks=[saver, *callbacks],
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
    )
    if resume and resume[1] >= conf.steps:  # killed between the last step and what follows
        module.load_state_dict(torch.load(resume[0], map_location="cpu", weights_only=True)["state_dict"])
        return
    if resume:
        print(f"{stage}: resuming from step {resume[1]} of {conf.steps} ({resume[0].name})", flush=True)
    trainer.fit(module, datamodule=data, ckpt_path=resume[0] if resume else None, weights_only=True)
    if trainer.is_global_zero:  # Lightning forgets those from before a kill
        for old in sorted(checkpoints.glob("step=*.ckpt"))[:-2]:
            old.unlink()
