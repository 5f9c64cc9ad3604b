"""Blocks of coupled channels as units of width: what they weigh, what they free, and gates in their place."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from criteria.base import ChangeKind, Level, Unit
from lightning_modules.backbones.diffusion.pruned_unet import channel_axes, get_size, get_width

Cuts = dict[tuple[str, str], Tensor]
"""{(layer, "out" or "in"): indices of channels}; what has the same channels on both sides, as norms do, has "out"."""


class Blocks:
    """Blocks of coupled channels of a network, named `<group>:<number>`.

    `blocks` are {group: one Cuts a block}, groups in the order of the forward pass; `uses` says of a layer how often an
    element of its weight is multiplied for one sample, of norms too. Gates are in front of what takes channels in, and
    behind the layers that `outlets` names.
    """

    def __init__(
        self,
        network: nn.Module,
        blocks: Mapping[str, list[Cuts]],
        uses: Mapping[str, int],
        outlets: Iterable[str] = (),
    ) -> None:
        self.network, self.blocks, self.uses, self.outlets = network, blocks, uses, set(outlets)
        self.cuts = {f"{group}:{i}": cuts for group, several in blocks.items() for i, cuts in enumerate(several)}
        self.places: dict[tuple[str, str], dict[str, tuple[Tensor, Tensor]]] = {}
        """{(layer, side): {group: (indices of channels, the unit of the group that each goes with)}}"""
        for group, several in blocks.items():
            for key in {key: None for cuts in several for key in cuts}:
                found = [(i, cuts[key]) for i, cuts in enumerate(several) if key in cuts]
                units = torch.tensor([i for i, indices in found for _ in range(len(indices))])
                self.places.setdefault(key, {})[group] = (torch.cat([indices for _, indices in found]), units)

    def units(self) -> list[Unit]:
        """The blocks in the order of the forward pass, with what each frees alone.

        `macs` counts one sample of the inputs that `uses` is for. Where blocks of different groups share weights, they
        free less together than the sum.
        """
        shapes = {name: parameter.to("meta") for name, parameter in self.network.named_parameters()}
        units = []
        for name in self.cuts:
            freed = {key: sum(p.numel() for p in parts) for key, parts in self.parts(name, shapes).items()}
            macs = sum(n * self.products(key.rpartition(".")[0]) for key, n in freed.items() if key.endswith(".weight"))
            units.append(Unit(name, "channel", sum(freed.values()), macs, ChangeKind.SLICE, level=Level.CHANNEL))
        return units

    def products(self, layer: str) -> int:
        """How often an element of the weight of a convolution or linear layer is multiplied; 0 of other layers."""
        return self.uses.get(layer, 0) if multiplies(self.network.get_submodule(layer)) else 0

    # Costs of many blocks together

    def cost(self, names: Iterable[str], budget: str) -> int:
        """What several blocks free together of a cost (see `layer_cost`); ValueError for an unknown one."""
        gates = {group: torch.ones(len(several)) for group, several in self.blocks.items()}
        for name in names:
            self.known(name)
            group, _, number = name.rpartition(":")
            gates[group][int(number)] = 0
        return round(float(self.freed(gates, budget)))

    def freed(self, gates: Mapping[str, Tensor], budget: str) -> Tensor:
        """What blocks free of a cost under gates {group: (blocks,)}: a float64 scalar with gradients.

        A layer's width is what is open of it: the sum of its channels' gates. With gates of 0 and 1 that is exactly
        what the blocks of gate 0 free together.
        """
        touched = [layer for (layer, _), groups in self.places.items() if groups.keys() & gates.keys()]
        freed = torch.zeros((), dtype=torch.float64, device=next(iter(gates.values())).device)
        for layer in dict.fromkeys(touched):
            into, out = (get_width(self.network.get_submodule(layer), side) for side in ("in", "out"))
            closed_in, closed_out = (self.closed((layer, side), gates) for side in ("in", "out"))
            freed = freed + self.layer_cost(layer, into, out, budget)
            freed = freed - self.layer_cost(layer, into - closed_in, out - closed_out, budget)
        return freed

    def closed(self, key: tuple[str, str], gates: Mapping[str, Tensor]) -> Any:
        """How many channels of one side of a layer are closed: the sum of 1 - gate."""
        groups = self.places.get(key, {})
        return sum((1 - gates[group].double()[units]).sum() for group, (_, units) in groups.items() if group in gates)

    def whole(self, budget: str) -> int:
        """What all layers cost."""
        layers = {name: module for name, module in self.network.named_modules() if get_size(module)}
        return sum(
            self.layer_cost(name, get_width(module, "in"), get_width(module, "out"), budget)
            for name, module in layers.items()
        )

    def layer_cost(self, layer: str, into: Any, out: Any, budget: str) -> Any:
        """What a layer of these widths costs: params, or macs of a sample."""
        module = self.network.get_submodule(layer)
        if not multiplies(module):
            parameters = sum(p.numel() // get_width(module, "out") for p in module.parameters(recurse=False))
            return parameters * out if budget == "params" else 0
        taps = module.weight[0, 0].numel()  # type: ignore[index]
        if budget == "params":
            return (into * taps + (module.bias is not None)) * out
        return into * out * taps * self.products(layer)

    # Gates

    @contextlib.contextmanager
    def gated(self, gates: Mapping[str, Tensor]) -> Iterator[None]:
        """Channels are multiplied by their gates {group: (blocks,)} where they are taken in, while the context lasts.

        That is behind the activation. Where no norm looks at several channels, a gate of 0 is the removal.
        """

        def before(layer: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                return (self.scaled(args[0], (layer, "in"), gates), *args[1:])

            return hook

        def behind(layer: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                return self.scaled(output, (layer, "out"), gates)

            return hook

        handles = []
        for (layer, side), groups in self.places.items():
            module = self.network.get_submodule(layer)
            if groups.keys() & gates.keys() and side == "in":
                handles.append(module.register_forward_pre_hook(before(layer)))
            elif groups.keys() & gates.keys() and layer in self.outlets:
                handles.append(module.register_forward_hook(behind(layer)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def scaled(self, x: Tensor, key: tuple[str, str], gates: Mapping[str, Tensor]) -> Tensor:
        """A layer's input or output with its channels multiplied by their gates."""
        module = self.network.get_submodule(key[0])
        scale = x.new_ones(get_width(module, key[1]))
        for group, (indices, units) in self.places[key].items():
            if group in gates:
                scale = scale.index_copy(0, indices.to(x.device), gates[group].to(x)[units.to(x.device)])
        return x * (scale if isinstance(module, nn.Linear) else scale.view(-1, *[1] * (x.dim() - 2)))

    # What goes

    def known(self, name: str) -> None:
        """Raise ValueError for a name that is no unit."""
        if name not in self.cuts:
            choices = ", ".join(f"{root}:0..{len(blocks) - 1}" for root, blocks in self.blocks.items())
            raise ValueError(f"unit {name!r} is no block of channels; choose among: {choices}")

    def slices(self, name: str) -> list[tuple[str, int, Tensor]]:
        """(parameter, dimension, indices) of what goes with a block; two entries where both dimensions are cut."""
        self.known(name)
        found = []
        for (layer, side), indices in self.cuts[name].items():
            module = self.network.get_submodule(layer)
            for tensor, dim in channel_axes(module, side):
                if isinstance(getattr(module, tensor), nn.Parameter):
                    found.append((f"{layer}.{tensor}", dim, indices))
        return found

    def weights(self, name: str, tensors: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """The parts of the parameters that go with a block, each element once.

        `tensors` may hold something else of the parameters' names and shapes: gradients, averages.
        """
        parts = self.parts(name, dict(self.network.named_parameters()) if tensors is None else tensors)
        return [part for several in parts.values() for part in several]

    def parts(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """`weights` by parameter."""
        cuts: dict[str, list[tuple[int, Tensor]]] = {}
        for key, dim, indices in self.slices(name):
            cuts.setdefault(key, []).append((dim, indices))
        return {key: parts_of(tensors[key], dims) for key, dims in cuts.items()}

    def together(self, names: Iterable[str]) -> Cuts:
        """What goes with several blocks; raises ValueError where a group would be empty."""
        names = set(names)
        for name in names:
            self.slices(name)
        removed: dict[tuple[str, str], list[Tensor]] = {}
        for root, blocks in self.blocks.items():
            chosen = [cuts for i, cuts in enumerate(blocks) if f"{root}:{i}" in names]
            if len(chosen) == len(blocks):
                raise ValueError(f"all {len(blocks)} blocks of {root!r} would go; at least one of each group stays")
            for cuts in chosen:
                for key, indices in cuts.items():
                    removed.setdefault(key, []).append(indices)
        return {key: torch.cat(indices).sort().values for key, indices in removed.items()}

    def remaining(self, names: Iterable[str]) -> tuple[dict[tuple[str, str], Tensor], dict[str, Tensor]]:
        """What goes with several blocks (see `together`), and the network's state without it."""
        removed = self.together(names)
        dims: dict[int, list[tuple[int, Tensor]]] = {}
        for (layer, side), indices in removed.items():
            module = self.network.get_submodule(layer)
            for tensor, dim in channel_axes(module, side):
                dims.setdefault(id(getattr(module, tensor)), []).append((dim, indices))
        state = {}  # by identity: a module may be registered under two names
        for key, tensor in self.network.state_dict(keep_vars=True).items():
            left = tensor.detach()
            for dim, indices in dims.get(id(tensor), ()):
                left = without(left, dim, indices)
            state[key] = left
        return removed, state


def multiplies(module: nn.Module) -> bool:
    """Is this a convolution or a linear layer?"""
    return isinstance(module, _ConvNd | nn.Linear)


def without(tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
    """A tensor without some indices of one dimension."""
    kept = torch.ones(tensor.shape[dim], dtype=torch.bool)
    kept[indices] = False
    return tensor.index_select(dim, kept.nonzero().flatten().to(tensor.device))


def parts_of(tensor: Tensor, cuts: list[tuple[int, Tensor]]) -> list[Tensor]:
    """What some cuts take from a tensor, each element once: a later cut leaves out what an earlier one took."""
    (dim, indices), *later = cuts
    part = tensor.index_select(dim, indices.to(tensor.device))
    return [part, *(parts_of(without(tensor, dim, indices), later) if later else [])]
