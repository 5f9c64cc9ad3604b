"""Blocks of channels as units of width: found through torch-pruning's dependency graph, sliced out of copies.

The baseline of width is Diff-Pruning (arXiv 2305.10924): channels of diffusion U-Nets scored by Taylor importance and
removed through torch-pruning. torch-pruning only says here which channels are coupled; the slicing is done by
`resize_layers` of the file that travels with exports, so that a pruned network and its reloaded export are made by the
same lines.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch_pruning
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_modules.backbones.diffusion.pruned_unet import (
    get_size,
    get_width,
    is_depthwise,
    list_sizes,
    resize_layers,
)
from lightning_modules.backbones.width.blocks import Blocks, Cuts, multiplies


class Channels(Blocks):
    """The groups of coupled channels of a network, each cut into blocks of consecutive channels.

    `forward(network)` runs the network once on example inputs and returns its output tensors. A group's root is the
    layer with the fewest output channels in it, the first of the forward pass among those. A block is the largest
    divisor of the root's count that is at most `block` and at most half of the count (our choice: widths stay
    multiples of 8 where they are, and every group has at least two blocks).

    Whole stay: the network's inputs and outputs; the outputs of `ignored` layers and of everything coupled to them;
    the inner dimension of diffusers' attentions, so heads are untouched (their inputs and outputs are part of the
    residual stream, a transformer's feed-forward is a group like any other); grouped convolutions that are not
    depthwise; what is coupled to layers or parameters that `list_sizes` does not know; and streams that the graph
    cannot follow, seen by a block that takes channels of another one with it or by a layer whose outputs are only
    partly covered (the zero-padded shortcuts of CIFAR ResNets). Nothing here is particular to U-Nets but the functions
    `attention_projections` and `update_channel_counts`.

    `further` are groups of other channels, by their root layer; for these and `outlets` see Blocks.
    """

    def __init__(
        self,
        network: nn.Module,
        forward: Callable[[nn.Module], Any],
        block: int = 8,
        ignored: Sequence[nn.Module] = (),
        further: Mapping[str, list[Cuts]] | None = None,
        outlets: Sequence[str] = (),
    ) -> None:
        check_block(block)
        kept = {id(layer) for layer in [*ignored, *attention_projections(network)]}
        graph = Graph(network, forward, {name for name, module in network.named_modules() if id(module) in kept})
        blocks = graph.blocks(block) | dict(further or {})
        super().__init__(network, {root: blocks[root] for root in graph.order if blocks.get(root)}, graph.uses, outlets)

    def sliced(self, names: Iterable[str]) -> nn.Module:
        """A copy of the network without these blocks, without gradients.

        A GroupNorm gets the largest number of groups, at most the original, that divides its new count (our choice:
        torch-pruning leaves it as it is, which fails where it does not divide). What it normalises together are then
        other channels than before: behind a norm, removing channels is not the same as zeroing them. Raises
        ValueError for an unknown block and where nothing of a group would be left.
        """
        removed, state = self.remaining(names)
        student = copy.deepcopy(self.network)
        student.zero_grad()
        smaller = list_sizes(student)
        for (layer, side), indices in removed.items():
            smaller[layer] = shrunk(student.get_submodule(layer), side, smaller[layer], len(indices))
        resize_layers(student, smaller)
        student.load_state_dict(state)
        return student


class Graph:
    """torch-pruning's graph of a copy of a network, in terms of layers' names."""

    def __init__(self, network: nn.Module, forward: Callable[[nn.Module], Any], kept: set[str]) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            twin = copy.deepcopy(network).requires_grad_(True)
            self.kept = kept
            self.names = {module: name for name, module in twin.named_modules() if get_size(module)}
            self.layers = {name: module for module, name in self.names.items()}
            self.uses: dict[str, int] = {}
            for module in self.names:
                if not isinstance(module, nn.Embedding):
                    module.register_forward_hook(self.count)
            self.graph = torch_pruning.DependencyGraph().build_dependency(
                twin, None, forward_fn=lambda twin, _: traceable(forward(twin)), verbose=False
            )
        self.order = [name for name in self.uses if multiplies(self.layers[name])]

    def count(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """`uses`: how often an element of a layer's weight is multiplied for one sample, in order of execution."""
        transposed = getattr(module, "transposed", False)
        at, width = (inputs[0], get_width(module, "in")) if transposed else (output, get_width(module, "out"))
        name = self.names[module]
        self.uses[name] = self.uses.get(name, 0) + at.numel() // width // len(at)

    def blocks(self, block: int) -> dict[str, list[Cuts]]:
        """{root: its blocks}, roots in the order of the forward pass."""
        found: dict[str, list[Cuts]] = {}
        seen: set[str] = set()
        for first in self.order:
            if first in seen or self.graph.module2node.get(self.layers[first]) is None:
                continue
            group, removable = self.coupled(first, self.width(first))
            members = [name for name in self.order if (name, "out") in group]
            seen.update(members)
            if removable:
                root = min(members, key=self.width)
                found[root] = self.divided(root, block)
        return {root: found[root] for root in self.order if found.get(root)}

    def divided(self, root: str, block: int) -> list[Cuts]:
        """A group's blocks; none where it has a single channel or the graph does not follow it (see Channels)."""
        partners = len(self.coupled(root, 1)[0][root, "out"][0])  # 2 for a gated layer: channel i of each half
        count = self.width(root) // partners
        if count < 2:
            return []
        length = block_length(count, block)
        group = self.coupled(root, count)[0]
        blocks: list[Cuts] = [{} for _ in range(count // length)]
        for key, (indices, of) in group.items():
            order = (of // length).sort(stable=True)
            parts = indices[order.indices].split(torch.bincount(order.values, minlength=len(blocks)).tolist())
            for cuts, part in zip(blocks, parts, strict=True):
                if len(part):
                    cuts[key] = part
        alone = {key: indices for key, (indices, _) in self.coupled(root, length)[0].items()}
        followed = alone.keys() == blocks[0].keys() and all(torch.equal(alone[key], blocks[0][key]) for key in alone)
        for (layer, side), (indices, _) in group.items():
            extent = get_width(self.layers[layer], side)
            followed &= int(indices[-1]) < extent
            followed &= side == "in" or not multiplies(self.layers[layer]) or len(indices) == extent
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
            two_sided = isinstance(target, (_ConvNd, nn.Linear)) and not is_depthwise(target)
            side = "out" if not two_sided or self.graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            removable &= can_shrink(target) and not (side == "out" and self.names[target] in self.kept)
            indices, order = torch.tensor(item.idxs).sort()
            found[self.names[target], side] = (indices, torch.tensor(item.root_idxs)[order])
        return found, removable

    def width(self, layer: str) -> int:
        """Output channels of a convolution or linear layer."""
        return get_size(self.layers[layer])[1]


def check_block(block: int) -> None:
    """Raise ValueError for a block that is no number of channels."""
    if block < 1:
        raise ValueError(f"block={block} is not a number of channels; choose 1 or more (8 suits most hardware)")


def block_length(count: int, block: int) -> int:
    """The largest divisor of some channels' number that is at most `block` and at most half of it."""
    return max(n for n in range(1, min(block, count // 2) + 1) if count % n == 0)


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
        return module.groups == 1 or is_depthwise(module)
    return not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) == 1


def shrunk(module: nn.Module, side: str, old: list[int], fewer: int) -> list[int]:
    """A layer's size with some channels fewer on one side."""
    if isinstance(module, nn.GroupNorm):
        count = old[0] - fewer
        return [count, max(n for n in range(1, old[1] + 1) if count % n == 0)]
    if isinstance(module, _ConvNd) and is_depthwise(module):
        return [n - fewer for n in old]
    changed = len(old) - 1 if side == "out" else 0
    return [n - fewer if i == changed else n for i, n in enumerate(old)]
