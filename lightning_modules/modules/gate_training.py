"""Training of the gates of criteria/scores/bottleneck.py."""

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from criteria.scores.bottleneck import Bottleneck
from lightning_modules.backbones.prefix_reuse import take_samples
from lightning_modules.modules.non_finite import NonFiniteLoss, advise_on_non_finite
from lightning_modules.training.ranks import sum_over_ranks


class BottleneckTraining(pl.LightningModule):
    """Takes one Adam step on the gates per calibration batch, in order; the ranks share the samples of each batch.

    `criterion.start` has to be called before. The backbone is a submodule so that it is moved to the device, and must
    be frozen.
    """

    def __init__(self, criterion: Bottleneck, backbone: nn.Module) -> None:
        super().__init__()
        self.criterion, self.backbone = criterion, backbone
        self.alphas = nn.ParameterList(criterion.alphas.values())

    def on_train_start(self) -> None:
        if self.trainer.num_training_batches < 2:
            raise ValueError(
                f"calibration has {self.trainer.num_training_batches} batch, and criterion=bottleneck takes an Adam "
                "step per batch; raise calibration.samples or lower calibration.batch_size (the paper has 200 batches "
                "of 64)"
            )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of the whole batch, with the gradient of this rank's share.

        The mean of these gradients over ranks is the gradient of the whole batch.
        """
        criterion, ranks = self.criterion, self.trainer.world_size
        gates = criterion.gates()
        samples = len(next(value for value in batch.values() if isinstance(value, Tensor)))
        # A last batch may have fewer samples than there are ranks: the others compute one that does not count.
        has_samples = self.global_rank < samples
        rows = slice(self.global_rank, None, ranks) if has_samples else slice(0, 1)
        task_N = criterion.task_losses(take_samples(batch, rows), gates).double() * has_samples
        rank_sum = task_N.sum()
        rank_samples = rank_sum.new_tensor(len(task_N) * has_samples)
        sums = sum_over_ranks(torch.stack([rank_sum.detach(), rank_samples]), self.device).to(rank_sum.device)
        share, mean = rank_sum * ranks / sums[1], sums[0] / sums[1]
        losses = criterion.objective(share + (mean - share).detach(), gates)
        values = {name: float(value.detach()) for name, value in losses.items()}
        self.check(values, batch_idx)
        criterion.record(values, gates, int(self.trainer.num_training_batches))
        shown = {"loss": values["loss"], "cost": values["cost"] / criterion.whole}
        self.log_dict(shown | {"target": criterion.wanted / criterion.whole}, prog_bar=True, logger=False)
        return losses["loss"]

    def check(self, values: dict[str, float], iteration: int) -> None:
        """Raise NonFiniteLoss, on all ranks, before a step is taken with a loss that is not finite."""
        if not math.isfinite(values["loss"]):
            terms = ", ".join(f"{name}={value:.4g}" for name, value in values.items())
            otherwise = "another calibration.seed, or look at the calibration samples: the whole network fails on them"
            precision = str(self.trainer.precision)
            advice = advise_on_non_finite(iteration, precision, "criterion.lr", "calibration.precision", otherwise)
            raise NonFiniteLoss(
                f"the loss of criterion=bottleneck is not finite at iteration {iteration + 1} of "
                f"{self.trainer.num_training_batches} ({terms}). {advice}"
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.alphas, lr=self.criterion.lr)
