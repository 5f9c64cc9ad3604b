"""What criteria share that measure one harm a sample: its mean, the standard error, and when to stop."""

from collections.abc import Callable, Sequence

from torch import Tensor

from criteria.base import Backbone, Batch, Criterion, Unit, zeros
from criteria.scores.shared.early_stopping import Stopping


class PerSample(Criterion):
    """The score is the mean of one harm a sample; `standard_error` is that of the mean over samples."""

    def start(self, backbone: Backbone, units: Sequence[Unit], seed: int) -> None:
        super().start(backbone, units, seed)
        self.place = {unit.name: i for i, unit in enumerate(self.units)}
        self.states = {key: zeros(len(self.units)) for key in ("sum", "square", "count")}

    def add(self, name: str, harm_N: Tensor) -> None:
        """Take the harms that the removal of a unit does to some samples into account."""
        harm_N, i = harm_N.detach().double().cpu(), self.place[name]
        self.states["sum"][i] += harm_N.sum()
        self.states["square"][i] += harm_N.square().sum()
        self.states["count"][i] += len(harm_N)

    def compute(self) -> dict[str, dict[str, float]]:
        count = self.states["count"]
        mean = self.states["sum"] / count
        variance = (self.states["square"] / count - mean.square()).clamp_min(0)
        return self.table(score=mean, standard_error=(variance / (count - 1).clamp_min(1)).sqrt())


class OneRemoved(PerSample):
    """Compares the network's output without each unit with the dense output, on the same calibration samples.

    `batches_at_least`, `stable_for`, `ratios`: early stopping, see scores/shared/early_stopping.py; off by default.
    """

    def __init__(
        self, batches_at_least: int = 4, stable_for: int | None = None, ratios: list[float] | None = None
    ) -> None:
        self.stopping = Stopping(batches_at_least, stable_for, ratios)

    def harm(self, dense: Tensor, inputs: Batch) -> Callable[[Tensor], Tensor]:
        """The function that gives the harm (N,) that lies in another output for the same inputs."""
        raise NotImplementedError

    def start(self, backbone: Backbone, units: Sequence[Unit], seed: int) -> None:
        super().start(backbone, units, seed)
        self.stopping.start(self.units)

    def update(self, batch: Batch) -> None:
        inputs = self.backbone.calibration_inputs(batch, self.seed)
        harm: Callable[[Tensor], Tensor] | None = None
        for name, output in self.backbone.predict_without_each(inputs, list(self.place)):
            if name is None:
                harm = self.harm(output, inputs)
                continue
            assert harm is not None
            self.add(name, harm(output))
        self.stopping.look({name: entry["score"] for name, entry in self.compute().items()})

    def settled(self) -> bool:
        return self.stopping.settled()
