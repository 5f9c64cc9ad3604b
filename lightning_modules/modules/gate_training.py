"""Training of the gates of criteria/scores/bottleneck.py."""

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from criteria.scores.bottleneck import Bottleneck
from lightning_modules.backbones.prefix_reuse import take_samples
from lightning_modules.modules.base import NonFiniteLoss, advise_on_non_finite, sum_over_ranks


class BottleneckTraining(pl.LightningModule):
    """Takes one Adam step on the gates per calibration batch, in their order; ranks share the samples of each batch.

    `criterion` has been started. The backbone is a submodule so that it is moved to the device, and must be frozen.
    """

    def __init__(self, criterion: Bottleneck, backbone: nn.Module) -> None:
        super().__init__()
        self.criterion, self.backbone = criterion, backbone
        self.alphas = nn.ParameterList(criterion.alphas.values())

    def on_train_start(self) -> None:
        if self.trainer.num_training_batches < 2:
            raise ValueError(
                f"calibration has {self.trainer.num_training_batches} batch, and criterion=bottleneck takes an Adam "
                "step a batch; raise calibration.samples or lower calibration.batch_size (the paper: 200 batches of 64)"
            )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of the whole batch, with the gradient of this rank's share.

        The mean of these gradients over ranks is the gradient of the whole batch.
        """
        criterion, ranks = self.criterion, self.trainer.world_size
        gates = criterion.gates()
        size = len(next(value for value in batch.values() if isinstance(value, Tensor)))
        idle = self.global_rank >= size  # of a last batch that is smaller than the ranks: a sample that does not count
        rows = slice(0, 1) if idle else slice(self.global_rank, None, ranks)
        task_N = criterion.task_losses(take_samples(batch, rows), gates).double() * (not idle)
        own = task_N.sum()
        counted = own.new_tensor(0 if idle else len(task_N))
        total = sum_over_ranks(self, torch.stack([own.detach(), counted])).to(own.device)
        share, mean = own * ranks / total[1], total[0] / total[1]
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
