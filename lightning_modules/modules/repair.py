"""Repair of a pruned network in closed form: layers beside the removed units are refitted, without training."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from criteria.scores.repaired_loss import check_ridges
from lightning_modules.backbones.base import Change, NetworkBackbone
from lightning_modules.backbones.repair.fit import HELD_OUT, Fit, run_to
from lightning_modules.modules.base import Reference
from lightning_modules.modules.joint_loss import sum_square_errors
from lightning_modules.training.ranks import sum_over_ranks

STEPS = (1.0, 0.5, 0.25, 0.125)
"""Shares of the whole change that are tried in turn, until the output loss on the calibration samples is no higher."""


class LeastSquares:
    """Refits one layer beside each removed unit, so that the feature map behind the unit is the teacher's again.

    The backbone's `repair_sites` says which layers these are. They are refitted one after the other in the order of the
    forward pass by ridge least squares towards their present weights, so each corrects what those before it left over.
    No parameter is added. The output loss on the calibration samples never rises: if the new weights raised it, they
    would be moved back towards the old ones. The method is ours. For decoders the idea is that of ReplaceMe (arXiv
    2505.02819), which fits a linear map in the place of removed layers and merges it into the layer before them; here
    the weights of that layer are fitted themselves.

    Args:
        ridges: ridges to choose from by the error on held-out samples, relative to the mean squared input.
        samples: number of calibration samples.
    """

    def __init__(self, ridges: Sequence[float], samples: int) -> None:
        if samples < HELD_OUT:
            raise ValueError(f"repair.samples={samples}: choose {HELD_OUT} or more, as one of {HELD_OUT} is held out")
        self.ridges, self.samples = check_ridges("repair.ridges", ridges), samples

    def repair(
        self,
        student: NetworkBackbone,
        reference: NetworkBackbone,
        changes: Sequence[Change],
        batches: DataLoader,
        trainer: pl.Trainer,
        seed: int,
    ) -> dict[str, Any]:
        """Refit layers of the student in place; return a record of the sites and of the output loss.

        Args:
            student: the pruned network.
            reference: the network it was pruned from.
            changes: the plan by which it was pruned.
            batches: calibration batches.
            trainer: runs the batches.
            seed: seed of the noise of the calibration samples.
        """
        sites = reference.repair_sites(student, changes)
        if not sites:
            return {"sites": [], "step": 0.0}
        fits = [Fit(site, student.network) for site in sites]
        trainer.test(Fitting(student, reference, fits, self.ridges, seed), [batches] * len(fits), verbose=False)
        losses: dict[float, float] = {}
        for steps in ((0.0, STEPS[0]), STEPS[1:]):
            module = OutputLosses(student, reference, fits, steps, seed)
            trainer.test(module, batches, verbose=False)
            losses |= module.losses
            if min(losses.values()) < losses[0.0]:
                break
        step = min(losses, key=losses.__getitem__)
        for fit in fits:
            fit.move(step)
        return {
            "output_loss_before": losses[0.0],
            "output_loss": losses[step],
            "step": step,
            "sites": [fit.describe() for fit in fits],
        }


class PassOverSamples(pl.LightningModule):
    """A test loop over calibration batches that go round the ranks."""

    def __init__(self, student: NetworkBackbone, reference: NetworkBackbone, fits: Sequence[Fit], seed: int) -> None:
        super().__init__()
        self.student, self.reference, self.fits, self.noise_seed = student, Reference(reference), fits, seed

    def on_test_start(self) -> None:
        self.reference.network.to(self.device)
        self.student.eval()

    def is_mine(self, batch_idx: int) -> bool:
        """Tell whether a batch is one of this rank's."""
        return bool(batch_idx % self.trainer.world_size == self.global_rank)


class Fitting(PassOverSamples):
    """Refits the layers one after the other, each with a loader of its own."""

    def __init__(
        self,
        student: NetworkBackbone,
        reference: NetworkBackbone,
        fits: Sequence[Fit],
        ridges: Sequence[float],
        seed: int,
    ) -> None:
        super().__init__(student, reference, fits, seed)
        self.ridges = ridges
        self.index = 0
        """of the layer that is refitted now"""

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx != self.index:
            self.refit()
            self.index = dataloader_idx
        if not self.is_mine(batch_idx):
            return
        fit, reference = self.fits[self.index], self.reference.network
        inputs = self.student.calibration_inputs(batch, self.noise_seed)
        target, _ = run_to(reference.network.get_submodule(fit.site.reference), lambda: reference.predict(inputs))
        fit.observe(lambda: self.student.predict(inputs), inputs, batch["number"], target)

    def on_test_epoch_end(self) -> None:
        self.refit()

    def refit(self) -> None:
        """Give the present layer its new weights."""
        fit = self.fits[self.index]
        sums = fit.equations.sums
        fit.equations.sums = {name: sum_over_ranks(value, self.device) for name, value in sums.items()}
        fit.refit(self.ridges)


class OutputLosses(PassOverSamples):
    """Measures the output loss on the calibration samples with shares of the change of all weights, {share: loss}."""

    def __init__(
        self,
        student: NetworkBackbone,
        reference: NetworkBackbone,
        fits: Sequence[Fit],
        steps: Sequence[float],
        seed: int,
    ) -> None:
        super().__init__(student, reference, fits, seed)
        self.steps = steps
        self.sums = torch.zeros(len(steps) + 1, dtype=torch.float64)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if not self.is_mine(batch_idx):
            return
        inputs = self.student.calibration_inputs(batch, self.noise_seed)
        output = self.reference.network.predict(inputs)
        self.sums[-1] += len(output)
        for i, step in enumerate(self.steps):
            for fit in self.fits:
                fit.move(step)
            self.sums[i] += sum_square_errors(self.student.predict(inputs), output)

    def on_test_epoch_end(self) -> None:
        *errors, count = sum_over_ranks(self.sums, self.device).tolist()
        self.losses = {step: error / count for step, error in zip(self.steps, errors, strict=True)}
