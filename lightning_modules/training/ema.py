"""Exponential moving average of the weights."""

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging


class WarmedUpEMA(WeightAveraging):
    """Exponential moving average of the weights whose decay in update k is min(decay, (1 + k) / (10 + k)).

    Without this warm-up the average of a short run would be close to the initial weights. Buffers (batch norm
    statistics) are copied, not averaged.
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

    def exchange_weights(self, module: pl.LightningModule) -> None:
        """Exchange the weights of a module for their average; a second call restores both, bit for bit."""
        self._swap_models(module)
