"""Repaired loss: how far the output moves when one unit is removed and a layer beside it is refitted."""

from collections.abc import Sequence

from criteria.base import Batch, Unit
from criteria.protocols import Repairable
from criteria.scores.shared.leave_one_out import PerSample


class RepairedLoss(PerSample[Repairable]):
    """s_i = E || eps(r_i, repaired) - eps_ori ||^2, the mean over elements, samples, timesteps and noise.

    It is the output loss (LAPTOP-Diff, arXiv 2404.11098) of a network without unit i in which the layer beside the unit
    has been refitted to the feature map behind it by ridge least squares, on the same calibration samples. The first
    pass over the samples finds the weights of these layers, the second measures. A unit that no layer can make up for
    has its output loss. The criterion is ours: it ranks units by what a repair (conf/repair/least_squares.yaml) leaves.
    The sums of the first pass take 16 bytes per pair of inputs of each such layer, in the memory of the CPU: 2 GiB for
    a 3x3 convolution of 1,280 channels.

    Args:
        ridges: ridges to choose from by the error on held-out samples, relative to the mean squared input of a layer.
    """

    passes = 2

    def __init__(self, ridges: Sequence[float]) -> None:
        self.ridges = check_ridges("criterion.ridges", ridges)

    def spreads_batches(self, backbone: Repairable) -> bool:
        return False

    def start(self, backbone: Repairable, units: Sequence[Unit], seed: int) -> None:
        super().start(backbone, units, seed)
        self.removals = backbone.repaired_removals(list(self.index), self.ridges)
        self.sums, self.states = self.states, self.removals.states
        self.is_fitted = False

    def end_pass(self) -> None:
        self.removals.states = self.states
        self.removals.refit()
        self.states, self.is_fitted = self.sums, True

    def update(self, batch: Batch) -> None:
        inputs = self.backbone.calibration_inputs(batch, self.seed)
        if not self.is_fitted:
            self.removals.observe(inputs, batch["number"])
            return
        for name, output in self.removals.outputs(inputs):
            if name is None:
                reference = output.double()
            else:
                self.add(name, (output.double() - reference).square().flatten(1).mean(1))


def check_ridges(field: str, ridges: Sequence[float]) -> list[float]:
    """Return the ridges of a field of the configuration; raises ValueError for none, or one that is not above 0."""
    if not ridges or min(ridges) <= 0:
        raise ValueError(f"{field}={list(ridges)}: choose one or more numbers above 0")
    return list(ridges)
