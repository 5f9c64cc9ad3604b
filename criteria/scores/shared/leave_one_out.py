"""Criteria with one harm per sample: its mean over samples, the standard error of that mean, and early stopping."""

from collections.abc import Callable, Sequence

from torch import Tensor

from criteria.base import Batch, Criterion, Network, Scores, Unit, zeros
from criteria.protocols import Scorable
from criteria.scores.shared.early_stopping import Stopping


class PerSample(Criterion[Network]):
    """Base class: the score is the mean of one harm per sample, `standard_error` that of the mean over samples."""

    def start(self, backbone: Network, units: Sequence[Unit], seed: int) -> None:
        super().start(backbone, units, seed)
        self.index = {unit.name: i for i, unit in enumerate(self.units)}
        self.states = {key: zeros(len(self.units)) for key in ("sum", "square", "count")}

    def add(self, name: str, harm_N: Tensor) -> None:
        """Add the harms that the removal of a unit does to some samples, (N,)."""
        harm_N, i = harm_N.detach().double().cpu(), self.index[name]
        self.states["sum"][i] += harm_N.sum()
        self.states["square"][i] += harm_N.square().sum()
        self.states["count"][i] += len(harm_N)

    def compute(self) -> Scores:
        count = self.states["count"]
        mean = self.states["sum"] / count
        variance = (self.states["square"] / count - mean.square()).clamp_min(0)
        return self.table(score=mean, standard_error=(variance / (count - 1).clamp_min(1)).sqrt())


class OneRemoved(PerSample[Scorable]):
    """Base class: compares the output without each unit with the dense output, on the same calibration samples.

    `batches_at_least`, `stable_for`, `ratios`: early stopping, see scores/shared/early_stopping.py; off by default.
    """

    def __init__(
        self, batches_at_least: int = 4, stable_for: int | None = None, ratios: list[float] | None = None
    ) -> None:
        self.stopping = Stopping(batches_at_least, stable_for, ratios)
        self.stable_for = stable_for

    def harm_function(self, dense: Tensor, inputs: Batch) -> Callable[[Tensor], Tensor]:
        """Return a function of another output for the same inputs: the harm of each sample, (N,)."""
        raise NotImplementedError

    def start(self, backbone: Scorable, units: Sequence[Unit], seed: int) -> None:
        super().start(backbone, units, seed)
        self.stopping.start(self.units)

    def update(self, batch: Batch) -> None:
        inputs = self.backbone.calibration_inputs(batch, self.seed)
        harm: Callable[[Tensor], Tensor] | None = None
        for name, output in self.backbone.predict_without_each(inputs, list(self.index)):
            if name is None:
                harm = self.harm_function(output, inputs)
                continue
            assert harm is not None
            self.add(name, harm(output))
        self.stopping.observe({name: entry["score"] for name, entry in self.compute().items()})

    def settled(self) -> bool:
        return self.stopping.settled()
