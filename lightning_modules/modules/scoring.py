"""Runs a criterion under a Lightning Trainer, with the same devices, precision and ranks as training."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
from torch import nn
from torch.utils.data import DataLoader

from criteria.base import Criterion, Unit
from lightning_modules.training.ranks import sum_over_ranks


class Scoring(pl.LightningModule):
    """Feeds calibration batches to a criterion and sums its states over ranks; `scores` holds the result."""

    def __init__(self, criterion: Criterion, backbone: nn.Module, units: Sequence[Unit], seed: int) -> None:
        super().__init__()
        self.criterion, self.backbone, self.units, self.calibration_seed = criterion, backbone, units, seed
        self.scores: dict[str, dict[str, float]] = {}
        self.settled = False
        """The criterion needs no more batches. A test loop cannot be stopped, so the remaining ones are skipped."""

    def on_test_start(self) -> None:
        if self.trainer.world_size > self.trainer.num_test_batches[0]:
            raise ValueError(
                f"calibration has {self.trainer.num_test_batches[0]} batches for {self.trainer.world_size} ranks; "
                "lower calibration.batch_size or trainer.devices, so that every rank has one"
            )
        self.criterion.start(self.backbone, self.units, self.calibration_seed)
        self.passes_ended = 0

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx != self.passes_ended:
            self.add_over_ranks()
            self.criterion.end_pass()
            self.passes_ended = dataloader_idx
        if self.settled or batch_idx % self.trainer.world_size != self.global_rank:  # batches go round the ranks
            return
        self.criterion.update(batch)
        self.settled = self.trainer.world_size == 1 and self.criterion.settled()

    def on_test_epoch_end(self) -> None:
        self.add_over_ranks()
        self.scores = self.criterion.finish()

    def add_over_ranks(self) -> None:
        """Add up the states of all ranks."""
        states = self.criterion.states
        self.criterion.states = {name: sum_over_ranks(value, self.device) for name, value in states.items()}


def score(
    criterion: Criterion,
    backbone: nn.Module,
    units: Sequence[Unit],
    batches: DataLoader | None,
    trainer: pl.Trainer,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Return {unit: {"score": ...}}; the network's mode and gradients are afterwards what they were.

    Args:
        criterion: the criterion.
        backbone: the network, a NetworkBackbone.
        units: the units to score.
        batches: calibration batches or seeds; None where the criterion needs none.
        trainer: runs the batches.
        seed: seed of the noise of calibration samples.
    """
    if criterion.needs == "nothing":
        criterion.start(backbone, units, seed)
        return criterion.finish()
    with as_before(backbone):
        backbone.eval()
        if criterion.module is not None:
            criterion.start(backbone, units, seed)
            backbone.requires_grad_(False)
            trainer.fit_loop.max_epochs = 1
            trainer.fit(criterion.module(criterion, backbone), batches)
            return criterion.finish()
        module = Scoring(criterion, backbone, units, seed)
        trainer.test(module, [batches] * criterion.passes, verbose=False)
        return module.scores


@contextlib.contextmanager
def as_before(network: nn.Module) -> Iterator[None]:
    """Restore modes, gradients and `requires_grad` of a network afterwards; a Trainer deletes gradients."""
    modes = {module: module.training for module in network.modules()}
    kept = {parameter: (parameter.requires_grad, parameter.grad) for parameter in network.parameters()}
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        for parameter, (flag, gradient) in kept.items():
            parameter.requires_grad_(flag)
            parameter.grad = gradient
