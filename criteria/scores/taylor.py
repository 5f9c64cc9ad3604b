"""First-order Taylor: the change of the loss, by its gradient, if a unit's weights were zero."""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from criteria.base import Batch, Choice, Criterion, Level, Scores, Unit, parse_choice, parse_level, zeros
from criteria.protocols import Differentiable
from criteria.selection.base import group


class Normalization(Choice):
    """How scores of different groups of channels are made comparable."""

    NONE = "none"
    """not at all: scores are harms"""
    GROUP_MEAN = "group_mean"
    """scores are divided by the mean score of their group"""


class Taylor(Criterion[Differentiable]):
    """s_i = sum over the weights w of unit i of | mean over samples of dL/dw * w |.

    Signed products are first summed over the whole calibration set, then the absolute value is taken (Shortened LLaMA,
    arXiv 2402.02834). Ours: all parameters that belong to a unit of the `level` count, biases too.

    `threshold` is the one of Diff-Pruning (arXiv 2305.10924; 0.05 there): timesteps with a loss that is small compared
    to the largest do not count. The paper goes through the timesteps in order and stops at the first with L_t / L_max
    below the threshold. Ours works for any order of samples, and on several devices: the schedule is cut into `buckets`
    equal parts, and a part counts if its mean loss is at least `threshold` times the largest part's. The sums then take
    `buckets` times the memory of the scored weights.

    `normalization`: with `none` scores are additive harms. With `group_mean` each score is divided by the mean score of
    its group of channels, as the importance that Diff-Pruning uses does: every group then has the mean 1, and scores
    say how much a unit matters beside the others of its group. A group in which every score is 0 stays at 0.
    """

    needs_grad = True

    def __init__(
        self,
        threshold: float | None = None,
        buckets: int = 10,
        level: str = "depth",
        normalization: str = Normalization.NONE.value,
    ) -> None:
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"criterion.threshold={threshold} is out of range; choose 0 <= threshold <= 1, or null")
        if buckets < 1:
            raise ValueError(f"criterion.buckets={buckets} is out of range; choose a whole number of 1 or more")
        self.level = parse_level(level)
        self.normalization = parse_choice(Normalization, "criterion.normalization", normalization)
        if self.normalization == Normalization.GROUP_MEAN and self.level != Level.CHANNEL:
            raise ValueError(
                f"criterion.normalization={normalization!r} needs groups of channels, and criterion.level={level!r} "
                "has none; choose criterion.level=channel, or criterion.normalization=none"
            )
        self.threshold, self.buckets = threshold, buckets if threshold is not None else 1

    def supports(self, backbone: Differentiable) -> str | None:
        """Return why a network cannot be scored, or None. With a `threshold`, networks without timesteps cannot."""
        if self.threshold is not None and getattr(backbone, "noise_scheduler", None) is None:
            return f"criterion.threshold={self.threshold} is for networks with timesteps; choose null"
        return super().supports(backbone)

    def start(self, backbone: Differentiable, units: Sequence[Unit], seed: int) -> None:
        """Begin with zeros: "loss" and "count" (buckets,), and per parameter the summed products (buckets, *shape)."""
        super().start(backbone, units, seed)
        self.weights = backbone.weights()
        self.states = {"loss": zeros(self.buckets), "count": zeros(self.buckets)} | {
            f"weight {name}": torch.zeros(self.buckets, *weight.shape, device=weight.device)
            for name, weight in self.weights.items()
        }

    def update(self, batch: Batch) -> None:
        inputs = self.backbone.calibration_inputs(batch, self.seed)
        with torch.enable_grad(), require_grad([*self.weights.values()]):
            loss_N = self.backbone.losses(self.backbone.predict(inputs), inputs)
            bucket_N = self.bucket_of(inputs, len(loss_N)).to(loss_N.device)
            present = sorted(set(bucket_N.tolist()))
            for bucket in present:
                loss = loss_N[bucket_N == bucket].sum()
                gradients = torch.autograd.grad(
                    loss, [*self.weights.values()], retain_graph=bucket != present[-1], materialize_grads=True
                )
                self.states["loss"][bucket] += loss.detach().cpu()
                self.states["count"][bucket] += int((bucket_N == bucket).sum())
                for gradient, (name, weight) in zip(gradients, self.weights.items(), strict=True):
                    self.states[f"weight {name}"][bucket].addcmul_(gradient, weight.detach())

    def bucket_of(self, inputs: Batch, count: int) -> Tensor:
        """Return the index of the part of the schedule that each sample's timestep is in, (N,)."""
        if self.threshold is None:
            return torch.zeros(count, dtype=torch.long)
        steps = self.backbone.noise_scheduler.config.num_train_timesteps  # type: ignore[attr-defined]
        bucket_N: Tensor = inputs["timestep"] * self.buckets // steps
        return bucket_N.long().clamp(0, self.buckets - 1)  # flows end at `steps`

    def counted_buckets(self) -> Tensor:
        """Return whether each bucket counts: (buckets,), boolean. A bucket without samples does not."""
        sampled = self.states["count"] > 0
        if self.threshold is None:
            return sampled
        mean = self.states["loss"] / self.states["count"]
        return sampled & (mean >= self.threshold * mean[sampled].max())

    def compute(self) -> Scores:
        kept = self.counted_buckets()
        count = self.states["count"][kept].sum()
        products = {name: self.states[f"weight {name}"] for name in self.weights}
        sums = {name: product[kept.to(product.device)].sum(0) for name, product in products.items()}
        score = zeros(len(self.units))
        for i, unit in enumerate(self.units):
            for part in self.backbone.freed_weights(unit, sums):
                score[i] += float(part.abs().sum(dtype=torch.float64))
        score /= count
        if self.normalization == Normalization.GROUP_MEAN:
            score = divide_by_group_mean(score, [unit.name for unit in self.units])
        return self.table(score=score)


def divide_by_group_mean(score: Tensor, names: Sequence[str]) -> Tensor:
    """Return scores (units,), each divided by the mean score of the units in its group.

    The scores of a group whose mean is 0 or not finite are returned as they are.
    """
    divisor = torch.ones_like(score)
    groups = [group(name) for name in names]
    for each in dict.fromkeys(groups):
        members = torch.tensor([other == each for other in groups])
        mean = float(score[members].mean())
        if mean > 0 and math.isfinite(mean):
            divisor[members] = mean
    return score / divisor


@contextlib.contextmanager
def require_grad(weights: Sequence[Tensor]) -> Iterator[None]:
    """Let all of these weights require gradients while the context lasts; restore their flags afterwards."""
    flags = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
