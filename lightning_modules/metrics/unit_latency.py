"""How much time the removal of each unit saves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from criteria.base import Unit
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.metrics.cost import latencies

WHOLE = "the whole network"
"""No unit is called so: names of units are module paths."""


@dataclass(frozen=True)
class UnitLatencies:
    """Latencies of one forward pass, in whole microseconds."""

    network: int
    """of the whole network"""
    saved: dict[str, int]
    """{unit: what its removal alone saves}; below zero where the pruned network was slower"""


def measure_unit_latencies(
    backbone: NetworkBackbone, units: Sequence[Unit], protocol: Any, device: torch.device
) -> UnitLatencies:
    """Return the medians over rounds in which the whole network and each network without one unit take turns.

    `protocol.latency_repeats` rounds, `protocol.latency_batch` samples at once.
    """
    inputs = backbone.to(device).eval().example_inputs(protocol.latency_batch, device)

    def without(names: Sequence[str]) -> Callable[[], Any]:
        def call() -> Any:
            with backbone.without(names):
                return backbone.predict(inputs)

        return call

    calls = {WHOLE: without([])} | {unit.name: without([unit.name]) for unit in units}
    times = latencies(calls, protocol.latency_repeats, device)
    whole = times.pop(WHOLE)
    return UnitLatencies(round(1000 * whole), {name: round(1000 * (whole - time)) for name, time in times.items()})
