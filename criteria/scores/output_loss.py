"""Output loss: how far the network's output moves when one unit is removed (LAPTOP-Diff, arXiv 2404.11098)."""

from collections.abc import Callable

from torch import Tensor

from criteria.base import Batch
from criteria.scores.shared.leave_one_out import OneRemoved


class OutputLoss(OneRemoved):
    """s_i = E || eps(r_i) - eps_ori ||^2, the mean over elements, samples, timesteps and noise.

    The per-unit form is the objective of the paper's combinatorial problem with one unit removed; the paper's own
    calibration set, and whether it takes the mean or the sum over elements, are not known: the mean is our choice,
    and it changes no plan. All units see the same samples, timesteps (stratified over the schedule) and noise.
    """

    def harm(self, dense: Tensor, inputs: Batch) -> Callable[[Tensor], Tensor]:
        reference = dense.double()
        return lambda output: (output.double() - reference).square().flatten(1).mean(1)
