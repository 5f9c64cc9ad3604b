"""How much time the removal of each unit saves."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from criteria.base import Unit
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.metrics.cost import latencies


def unit_savings(
    backbone: NetworkBackbone, units: Sequence[Unit], protocol: Any, device: torch.device
) -> dict[str, int]:
    """Microseconds of one forward that the removal of each unit saves; under "" those of the whole network.

    Medians over `protocol.latency_repeats` rounds in which the whole network and every pruned one take their turns.
    """
    inputs = backbone.to(device).eval().example_inputs(protocol.latency_batch, device)

    def without(name: str) -> Callable[[], Any]:
        def call() -> Any:
            with backbone.without([name] if name else []):
                return backbone.predict(inputs)

        return call

    times = latencies(
        {name: without(name) for name in ("", *(unit.name for unit in units))}, protocol.latency_repeats, device
    )
    whole = times.pop("")
    return {"": round(1000 * whole)} | {name: round(1000 * (whole - time)) for name, time in times.items()}
