"""Progress bars."""

import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm

SECONDS_ON_TERMINAL = 0.2
SECONDS_IN_FILE = 10.0
"""Seconds between two updates of the bar, on a terminal and in a log file, where each update is a line."""


class StageBar(ProgressBar):
    """One progress bar per stage, with its name and the time left; a resumed run starts it at the resumed batch."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage
        self.enabled = True
        self.shown = 0.0
        """when the values were last read"""

    def disable(self) -> None:
        self.enabled = False

    def open(self, total: float, done: int = 0) -> None:
        """Show a bar of `total` batches, `done` of which are finished already."""
        seconds = SECONDS_ON_TERMINAL if sys.stderr.isatty() else SECONDS_IN_FILE
        self.bar = tqdm(
            desc=f"{self.stage:<20}",
            total=int(total),
            initial=done,
            disable=not self.enabled,
            mininterval=seconds,
            maxinterval=seconds,
            dynamic_ncols=True,
            leave=True,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.open(trainer.num_training_batches, trainer.fit_loop.epoch_loop.total_batch_idx + 1)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.bar.disable:  # on ranks other than rank 0
            return
        if time.monotonic() - self.shown >= self.bar.mininterval:  # reading a value waits for the device
            self.show_values(trainer)
        self.bar.update()

    def show_values(self, trainer: pl.Trainer) -> None:
        """Show the values of the newest step, such as the loss, beside the bar."""
        values = ", ".join(f"{name}={float(value):.4g}" for name, value in trainer.progress_bar_metrics.items())
        self.bar.set_postfix_str(values, refresh=False)
        self.shown = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.bar.disable:
            self.show_values(trainer)
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
