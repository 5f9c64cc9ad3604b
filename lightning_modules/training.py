"""The Lightning Trainer of every stage: devices, precision, progress, checkpoints, and what to resume from."""

import contextlib
import csv
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, ProgressBar, WeightAveraging
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from tqdm import tqdm

HISTORY_FIELDS = ("step", "name", "value")

# Lightning's announcements, and deprecations that its and torchdata's users can do nothing about.
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
for message in (
    ".*set_vital.*",
    ".*isinstance.treespec, LeafSpec.*",
    ".*does not have many workers.*",
    ".*exists and is not empty.*",
    ".*in eval mode at the start of training.*",
):
    warnings.filterwarnings("ignore", message=message)


class CorruptCheckpoint(RuntimeError):
    """No checkpoint of a run that has some can be read."""


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
    callbacks = [StageBar(stage), *options.pop("callbacks", [])]
    return pl.Trainer(
        accelerator=device,
        devices=conf.devices,
        num_nodes=conf.num_nodes,
        strategy=conf.strategy,
        precision=precision_of(precision, device),  # type: ignore[arg-type]
        deterministic="warn",
        plugins=[AtomicCheckpoints()],
        callbacks=callbacks,
        logger=options.pop("logger", False),
        enable_model_summary=False,
        enable_checkpointing=options.pop("enable_checkpointing", False),
        use_distributed_sampler=False,  # the streams and the steps share the data out themselves
        **options,
    )


class StageBar(ProgressBar):
    """One bar a stage, named for what goes on, with the time that is left; it goes on where a resumed run goes on.

    Where nobody watches (a log file) it writes a line now and then instead of many a second.
    """

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage
        self.enabled = True

    def disable(self) -> None:
        self.enabled = False

    def open(self, total: float, done: int = 0) -> None:
        wait = 0.2 if sys.stderr.isatty() else 10.0
        self.bar = tqdm(
            desc=f"{self.stage:<20}",
            total=int(total),
            initial=done,
            disable=not self.enabled,
            mininterval=wait,
            maxinterval=wait,
            dynamic_ncols=True,
            leave=True,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.open(trainer.num_training_batches, trainer.fit_loop.epoch_loop.total_batch_idx + 1)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        told = ", ".join(f"{name}={float(value):.4g}" for name, value in trainer.progress_bar_metrics.items())
        self.bar.set_postfix_str(told, refresh=False)
        self.bar.update()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.close()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.open(sum(trainer.num_test_batches))

    def on_test_batch_end(self, *args: Any) -> None:
        self.bar.update()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there, so that it is complete or absent after a kill."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        partial = Path(path).with_suffix(".partial")
        super().save_checkpoint(checkpoint, partial, storage_options)
        os.replace(partial, path)


class WarmedUpEMA(WeightAveraging):
    """Exponential moving average of the weights that warms up: decay_k = min(decay, (1 + k) / (10 + k)).

    Without the warm-up a short run would evaluate its initial weights. Buffers (batch norm statistics) are copied.
    """

    def __init__(self, decay: float) -> None:
        def average(averaged: torch.Tensor, current: torch.Tensor, updates: torch.Tensor | int) -> torch.Tensor:
            if not averaged.is_floating_point():
                return current
            k = int(updates)
            return averaged.lerp(current, 1 - min(decay, (1 + k) / (10 + k)))

        super().__init__(use_buffers=False, avg_fn=average)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device  # the module itself is moved there only after this
        super().setup(trainer, pl_module, stage)


class History(Logger):
    """Appends every logged value to a CSV of (step, name, value); a resumed run forgets what it will log again."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        return "history"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with open(self.path, "a", newline="") as file:
            csv.writer(file).writerows([step, name, repr(float(value))] for name, value in sorted(metrics.items()))

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Keep what was logged before optimiser step `step`; a line cut off by a crash goes too."""
        rows = []
        if step and self.path.exists():
            with open(self.path, newline="") as file:
                rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit() and int(row[0]) < step]
        partial = self.path.with_suffix(".partial")
        with open(partial, "w", newline="") as file:
            csv.writer(file).writerows([HISTORY_FIELDS, *rows])
        os.replace(partial, self.path)


def newest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest checkpoint that can be read, and its step; None where there is none at all.

    One that cannot be read (cut off, empty) is named in a warning and passed over. Raises CorruptCheckpoint when
    there are some and none can be read.
    """
    found = sorted(folder.glob("step=*.ckpt"), reverse=True)
    for path in found:
        try:
            return path, int(torch.load(path, map_location="cpu", weights_only=True)["global_step"])
        except Exception as error:
            warnings.warn(
                f"checkpoint {path} cannot be read ({type(error).__name__}: {error}); trying the one before",
                stacklevel=2,
            )
    if found:
        raise CorruptCheckpoint(
            f"none of the checkpoints in {folder} can be read ({', '.join(path.name for path in found)}); "
            "delete them to start the training again"
        )
    return None


def fit(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    conf: Any,
    folder: Path,
    stage: str,
    loggers: Sequence[Logger] = (),
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train for `conf.steps` optimiser steps, resuming from `folder`/checkpoints when there is something to resume.

    A resumed run ends in the same bits as an undisturbed one on the same devices: batch order and noise are
    functions of (seed, position), and the loader's position is in the checkpoint.
    """
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    resume = newest_checkpoint(checkpoints)
    if resume is None and conf.resume == "required":
        raise ValueError(
            f"trainer.resume='required', but there is no checkpoint in {checkpoints}; choose trainer.resume=auto"
        )
    history = History(folder / "metrics.csv")
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
