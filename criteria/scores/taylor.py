"""First-order Taylor: what the loss would change by if a unit's weights were zero, by its gradient."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from criteria.base import Backbone, Batch, Criterion, Unit, check_level, zeros


class Taylor(Criterion):
    """s_i = sum over the weights w of unit i of | mean over samples of dL/dw * w |.

    Signed products are summed over the whole calibration set first, the absolute value is taken afterwards (Shortened
    LLaMA, arXiv 2402.02834). Ours: all parameters that go with a unit of the `level` count, biases too.

    `threshold` is Diff-Pruning's (arXiv 2305.10924; 0.05 there): timesteps whose loss is small beside the largest do
    not count. The paper walks over the timesteps in order and stops at the first with L_t / L_max below the threshold.
    Ours works in any order of samples, and on several devices: the schedule is cut into `buckets` equal parts, and a
    part counts if its mean loss is at least `threshold` times the largest part's. The memory for the sums is then
    `buckets` times that of the weights that are scored.
    """

    needs_grad = True

    def __init__(self, threshold: float | None = None, buckets: int = 10, level: str = "depth") -> None:
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"criterion.threshold={threshold} is out of range; choose 0 <= threshold <= 1, or null")
        if buckets < 1:
            raise ValueError(f"criterion.buckets={buckets} is out of range; choose a whole number of 1 or more")
        self.level = check_level(level)
        self.threshold, self.buckets = threshold, buckets if threshold is not None else 1

    def supports(self, backbone: Backbone) -> str | None:
        if self.threshold is not None and not hasattr(backbone, "noise_scheduler"):
            return f"criterion.threshold={self.threshold} is for networks with timesteps; choose null"
        return super().supports(backbone)

    def start(self, backbone: Backbone, units: Sequence[Unit], seed: int) -> None:
        """States: "loss" and "count" by bucket, and by parameter the summed products (buckets, *its shape)."""
        super().start(backbone, units, seed)
        self.weights = backbone.weights()
        self.states = {"loss": zeros(self.buckets), "count": zeros(self.buckets)} | {
            f"weight {name}": torch.zeros(self.buckets, *weight.shape, device=weight.device)
            for name, weight in self.weights.items()
        }

    def update(self, batch: Batch) -> None:
        inputs = self.backbone.calibration_inputs(batch, self.seed)
        with torch.enable_grad(), requiring_grad([*self.weights.values()]):
            loss_N = self.backbone.losses(self.backbone.predict(inputs), inputs)
            bucket_N = self.bucket_of(inputs, len(loss_N)).to(loss_N.device)
            present = bucket_N.unique().tolist()
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
        """The part of the schedule that each sample's timestep is in: (N,)."""
        if self.threshold is None:
            return torch.zeros(count, dtype=torch.long)
        steps = self.backbone.noise_scheduler.config.num_train_timesteps  # type: ignore[attr-defined]
        return (inputs["timestep"] * self.buckets // steps).long().clamp(0, self.buckets - 1)  # flows end at `steps`

    def kept(self) -> Tensor:
        """Which buckets count: (buckets,), true or false. One without samples does not."""
        there = self.states["count"] > 0
        if self.threshold is None:
            return there
        mean = self.states["loss"] / self.states["count"]
        return there & (mean >= self.threshold * mean[there].max())

    def compute(self) -> dict[str, dict[str, float]]:
        kept = self.kept()
        count = self.states["count"][kept].sum()
        products = {name: self.states[f"weight {name}"] for name in self.weights}
        sums = {name: product[kept.to(product.device)].sum(0) for name, product in products.items()}
        score = zeros(len(self.units))
        for i, unit in enumerate(self.units):
            for part in self.backbone.freed_weights(unit.name, sums):
                score[i] += float(part.abs().sum(dtype=torch.float64))
        return self.table(score=score / count)


@contextlib.contextmanager
def requiring_grad(weights: Sequence[Tensor]) -> Iterator[None]:
    """Gradients can be asked for all of these weights inside; their flags are as before afterwards."""
    flags = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
