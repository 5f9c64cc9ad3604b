"""Output loss: how far the network's output moves when one unit is removed (LAPTOP-Diff, arXiv 2404.11098)."""

from collections.abc import Sequence

from torch import Tensor

from criteria.base import Backbone, Batch, Criterion, Unit, zeros


class OutputLoss(Criterion):
    """s_i = E || eps(r_i) - eps_ori ||^2, the mean over elements, samples, timesteps and noise.

    The per-unit form is the objective of the paper's combinatorial problem with one unit removed; the paper's own
    calibration set, and whether it takes the mean or the sum over elements, are not known: the mean is our choice,
    and it changes no plan. All units see the same samples, timesteps (stratified over the schedule) and noise.
    `standard_error` is that of the mean over samples.
    """

    def start(self, backbone: Backbone, units: Sequence[Unit], seed: int) -> None:
        super().start(backbone, units, seed)
        self.states = {"sum": zeros(len(units)), "square": zeros(len(units)), "count": zeros(1)}

    def update(self, batch: Batch) -> None:
        inputs = self.backbone.calibration_inputs(batch, self.seed)
        place = {unit.name: i for i, unit in enumerate(self.units)}
        dense: Tensor | None = None
        for name, output in self.backbone.predict_without_each(inputs, list(place)):
            if name is None:
                dense = output.double()
                self.states["count"] += len(output)
                continue
            assert dense is not None
            loss_B = (output.double() - dense).square().flatten(1).mean(1).cpu()
            self.states["sum"][place[name]] += loss_B.sum()
            self.states["square"][place[name]] += loss_B.square().sum()

    def compute(self) -> dict[str, dict[str, float]]:
        count = self.states["count"]
        mean = self.states["sum"] / count
        variance = (self.states["square"] / count - mean.square()).clamp_min(0)
        return self.table(score=mean, standard_error=(variance / (count - 1).clamp_min(1)).sqrt())
