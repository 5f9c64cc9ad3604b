"""Gates between 0 (removed) and 1 (as it is) on the units of a network, and the cost of a gated network.

`gates` are {group: (units of the group,)}. A block or an operator is a group of its own; channels have several units
per group (see width/blocks.py).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from criteria.base import Level, Shared, Unit
from criteria.selection.base import Budget
from lightning_modules.backbones.removal import forward_without_hooks, removing


@contextlib.contextmanager
def gate_units(backbone: Any, gates: Mapping[str, Tensor], level: str) -> Iterator[None]:
    """Weigh the output of each gated unit against that of its stand-in while the context lasts.

    With a gate of 1 the output is the unit's, with 0 the stand-in's, bit for bit. A shared part is weighed by the
    fraction of it that is left. Gradients reach the gates.
    """
    if level == Level.CHANNEL:
        with backbone.channels.gated(gates):
            yield
        return
    shared = [part for part in backbone.shared(level) if gates.keys() >= set(part.units)]
    of_shared = {part.name: 1 - removed_fraction(gates, part) for part in shared}
    handles = []
    for name, gate in (dict(gates) | of_shared).items():
        unit = backbone.network.get_submodule(name)
        handles.append(unit.register_forward_hook(make_gate(backbone.stand_in(unit), gate), with_kwargs=True))
    with removing(handles):
        yield


def cost_under_gates(backbone: Any, gates: Mapping[str, Tensor], budget: str, level: str) -> Tensor:
    """Return what is left of the cost `budget` under gates: a float64 scalar with gradients.

    With gates of 0 and 1 it is the exact cost of the network without the units of gate 0. In between each unit frees
    the fraction 1 - gate of its cost, and a shared part the product of these fractions (our choice). A unit inside
    another one is freed with that, and only once.
    """
    device = next(iter(gates.values())).device
    left = torch.tensor(backbone.totals()[budget], dtype=torch.float64, device=device)
    if level == Level.CHANNEL:
        return left - backbone.channels.freed(gates, budget)
    parts: list[Unit | Shared] = [*backbone.units(level), *backbone.shared(level)]
    for part in parts:
        if gates.keys() >= set(part.units):
            cost = part.params if budget == Budget.PARAMS else part.macs
            freed = cost * removed_fraction(gates, part).double()
            outer = part.inside if isinstance(part, Unit) else None
            left = left - (freed if outer is None or outer not in gates else freed * gates[outer].squeeze())
    return left


def removed_fraction(gates: Mapping[str, Tensor], part: Unit | Shared) -> Tensor:
    """Return the fraction of a part that is removed: the product of 1 - gate over the units that it goes with."""
    return torch.stack([1 - gates[name].squeeze() for name in part.units]).prod()


def make_gate(stand_in: nn.Module, gate: Tensor) -> Callable[..., Any]:
    """Return a forward hook that weighs each output tensor of a module against that of its stand-in."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        other = forward_without_hooks(stand_in, args, kwargs)
        if isinstance(output, Tensor):
            return torch.lerp(other, output, gate.to(output))  # at 0 and 1 one of them, bit for bit
        pairs = zip(output, other, strict=True)
        return tuple(torch.lerp(b, a, gate.to(a)) if isinstance(a, Tensor) else a for a, b in pairs)

    return hook
