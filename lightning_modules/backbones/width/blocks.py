"""Blocks of coupled channels as units of width: their weights, the costs they free, and gates on them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from criteria.base import ChangeKind, Level, Unit
from lightning_modules.backbones.diffusion.pruned_unet import channel_axes, get_size, get_width
from lightning_modules.backbones.removal import removing

Cuts = dict[tuple[str, str], Tensor]
"""{(layer, "out" or "in"): indices of channels}. Layers with the same channels on both sides, as norms, have "out"."""


class Blocks:
    """Blocks of coupled channels of a network; a block is a unit named `<group>:<number>`.

    Gates multiply the inputs of the layers that read the channels, and the outputs of the layers in `outlets`.

    Args:
        network: the network; it is never changed.
        blocks: {group: the Cuts of each of its blocks}, groups in the order of the forward pass.
        uses: {layer: how often each element of its weight is used for one sample}, norms included.
        outlets: layers whose outputs are gated, because no layer reads the channels of a group alone.
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
        self.sides: dict[tuple[str, str], dict[str, tuple[Tensor, Tensor]]] = {}
        """{(layer, side): {group: (indices of channels, the number of the block that each belongs to)}}"""
        for group, several in blocks.items():
            for key in {key: None for cuts in several for key in cuts}:
                indices_by_block = [(i, cuts[key]) for i, cuts in enumerate(several) if key in cuts]
                numbers = torch.tensor([i for i, indices in indices_by_block for _ in range(len(indices))])
                indices = torch.cat([indices for _, indices in indices_by_block])
                self.sides.setdefault(key, {})[group] = (indices, numbers)

    def units(self) -> list[Unit]:
        """Return the blocks as units in the order of the forward pass, each with the cost that it frees alone.

        MACs are those of one sample of the inputs that `uses` was counted on. Blocks of different groups that share
        weights free less together than the sum of these costs: see `cost`.
        """
        shapes = {name: parameter.to("meta") for name, parameter in self.network.named_parameters()}
        units = []
        for name in self.cuts:
            freed = {key: sum(p.numel() for p in parts) for key, parts in self.parts(name, shapes).items()}
            macs = sum(n * self.products(key.rpartition(".")[0]) for key, n in freed.items() if key.endswith(".weight"))
            units.append(Unit(name, "channel", sum(freed.values()), macs, ChangeKind.SLICE, level=Level.CHANNEL))
        return units

    def products(self, layer: str) -> int:
        """Return how often a weight of a layer is multiplied for one sample; 0 where it is no product, as in norms."""
        return self.uses.get(layer, 0) if multiplies(self.network.get_submodule(layer)) else 0

    # Costs of several blocks together

    def cost(self, names: Iterable[str], budget: str) -> int:
        """Return the cost that several blocks free together; raises ValueError for an unknown name."""
        gates = {group: torch.ones(len(several)) for group, several in self.blocks.items()}
        for name in names:
            self.check_name(name)
            group, _, number = name.rpartition(":")
            gates[group][int(number)] = 0
        return round(float(self.freed(gates, budget)))

    def freed(self, gates: Mapping[str, Tensor], budget: str) -> Tensor:
        """Return the cost that is freed under gates {group: (blocks,)}: a float64 scalar with gradients.

        The width of a layer is the sum of the gates of its channels. With gates of 0 and 1 the cost is exactly what the
        blocks of gate 0 free together.
        """
        gated_layers = [layer for (layer, _), groups in self.sides.items() if groups.keys() & gates.keys()]
        freed = torch.zeros((), dtype=torch.float64, device=next(iter(gates.values())).device)
        for layer in dict.fromkeys(gated_layers):
            into, out = (get_width(self.network.get_submodule(layer), side) for side in ("in", "out"))
            closed_in, closed_out = (self.closed_width((layer, side), gates) for side in ("in", "out"))
            freed = freed + self.layer_cost(layer, into, out, budget)
            freed = freed - self.layer_cost(layer, into - closed_in, out - closed_out, budget)
        return freed

    def closed_width(self, side: tuple[str, str], gates: Mapping[str, Tensor]) -> Any:
        """Return the closed width of one side of a layer: the sum of 1 - gate over its channels."""
        groups = self.sides.get(side, {})
        return sum(
            (1 - gates[group].double()[numbers]).sum() for group, (_, numbers) in groups.items() if group in gates
        )

    def total_cost(self, budget: str) -> int:
        """Return the cost of all layers of the network."""
        layers = {name: module for name, module in self.network.named_modules() if get_size(module)}
        return sum(
            self.layer_cost(name, get_width(module, "in"), get_width(module, "out"), budget)
            for name, module in layers.items()
        )

    def layer_cost(self, layer: str, into: Any, out: Any, budget: str) -> Any:
        """Return the cost (params, or macs of one sample) of a layer with `into` input and `out` output channels.

        Widths may be tensors and need not be whole numbers.
        """
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
        """Multiply channels by their gates, {group: (blocks,)}, where layers read them, while the context lasts.

        That is behind norm and activation. A gate of 0 equals the removal, except behind a norm that computes its
        statistics over several channels.
        """

        def gate_input(layer: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                return (self.scale_channels(args[0], (layer, "in"), gates), *args[1:])

            return hook

        def gate_output(layer: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                return self.scale_channels(output, (layer, "out"), gates)

            return hook

        handles = []
        for (layer, side), groups in self.sides.items():
            module = self.network.get_submodule(layer)
            if groups.keys() & gates.keys() and side == "in":
                handles.append(module.register_forward_pre_hook(gate_input(layer)))
            elif groups.keys() & gates.keys() and layer in self.outlets:
                handles.append(module.register_forward_hook(gate_output(layer)))
        with removing(handles):
            yield

    def scale_channels(self, x: Tensor, side: tuple[str, str], gates: Mapping[str, Tensor]) -> Tensor:
        """Return an input or output of a layer with its channels multiplied by their gates."""
        module = self.network.get_submodule(side[0])
        scale = x.new_ones(get_width(module, side[1]))
        for group, (indices, numbers) in self.sides[side].items():
            if group in gates:
                scale = scale.index_copy(0, indices.to(x.device), gates[group].to(x)[numbers.to(x.device)])
        return x * (scale if isinstance(module, nn.Linear) else scale.view(-1, *[1] * (x.dim() - 2)))

    # Removed weights

    def check_name(self, name: str) -> None:
        """Raise ValueError for a name that is no block."""
        if name not in self.cuts:
            choices = ", ".join(f"{root}:0..{len(blocks) - 1}" for root, blocks in self.blocks.items())
            raise ValueError(f"unit {name!r} is no block of channels; choose among: {choices}")

    def slices(self, name: str) -> list[tuple[str, int, Tensor]]:
        """Return (parameter, dimension, indices) of the slices that belong to a block.

        A parameter with channels of the block in two dimensions has two entries.
        """
        self.check_name(name)
        slices = []
        for (layer, side), indices in self.cuts[name].items():
            module = self.network.get_submodule(layer)
            for tensor, dim in channel_axes(module, side):
                if isinstance(getattr(module, tensor), nn.Parameter):
                    slices.append((f"{layer}.{tensor}", dim, indices))
        return slices

    def weights(self, name: str, tensors: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Return the parts of the parameters that belong to a block, each element once.

        `tensors` may be others with the names and shapes of the parameters: gradients, or sums.
        """
        parts = self.parts(name, dict(self.network.named_parameters()) if tensors is None else tensors)
        return [part for several in parts.values() for part in several]

    def parts(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """Return {parameter: its parts that belong to a block}, each element once; see `weights`."""
        dims: dict[str, list[tuple[int, Tensor]]] = {}
        for key, dim, indices in self.slices(name):
            dims.setdefault(key, []).append((dim, indices))
        return {key: take_parts(tensors[key], several) for key, several in dims.items()}

    def merge_cuts(self, names: Iterable[str]) -> Cuts:
        """Return the Cuts of several blocks together, indices sorted.

        Raises ValueError for an unknown name, and where no block of a group would be left.
        """
        names = set(names)
        for name in names:
            self.check_name(name)
        merged: dict[tuple[str, str], list[Tensor]] = {}
        for root, blocks in self.blocks.items():
            chosen = [cuts for i, cuts in enumerate(blocks) if f"{root}:{i}" in names]
            if len(chosen) == len(blocks):
                raise ValueError(f"all {len(blocks)} blocks of {root!r} would go; at least one of each group stays")
            for cuts in chosen:
                for key, indices in cuts.items():
                    merged.setdefault(key, []).append(indices)
        return {key: torch.cat(indices).sort().values for key, indices in merged.items()}

    def remaining(self, names: Iterable[str]) -> tuple[Cuts, dict[str, Tensor]]:
        """Return the Cuts of several blocks together (see `merge_cuts`), and the network's state without them."""
        removed = self.merge_cuts(names)
        dims: dict[int, list[tuple[int, Tensor]]] = {}
        for (layer, side), indices in removed.items():
            module = self.network.get_submodule(layer)
            for tensor, dim in channel_axes(module, side):
                dims.setdefault(id(getattr(module, tensor)), []).append((dim, indices))
        state = {}  # by identity: a module may be registered under two names
        for key, tensor in self.network.state_dict(keep_vars=True).items():
            left = tensor.detach()
            for dim, indices in dims.get(id(tensor), ()):
                left = delete_indices(left, dim, indices)
            state[key] = left
        return removed, state


def multiplies(module: nn.Module) -> bool:
    """Return whether a module is a convolution or a linear layer."""
    return isinstance(module, _ConvNd | nn.Linear)


def delete_indices(tensor: Tensor, dim: int, indices: Tensor) -> Tensor:
    """Return a tensor without some indices of one dimension."""
    kept = torch.ones(tensor.shape[dim], dtype=torch.bool)
    kept[indices] = False
    return tensor.index_select(dim, kept.nonzero().flatten().to(tensor.device))


def take_parts(tensor: Tensor, dims: list[tuple[int, Tensor]]) -> list[Tensor]:
    """Return the elements of a tensor that have one of some indices in one of some dimensions, each element once.

    There is one part per entry (dimension, indices); a later part leaves out what is in an earlier one.
    """
    (dim, indices), *later = dims
    part = tensor.index_select(dim, indices.to(tensor.device))
    return [part, *(take_parts(delete_indices(tensor, dim, indices), later) if later else [])]
