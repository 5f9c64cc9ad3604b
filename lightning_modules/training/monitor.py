"""Learning rate, gradient norm, speed and memory of a training, logged beside its losses."""

import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from lightning_modules.metrics.cost import peak_memory
from lightning_modules.nested import count_samples

MEASURED = ("samples_per_second", "peak_memory_gib")
"""Logged values that depend on the machine, so that two runs with the same bits differ in them."""


class TrainingMonitor(Callback):
    """Logs `<section>/learning_rate`, `gradient_norm`, `samples_per_second` and `peak_memory_gib` of a training.

    Values are computed only at the steps at which Lightning logs (`trainer.log_every_n_steps`), and read from the
    device when the losses are. The gradient norm is that of the global batch before clipping, and the learning rate
    that of the step. Samples of all ranks count. Memory is the peak of this process: resident size on a CPU, the
    allocator's on a GPU.

    The norm is the one that a TrainedModule computes to check it; other modules have none.
    """

    def __init__(self, section: str) -> None:
        self.section = section
        self.start, self.samples, self.step = 0.0, 0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start, self.samples, self.step = time.perf_counter(), 0, trainer.global_step

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        self.log_with_losses(pl_module, {"learning_rate": float(optimizer.param_groups[0]["lr"])})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.samples += count_samples(batch) * trainer.world_size
        if trainer.global_step == self.step:  # gradients are still being accumulated
            return
        self.step = trainer.global_step
        if self.step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        now = time.perf_counter()
        speed, memory = self.samples / (now - self.start), peak_memory(trainer.strategy.root_device) / 2**30
        norm = getattr(pl_module, "gradient_norm", None)
        values = {} if norm is None else {"gradient_norm": norm}
        self.log_with_losses(pl_module, values | dict(zip(MEASURED, (speed, memory), strict=True)))
        self.start, self.samples = now, 0

    def exclude(self, seconds: float) -> None:
        """Leave some seconds out of the speed: those in which another callback worked and not the training."""
        self.start += seconds

    def log_with_losses(self, module: pl.LightningModule, values: dict[str, Any]) -> None:
        """Add values to the row that Lightning logs for this step."""
        module.log_dict({f"{self.section}/{name}": value for name, value in values.items()})
