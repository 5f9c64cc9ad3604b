"""Scales of batch norms, a baseline for width that uses no data (network slimming, arXiv 1708.06519)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from criteria.base import Criterion, Level, Needs, Scores, Unit, parse_level, zeros
from criteria.protocols import Weighted


class BnScale(Criterion[Weighted]):
    """s_i = mean |gamma| over the batch norms' channels that belong to unit i.

    Network slimming first trains with an L1 penalty on the gammas; here they are taken as they are in the network.
    Ours: the mean, where several norms belong to a unit. Norms in front of the layers that read the channels (DenseNet,
    where each layer normalises all channels before it for itself) count as much as those behind. Scores are an order of
    the units: also a unit whose removal changes nothing has scales.
    """

    needs = Needs.NOTHING

    def __init__(self, level: str = "channel") -> None:
        self.level = parse_level(level, [Level.CHANNEL])

    def supports(self, backbone: Weighted) -> str | None:
        """Return a reason as well for networks without batch norms, or with units that have none."""
        if not any(not weight.is_meta for weight in batch_norm_gammas(backbone).values()):
            return "it has no batch norms, whose scales are compared"
        if reason := super().supports(backbone):
            return reason
        scales = gammas_by_unit(backbone, backbone.units(self.level))
        bare = [name for name, gammas in scales.items() if not len(gammas)]
        return f"no batch norm goes with some of its units, such as {bare[0]!r}" if bare else None

    def compute(self) -> Scores:
        scales = gammas_by_unit(self.backbone, self.units)
        return self.table(score=torch.stack([scales[unit.name].abs().mean() for unit in self.units]))


def gammas_by_unit(backbone: Weighted, units: Sequence[Unit]) -> dict[str, Tensor]:
    """Return {unit: its gammas, (n,) in float64 on the CPU}."""
    tensors, by_unit = batch_norm_gammas(backbone), {}
    for unit in units:
        gammas = [part for part in backbone.freed_weights(unit, tensors) if not part.is_meta]
        by_unit[unit.name] = torch.cat([zeros(0), *(gamma.double().cpu() for gamma in gammas)])
    return by_unit


def batch_norm_gammas(backbone: Weighted) -> dict[str, Tensor]:
    """Return all parameters by name; all but the gammas of batch norms are meta tensors, a shape without values."""
    modules = backbone.network.named_modules()
    scales = {f"{name}.weight" for name, part in modules if isinstance(part, _BatchNorm)}
    return {name: w.detach() if name in scales else w.to("meta") for name, w in backbone.weights().items()}
