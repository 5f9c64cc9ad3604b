"""FLAP: the fluctuation of a layer's input channels, weighted by the weights behind them (arXiv 2312.11983)."""

from torch import Tensor

from criteria.scores.shared.activations import InputStatistics


class Flap(InputStatistics):
    """s_i = sum over the input channels j of unit i of Var(X_j) * ||W_:j||_2^2, the metric that FLAP calls WIFV.

    Var is the sample variance (divided by n - 1) over the n calibration tokens. FLAP moves the mean of what a removed
    channel contributes into biases of the layers behind, and standardises scores in order to compare layers. Ours is
    FLAP-like: a stock network has no such biases, so that the means are lost, and selection=uniform compares no layers.
    """

    def harm_by_input(self, weight_RC: Tensor, sum_C: Tensor, square_C: Tensor, tokens: float) -> Tensor:
        variance_C = (square_C - sum_C.square() / tokens).clamp_min(0) / (tokens - 1)
        return variance_C * weight_RC.double().square().sum(0).cpu()
