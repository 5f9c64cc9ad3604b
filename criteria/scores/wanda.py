"""Wanda-sp: weights times the norms of the inputs they are multiplied with (arXiv 2306.11695, arXiv 2312.11983)."""

import torch
from torch import Tensor

from criteria.scores.shared.activations import InputStatistics


class Wanda(InputStatistics):
    """s_i = sum over the input channels j of unit i of sum_r |W_rj| * ||X_j||_2.

    X_j are the values, over all calibration tokens, of input channel j of the layer W that reads the unit's channels.
    Wanda (arXiv 2306.11695) scores single weights this way; the sum over whole channels and heads is Wanda-sp, the
    baseline of FLAP (arXiv 2312.11983). Scores of layers with different inputs differ in scale: choose
    selection=uniform.
    """

    def harm_by_input(self, weight_RC: Tensor, sum_C: Tensor, square_C: Tensor, tokens: float) -> Tensor:
        return weight_RC.abs().sum(0, dtype=torch.float64).cpu() * square_C.sqrt()
