"""The end of a job on SIGTERM, which schedulers and `kill` send: without a hanging rank, and with a checkpoint."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
"""The exit code of a process that ends on SIGTERM, as shells count it."""


LAUNCHERS: list[Any] = []
"""Lightning's launchers that have started ranks from this process: that of the first Trainer, for all later ones."""


class EndOnSigterm(Callback):
    """Ends the process on SIGTERM, also in the middle of a batch.

    It replaces Lightning's handler, which waits for the other ranks inside the signal handler: where these wait for
    something else at that moment, all ranks hang.
    """

    def __init__(self) -> None:
        self.previous_handler = signal.getsignal(signal.SIGTERM)
        self.received = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.install(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.install(trainer)

    def install(self, trainer: pl.Trainer) -> None:
        """Replace the handler; Lightning installs its own after `setup`, and removes all when the loop has ended."""
        launcher = trainer.strategy.launcher
        if getattr(launcher, "procs", None) and launcher not in LAUNCHERS:
            LAUNCHERS.append(launcher)
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            signal.signal(signal.SIGTERM, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Pass the signal on to ranks that this process has started, once, and act on it."""
        if not self.received:
            for launcher in LAUNCHERS:
                launcher.kill(number)
        self.received = True
        self.act(number, frame)

    def act(self, number: int, frame: FrameType | None) -> None:
        if callable(self.previous_handler):
            self.previous_handler(number, frame)
        raise SystemExit(SIGTERM_EXIT_CODE)


class CheckpointOnSigterm(EndOnSigterm, Checkpoint):
    """Ends a training on SIGTERM at the end of the optimiser step, with a checkpoint of it, on all ranks.

    It is enough that one rank receives the signal. `stopped` is true where the training has ended for that reason. A
    signal before the first step ends the process at once.

    Args:
        folder: folder of the checkpoints.
        checkpoint_every: optimiser steps between the checkpoints that are written anyway.
    """

    def __init__(self, folder: Path, checkpoint_every: int) -> None:
        super().__init__()
        self.folder, self.checkpoint_every = folder, checkpoint_every
        self.trains, self.stopped = False, False

    def act(self, number: int, frame: FrameType | None) -> None:
        if not self.trains:
            super().act(number, frame)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.trains, self.step = True, trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:  # a micro-batch that takes no optimiser step
            return
        self.step = trainer.global_step
        if self.stopped or not is_true_on_any_rank(self.received, trainer.strategy.root_device):
            return
        self.stopped = trainer.should_stop = True
        if trainer.global_step % self.checkpoint_every:
            trainer.save_checkpoint(self.folder / f"step={trainer.global_step:07d}.ckpt")


def is_true_on_any_rank(value: bool, device: torch.device) -> bool:
    """Return whether a value is true on at least one rank; all ranks have to call it."""
    if not torch.distributed.is_initialized():
        return value
    flag = torch.tensor(int(value), device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)
