"""Blocks of channels as units of width: found through torch-pruning's dependency graph, sliced out of copies.

The baseline of width is Diff-Pruning (arXiv 2305.10924): channels of diffusion U-Nets scored by Taylor importance and
removed through torch-pruning. torch-pruning only says here which channels are coupled; the slicing is done by
`resize` of the file that travels with exports, so that a pruned network and its reloaded export are made by the same
lines.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch_pruning
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from criteria.base import Unit
from lightning_modules.backbones.pruned_unet import axes, depthwise, resize, size, sizes, width_of

Cuts = dict[tuple[str, str], Tensor]
"""{(layer, "out" or "in"): indices of channels}; what has the same channels on both sides, as norms do, has "out"."""


class Blocks:
    """Blocks of coupled channels of a network, named `<group>:<number>`.

    `blocks` are {group: one Cuts a block}, groups in the order of the forward pass; `uses` says of a layer how often an
    element of its weight is multiplied for one sample.
    """

    def __init__(self, network: nn.Module, blocks: Mapping[str, list[Cuts]], uses: Mapping[str, int]) -> None:
        self.network, self.blocks, self.uses = network, blocks, uses
        self.cuts = {f"{group}:{i}": cuts for group, several in blocks.items() for i, cuts in enumerate(several)}

    def units(self) -> list[Unit]:
        """The blocks in the order of the forward pass, with what each frees alone.

        `macs` counts one sample of the inputs that `uses` is for. Where blocks of different groups share weights, they
        free less together than the sum.
        """
        shapes = {name: parameter.to("meta") for name, parameter in self.network.named_parameters()}
        units = []
        for name in self.cuts:
            freed = {key: sum(p.numel() for p in parts) for key, parts in self.parts(name, shapes).items()}
            macs = sum(n * self.uses.get(key.removesuffix(".weight"), 0) for key, n in freed.items())
            units.append(Unit(name, "channel", sum(freed.values()), macs, change="slice"))
        return units

    def slices(self, name: str) -> list[tuple[str, int, Tensor]]:
        """(parameter, dimension, indices) of what goes with a block; two entries where both dimensions are cut."""
        if name not in self.cuts:
            choices = ", ".join(f"{root}:0..{len(blocks) - 1}" for root, blocks in self.blocks.items())
            raise ValueError(f"unit {name!r} is no block of channels; choose among: {choices}")
        found = []
        for (layer, side), indices in self.cuts[name].items():
            module = self.network.get_submodule(layer)
            for tensor, dim in axes(module, side):
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


class Channels(Blocks):
    """The groups of coupled channels of a network, each cut into blocks of consecutive channels.

    `forward(network)` runs the network once on example inputs and returns its output tensors. A group's root is the
    layer with the fewest output channels in it, the first of the forward pass among those. A block is the largest
    divisor of the root's count that is at most `block` and at most half of the count (our choice: widths stay
    multiples of 8 where they are, and every group has at least two blocks).

    Whole stay: the network's inputs and outputs; the outputs of `ignored` layers and of everything coupled to them;
    the inner dimension of diffusers' attentions, so heads are untouched (their inputs and outputs are part of the
    residual stream, a transformer's feed-forward is a group like any other); grouped convolutions that are not
    depthwise; what is coupled to layers or parameters that `sizes` does not know; and streams that the graph cannot
    follow, seen by a block that takes channels of another one with it or by a layer whose outputs are only partly
    covered (the zero-padded shortcuts of CIFAR ResNets). Nothing here is particular to U-Nets but the functions
    `attention_projections` and `mend`.
    """

    def __init__(
        self,
        network: nn.Module,
        forward: Callable[[nn.Module], Any],
        block: int = 8,
        ignored: Sequence[nn.Module] = (),
    ) -> None:
        if block < 1:
            raise ValueError(f"block={block} is not a number of channels; choose 1 or more (8 suits most hardware)")
        kept = {id(layer) for layer in [*ignored, *attention_projections(network)]}
        graph = Graph(network, forward, {name for name, module in network.named_modules() if id(module) in kept})
        super().__init__(network, graph.blocks(block), graph.uses)

    def sliced(self, names: Iterable[str]) -> nn.Module:
        """A copy of the network without these blocks, without gradients.

        A GroupNorm gets the largest number of groups, at most the original, that divides its new count (our choice:
        torch-pruning leaves it as it is, which fails where it does not divide). What it normalises together are then
        other channels than before: behind a norm, removing channels is not the same as zeroing them. Raises
        ValueError for an unknown block and where nothing of a group would be left.
        """
        removed = self.together(names)
        student = copy.deepcopy(self.network)
        student.zero_grad()
        smaller = sizes(student)
        dims: dict[int, list[tuple[int, Tensor]]] = {}
        for (layer, side), indices in removed.items():
            module = student.get_submodule(layer)
            for tensor, dim in axes(module, side):
                dims.setdefault(id(getattr(module, tensor)), []).append((dim, indices))
            smaller[layer] = shrunk(module, side, smaller[layer], len(indices))
        state = student.state_dict(keep_vars=True)  # by identity: a module may be registered under two names
        for key, tensor in state.items():
            for dim, indices in dims.get(id(tensor), ()):
                state[key] = without(state[key], dim, indices)
        resize(student, smaller)
        student.load_state_dict(state)
        return student


class Graph:
    """torch-pruning's graph of a copy of a network, in terms of layers' names."""

    def __init__(self, network: nn.Module, forward: Callable[[nn.Module], Any], kept: set[str]) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            twin = copy.deepcopy(network).requires_grad_(True)
            self.kept = kept
            self.names = {module: name for name, module in twin.named_modules() if size(module)}
            self.layers = {name: module for module, name in self.names.items()}
            self.uses: dict[str, int] = {}
            for module in self.names:
                if isinstance(module, (_ConvNd, nn.Linear)):
                    module.register_forward_hook(self.count)
            self.graph = torch_pruning.DependencyGraph().build_dependency(
                twin, None, forward_fn=lambda twin, _: traceable(forward(twin)), verbose=False
            )

    def count(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """`uses`: how often an element of a layer's weight is multiplied for one sample, in order of execution."""
        into, out = size(module)
        at, width = (inputs[0], into) if getattr(module, "transposed", False) else (output, out)
        name = self.names[module]
        self.uses[name] = self.uses.get(name, 0) + at.numel() // width // len(at)

    def blocks(self, block: int) -> dict[str, list[Cuts]]:
        """{root: its blocks}, roots in the order of the forward pass."""
        found: dict[str, list[Cuts]] = {}
        seen: set[str] = set()
        for first in self.uses:
            if first in seen or self.graph.module2node.get(self.layers[first]) is None:
                continue
            group, removable = self.coupled(first, self.width(first))
            members = [name for name in self.uses if (name, "out") in group]
            seen.update(members)
            if removable:
                root = min(members, key=self.width)
                found[root] = self.divided(root, block)
        return {root: found[root] for root in self.uses if found.get(root)}

    def divided(self, root: str, block: int) -> list[Cuts]:
        """A group's blocks; none where it has a single channel or the graph does not follow it (see Channels)."""
        partners = len(self.coupled(root, 1)[0][root, "out"][0])  # 2 for a gated layer: channel i of each half
        count = self.width(root) // partners
        if count < 2:
            return []
        length = max(n for n in range(1, min(block, count // 2) + 1) if count % n == 0)
        group = self.coupled(root, count)[0]
        blocks = [
            {key: part for key, (indices, of) in group.items() if len(part := indices[of // length == i])}
            for i in range(count // length)
        ]
        alone = {key: indices for key, (indices, _) in self.coupled(root, length)[0].items()}
        followed = alone.keys() == blocks[0].keys() and all(torch.equal(alone[key], blocks[0][key]) for key in alone)
        for (layer, side), (indices, _) in group.items():
            extent = width_of(self.layers[layer], side)
            followed &= int(indices[-1]) < extent
            followed &= side == "in" or layer not in self.uses or len(indices) == extent
        return blocks if followed else []

    def coupled(self, layer: str, count: int) -> tuple[dict[tuple[str, str], tuple[Tensor, Tensor]], bool]:
        """What goes with the first output channels of a layer, and whether all of it can go.

        {(layer, side): (indices of channels, the first layer's channel that each goes with)}
        """
        module = self.layers[layer]
        prune = self.graph.get_pruner_of_module(module).prune_out_channels
        found = {}
        removable = True
        for item in self.graph.get_pruning_group(module, prune, list(range(count))).items:
            target = item.dep.target.module
            if target not in self.names:
                fixed = isinstance(target, (torch_pruning.ops._OutputOp, nn.Parameter))
                removable &= not fixed and not any(True for _ in target.parameters())
                continue
            two_sided = isinstance(target, (_ConvNd, nn.Linear)) and not depthwise(target)
            side = "out" if not two_sided or self.graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            removable &= can_shrink(target) and not (side == "out" and self.names[target] in self.kept)
            indices, order = torch.tensor(item.idxs).sort()
            found[self.names[target], side] = (indices, torch.tensor(item.root_idxs)[order])
        return found, removable

    def width(self, layer: str) -> int:
        """Output channels of a convolution or linear layer."""
        return size(self.layers[layer])[1]


def traceable(outputs: Any) -> list[Tensor]:
    """A network's output tensors, each after an operation of its own, so that outputs are nodes of the graph."""
    tensors = torch_pruning.utils.flatten_as_list(outputs)
    if not any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors):
        raise ValueError("forward=... returns no tensor with a gradient; channels are traced through autograd")
    return [tensor * 1 for tensor in tensors if isinstance(tensor, Tensor) and tensor.requires_grad]


def attention_projections(network: nn.Module) -> list[nn.Module]:
    """The layers of diffusers' attentions whose outputs are divided into heads."""
    names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    attentions = [module for module in network.modules() if isinstance(module, Attention)]
    return [layer for module in attentions for name in names if (layer := getattr(module, name, None)) is not None]


def can_shrink(module: nn.Module) -> bool:
    """Can channels of a layer be removed? Not of grouped convolutions, nor of a LayerNorm over several dimensions."""
    if isinstance(module, _ConvNd):
        return module.groups == 1 or depthwise(module)
    return not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) == 1


def shrunk(module: nn.Module, side: str, old: list[int], fewer: int) -> list[int]:
    """A layer's `size` with some channels fewer on one side."""
    if isinstance(module, nn.GroupNorm):
        count = old[0] - fewer
        return [count, max(n for n in range(1, old[1] + 1) if count % n == 0)]
    if isinstance(module, _ConvNd) and depthwise(module):
        return [n - fewer for n in old]
    changed = len(old) - 1 if side == "out" else 0
    return [n - fewer if i == changed else n for i, n in enumerate(old)]


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
