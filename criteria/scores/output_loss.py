"""Output loss: how far the network's output moves when one unit is removed (LAPTOP-Diff, arXiv 2404.11098)."""

from collections.abc import Callable

from torch import Tensor

from criteria.base import Batch
from criteria.scores.shared.leave_one_out import OneRemoved


class OutputLoss(OneRemoved):
    """s_i = E || eps(r_i) - eps_ori ||^2, the mean over elements, samples, timesteps and noise.

    eps_ori is the output of the dense network, eps(r_i) the output without unit i: the objective of LAPTOP-Diff's
    combinatorial problem, E || eps(r_1, ..., r_m) - eps_ori ||^2, for a single unit. The sum over the removed units
    predicts their joint loss (the paper's "additivity property"). The paper's calibration set, and whether it takes the
    mean or the sum over elements, are not known: the mean is our choice, and it changes no plan. All units are measured
    on the same samples, timesteps (stratified over the schedule) and noise.
    """

    def harm_function(self, dense: Tensor, inputs: Batch) -> Callable[[Tensor], Tensor]:
        reference = dense.double()
        return lambda output: (output.double() - reference).square().flatten(1).mean(1)
