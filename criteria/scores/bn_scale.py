"""Scales of batch norms, the baseline of width that looks at no data (network slimming, arXiv 1708.06519)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from criteria.base import Backbone, Criterion, Unit, check_level, zeros


class BnScale(Criterion):
    """s_i = mean |gamma| over the batch norms' channels that go with unit i.

    Network slimming trains with an L1 penalty on the gammas first; here they are as the network has them. Ours: a mean,
    where several norms go with a unit. These may stand before what takes the channels in (DenseNet, each of whose
    layers normalises all channels before it for itself): then they count alike.
    """

    needs = "nothing"

    def __init__(self, level: str = "channel") -> None:
        self.level = check_level(level, ("channel",))

    def supports(self, backbone: Backbone) -> str | None:
        if not any(not weight.is_meta for weight in gammas(backbone).values()):
            return "it has no batch norms, whose scales are compared"
        if reason := super().supports(backbone):
            return reason
        bare = [name for name, scales in scales_of(backbone, backbone.units(self.level)).items() if not len(scales)]
        return f"no batch norm goes with some of its units, such as {bare[0]!r}" if bare else None

    def compute(self) -> dict[str, dict[str, float]]:
        scales = scales_of(self.backbone, self.units)
        return self.table(score=torch.stack([scales[unit.name].abs().mean() for unit in self.units]))


def scales_of(backbone: Backbone, units: Sequence[Unit]) -> dict[str, Tensor]:
    """{unit: the gammas that go with it, (n,) in float64}."""
    tensors, found = gammas(backbone), {}
    for unit in units:
        freed = [part for part in backbone.freed_weights(unit.name, tensors) if not part.is_meta]
        found[unit.name] = torch.cat([zeros(0), *(part.double().cpu() for part in freed)])
    return found


def gammas(backbone: Any) -> dict[str, Tensor]:
    """A network's parameters by name, of which only those that scale a batch norm have values; others are meta."""
    modules = backbone.network.named_modules()
    scales = {f"{name}.weight" for name, part in modules if isinstance(part, _BatchNorm)}
    return {name: w.detach() if name in scales else w.to("meta") for name, w in backbone.weights().items()}
