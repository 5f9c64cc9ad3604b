"""FLAP's fluctuation of the input channels of a layer, weighted by what is made of them (arXiv 2312.11983)."""

from torch import Tensor

from criteria.scores.shared.activations import OfInputs


class Flap(OfInputs):
    """s_i = sum over the input channels j of unit i of Var(X_j) * ||W_:j||_2^2, the paper's WIFV.

    Var is the sample variance (divided by n - 1) over the n calibration tokens. What a channel gives on average, FLAP
    puts into biases of the layers behind, and it standardises scores so as to compare layers. Ours is FLAP-like: a
    stock network has no such biases, so the averages are lost, and selection=uniform never compares layers.
    """

    def columns(self, weight_RC: Tensor, sum_C: Tensor, square_C: Tensor, tokens: float) -> Tensor:
        variance_C = (square_C - sum_C.square() / tokens).clamp_min(0) / (tokens - 1)
        return variance_C * weight_RC.double().square().sum(0).cpu()
