"""Ridge least squares from sums over samples, in float64, for the weights of a layer.

Shapes: N samples, P positions (pixels or tokens), I inputs of a layer (of a convolution: channels times taps; one more
for the bias), O outputs of it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT64_VALUES = 2**26
"""Values that are held in float64 at once (512 MiB)."""


class NormalEquations:
    """The sums that determine min_D sum ||e - g (D x)||^2 + r ||D||^2, of fitted and of held-out samples.

    x (I,) is the layer's input at a position, D (O,I) the change of its weights, g (O,) the gain from the layer's
    output to the feature map, and e (O,) what the feature map lacks. Where the gain differs between positions,
    sum g_o^2 x x^T is approximated by b_o sum w x x^T, with w the mean of g^2 over outputs and b_o = sum g_o^2 / sum w.
    This is exact where the gain is the same everywhere.

    Args:
        inputs: I.
        outputs: O.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self.sums = {
            "gram": torch.zeros(2, inputs, inputs, dtype=torch.float64),
            "right": torch.zeros(2, outputs, inputs, dtype=torch.float64),
            "gains": torch.zeros(2, outputs, dtype=torch.float64),
            "errors": torch.zeros(2, dtype=torch.float64),
            "rejected": torch.zeros(1, dtype=torch.float64),
        }
        """on the CPU; the first dimension is for fitted and held-out samples. `rejected` counts batches that cannot be
        described by such sums"""

    def add(self, x_NPI: Tensor, e_NPO: Tensor, g_NPO: Tensor, held_out_N: Tensor) -> None:
        """Add samples to the sums."""
        at_once = max(1, FLOAT64_VALUES // x_NPI[0].numel())
        for half, chosen_N in enumerate((~held_out_N, held_out_N)):
            for indices in chosen_N.nonzero().flatten().split(at_once):
                x, e, g = (values[indices].flatten(0, 1).double() for values in (x_NPI, e_NPO, g_NPO))
                self.sums["gram"][half] += (x.T @ (g.square().mean(1, keepdim=True) * x)).cpu()
                self.sums["right"][half] += ((g * e).T @ x).cpu()
                self.sums["gains"][half] += g.square().sum(0).cpu()
                self.sums["errors"][half] += e.square().sum().cpu()

    def solve(self, ridge: float, halves: Sequence[int]) -> Tensor:
        """Return D (O,I); r is the ridge times the mean of the Gram matrix's diagonal."""
        gram, right = self.sums["gram"][halves].sum(0), self.sums["right"][halves].sum(0)
        damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        return torch.cholesky_solve((right / self.scale(halves)).T, torch.linalg.cholesky(damped)).T

    def scale(self, halves: Sequence[int]) -> Tensor:
        """Return b (O,1); 1 for an output without any gain."""
        gains = self.sums["gains"][halves].sum(0)
        return torch.where(gains > 0, gains / gains.mean(), 1)[:, None]

    def error(self, change: Tensor, halves: Sequence[int]) -> float:
        """Return sum ||e - g (D x)||^2."""
        linear = (self.sums["right"][halves].sum(0) * change).sum()
        square = ((self.scale(halves) * change) @ self.sums["gram"][halves].sum(0) * change).sum()
        return float(self.sums["errors"][halves].sum() - 2 * linear + square)

    def fit(self, ridges: Sequence[float]) -> tuple[float, Tensor] | None:
        """Return the ridge with the least error on held-out samples, and D for that ridge and all samples.

        None where no ridge makes that error less than no change does.
        """
        if not (self.sums["gains"].sum(1).all() and self.sums["gram"].sum()):
            return None
        errors = {ridge: self.error(self.solve(ridge, [0]), [1]) for ridge in ridges}
        best = min(errors, key=errors.__getitem__)
        return (best, self.solve(best, [0, 1])) if errors[best] < float(self.sums["errors"][1]) else None


def list_inputs(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the inputs of a layer at each position of its output, (N,P,I), with a one at the end where it has a bias.

    `x` is the input of a linear layer, (N,I) or (N,P,I), or of a convolution, (N,C,H,W).
    """
    if isinstance(layer, nn.Conv2d):
        x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)  # type: ignore[arg-type]
    rows = x.reshape(len(x), -1, x.shape[-1])
    return rows if layer.bias is None else F.pad(rows, (0, 1), value=1.0)


def list_positions(feature_map: Tensor) -> Tensor:
    """Return a feature map (N,C,H,W), (N,P,C) or (N,C) as (N,P,C)."""
    if feature_map.ndim == 4:
        return feature_map.flatten(2).transpose(1, 2)
    return feature_map[:, None] if feature_map.ndim == 2 else feature_map


@torch.no_grad()
def change_layer(layer: nn.Module, change: Tensor) -> None:
    """Add D (O,I) to the weights of a layer, its last column to the bias where there is one."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    change = change.to(weight)
    if isinstance(bias, Tensor):
        bias += change[:, -1]
        change = change[:, :-1]
    weight += change.reshape(weight.shape)
