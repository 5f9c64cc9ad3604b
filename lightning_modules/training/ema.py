"""Exponential moving average of the weights."""

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor

from lightning_modules.training.sharding import FullySharded, shard_module


class WarmedUpEMA(WeightAveraging):
    """Exponential moving average of the weights whose decay in update k is min(decay, (1 + k) / (10 + k)).

    Without this warm-up the average of a short run would be close to the initial weights. Buffers (batch norm
    statistics) are copied, not averaged.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        super().__init__(use_buffers=False, multi_avg_fn=self.average)

    def average(self, averaged: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
        """Update averages in place by the weights as they are now; `updates` is not read, as it may be on a device."""
        k = self._latest_update_step  # one update per optimiser step
        torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + k) / (10 + k)))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        # The module itself is moved to the device only after this; a sharded one is moved there part by part.
        self._device = None if isinstance(strategy, FullySharded) else strategy.root_device
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            for part in self._average_model.modules():  # a replaced function (see parts.py) is the trained network's
                part.__dict__.pop("forward", None)
            # torch compares this number with 0 at every update: on a GPU, the process would wait for the device.
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()
            if isinstance(strategy, FullySharded):
                shard_module(self._average_model.module, strategy.mesh)

    def exchange_weights(self, module: pl.LightningModule) -> None:
        """Exchange the weights of a module for their average; a second call restores both, bit for bit."""
        self._swap_models(module)
