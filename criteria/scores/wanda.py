"""Wanda-sp: weights times the norms of what they are multiplied with (arXiv 2306.11695, arXiv 2312.11983)."""

import torch
from torch import Tensor

from criteria.scores.shared.activations import OfInputs


class Wanda(OfInputs):
    """s_i = sum over the input channels j of unit i of sum_r |W_rj| * ||X_j||_2.

    X_j are the values of input channel j of the layer W that takes the unit's channels, over all calibration tokens.
    Wanda scores single weights so; the sum over whole channels and heads is Wanda-sp, FLAP's baseline (arXiv
    2312.11983). Scores of layers of different inputs have different scales: choose selection=uniform.
    """

    def columns(self, weight_RC: Tensor, sum_C: Tensor, square_C: Tensor, tokens: float) -> Tensor:
        return weight_RC.abs().sum(0, dtype=torch.float64).cpu() * square_C.sqrt()
