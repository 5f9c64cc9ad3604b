"""Handling of SIGTERM, which schedulers and `kill` send: a job ends with a checkpoint, and no rank hangs."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.utilities import rank_zero_only

from lightning_modules.training.ranks import world_size

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
"""The exit code of a process that ends because of SIGTERM, by the convention of shells."""


LAUNCHERS: list[Any] = []
"""Lightning's launchers that have started ranks from this process. The first Trainer starts them for all later ones."""


class EndOnSigterm(Callback):
    """Ends the process on SIGTERM, also in the middle of a batch.

    It replaces Lightning's handler, which communicates with the other ranks inside the signal handler. If these are in
    another communication at that moment, all ranks hang.
    """

    def __init__(self) -> None:
        self.previous_handler = signal.getsignal(signal.SIGTERM)
        self.received = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.install(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.install(trainer)

    def install(self, trainer: pl.Trainer) -> None:
        """Install the handler. `setup` would be too early: Lightning installs its own after that.

        Lightning restores the handlers of before when its loop has ended.
        """
        launcher = trainer.strategy.launcher
        if getattr(launcher, "procs", None) and launcher not in LAUNCHERS:
            LAUNCHERS.append(launcher)
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            signal.signal(signal.SIGTERM, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Forward the first signal to the ranks that this process has started, then act on it."""
        if not self.received:
            for launcher in LAUNCHERS:
                launcher.kill(number)
        self.received = True
        self.act(number, frame)

    def act(self, number: int, frame: FrameType | None) -> None:
        """End the process, on rank 0 through the handler that was installed before, if there was one.

        Other ranks exit with code 0: with an error code Lightning would kill rank 0, which still has to close logs and
        dashboards.
        """
        if getattr(rank_zero_only, "rank", 0):
            raise SystemExit(0)
        if callable(self.previous_handler):
            self.previous_handler(number, frame)
        raise SystemExit(SIGTERM_EXIT_CODE)


class CheckpointOnSigterm(EndOnSigterm, Checkpoint):
    """Ends a training on SIGTERM, on all ranks: after the current optimiser step, with a checkpoint.

    It is enough that one rank receives the signal. `stopped` becomes true if the training ends for that reason. A
    signal before training starts ends the process immediately.

    Args:
        folder: folder of the checkpoints.
        checkpoint_every: optimiser steps between regular checkpoints.
    """

    def __init__(self, folder: Path, checkpoint_every: int) -> None:
        super().__init__()
        self.folder, self.checkpoint_every = folder, checkpoint_every
        self.is_training, self.stopped = False, False

    def act(self, number: int, frame: FrameType | None) -> None:
        if not self.is_training:
            super().act(number, frame)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.is_training, self.step = True, trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:  # gradients are still being accumulated
            return
        self.step = trainer.global_step
        if self.stopped or not is_true_on_any_rank(self.received, trainer.strategy.root_device):
            return
        self.stopped = trainer.should_stop = True
        if trainer.global_step % self.checkpoint_every:
            trainer.save_checkpoint(self.folder / f"step={trainer.global_step:07d}.ckpt")


def is_true_on_any_rank(value: bool, device: torch.device) -> bool:
    """Return whether a value is true on at least one rank; all ranks have to call it."""
    if world_size() == 1:
        return value
    flag = torch.tensor(int(value), device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)
