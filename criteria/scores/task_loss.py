"""Task loss: how much worse the network does its task when one unit is removed."""

from collections.abc import Callable

from torch import Tensor

from criteria.base import Batch
from criteria.scores.shared.leave_one_out import OneRemoved


class TaskLoss(OneRemoved):
    """s_i = E[ loss without unit i ] - E[ loss of the dense network ]; negative where the removal helps.

    A baseline of LAPTOP-Diff (arXiv 2404.11098), as far as we know; the exact form there is not known. Here the loss is
    the one that the network was trained with (such as the squared error to the noise), and the difference is taken
    sample by sample on the same timesteps and noise: `standard_error` is the one of the paired difference.
    """

    def harm_function(self, dense: Tensor, inputs: Batch) -> Callable[[Tensor], Tensor]:
        before_N = self.backbone.losses(dense, inputs).double()
        return lambda output: self.backbone.losses(output, inputs).double() - before_N
