"""Blocks of channels as units of width: found through torch-pruning's dependency graph, sliced out of copies.

torch-pruning only tells here which channels are coupled. The slicing is done by `resize_layers` of the file that
travels with exports, so that a pruned network and its reloaded export are made by the same code.
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
    """The groups of coupled channels of a network, each divided into blocks of consecutive channels.

    The root of a group is its layer with the fewest output channels, the first of the forward pass among several. The
    number of channels in a block is the largest divisor of the root's number of channels that is at most `block` and at
    most half of that number (our choice: widths that are multiples of 8 stay so, and every group has two blocks or
    more).

    These channels are in no group and stay:
    - the network's inputs and outputs;
    - the outputs of `ignored` layers, and all that is coupled to them;
    - the inner dimension of diffusers' attentions, so that heads stay whole;
    - grouped convolutions that are not depthwise;
    - all that is coupled to layers or parameters which `list_sizes` does not know;
    - streams that the graph cannot follow, such as those with the zero-padded shortcuts of CIFAR ResNets. They are
      recognised by a block that takes channels of another block along, or by a layer that is covered only partly.

    Args:
        network: the network; it is never changed.
        forward: runs a network once on example inputs and returns its output tensors.
        block: the most channels per block.
        ignored: layers whose outputs stay.
        further: groups that the graph does not find, by their root layers, each with the Cuts of its blocks.
        outlets: see Blocks.
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
        kept = {id(layer) for layer in [*ignored, *list_attention_projections(network)]}
        graph = Graph(network, forward, {name for name, module in network.named_modules() if id(module) in kept})
        blocks = graph.find_blocks(block) | dict(further or {})
        super().__init__(network, {root: blocks[root] for root in graph.order if blocks.get(root)}, graph.uses, outlets)

    def sliced(self, names: Iterable[str]) -> nn.Module:
        """Return a copy of the network without these blocks and without gradients.

        A GroupNorm gets the largest number of groups, at most the original one, that divides its new number of channels
        (our choice: torch-pruning keeps the number of groups, which fails where it is no divisor). It then normalises
        other channels together than before: behind a norm, removing channels is not the same as zeroing them. Raises
        ValueError for an unknown block, and where no block of a group would be left.
        """
        removed, state = self.remaining(names)
        student = copy.deepcopy(self.network)
        student.zero_grad()
        smaller = list_sizes(student)
        for (layer, side), indices in removed.items():
            smaller[layer] = shrink_size(student.get_submodule(layer), side, smaller[layer], len(indices))
        resize_layers(student, smaller)
        student.load_state_dict(state)
        return student


class Graph:
    """torch-pruning's dependency graph of a copy of a network, by names of layers.

    `forward` is that of Channels. `kept` are the names of the layers whose outputs stay.
    """

    def __init__(self, network: nn.Module, forward: Callable[[nn.Module], Any], kept: set[str]) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            twin = copy.deepcopy(network).requires_grad_(True)
            self.kept = kept
            self.names = {module: name for name, module in twin.named_modules() if get_size(module)}
            self.layers = {name: module for module, name in self.names.items()}
            self.uses: dict[str, int] = {}
            for module in self.names:
                if not isinstance(module, nn.Embedding):
                    module.register_forward_hook(self.count_uses)
            self.graph = torch_pruning.DependencyGraph().build_dependency(
                twin, None, forward_fn=lambda twin, _: make_traceable(forward(twin)), verbose=False
            )
        self.order = [name for name in self.uses if multiplies(self.layers[name])]

    def count_uses(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Add to `uses`, {layer: how often each element of its weight is used for one sample}, in forward order.

        This is a forward hook.
        """
        transposed = getattr(module, "transposed", False)
        at, width = (inputs[0], get_width(module, "in")) if transposed else (output, get_width(module, "out"))
        name = self.names[module]
        self.uses[name] = self.uses.get(name, 0) + at.numel() // width // len(at)

    def find_blocks(self, block: int) -> dict[str, list[Cuts]]:
        """Return {root: the Cuts of its blocks}, roots in the order of the forward pass."""
        blocks: dict[str, list[Cuts]] = {}
        seen: set[str] = set()
        for first in self.order:
            if first in seen or self.graph.module2node.get(self.layers[first]) is None:
                continue
            group, removable = self.find_coupled_channels(first, self.width(first))
            members = [name for name in self.order if (name, "out") in group]
            seen.update(members)
            if removable:
                root = min(members, key=self.width)
                blocks[root] = self.divide_group(root, block)
        return {root: blocks[root] for root in self.order if blocks.get(root)}

    def divide_group(self, root: str, block: int) -> list[Cuts]:
        """Return the Cuts of a group's blocks; none for a single channel, or a group that the graph cannot follow."""
        partners = len(self.find_coupled_channels(root, 1)[0][root, "out"][0])  # 2 for a gated layer, one of each half
        count = self.width(root) // partners
        if count < 2:
            return []
        length = get_block_length(count, block)
        group = self.find_coupled_channels(root, count)[0]
        blocks: list[Cuts] = [{} for _ in range(count // length)]
        for key, (indices, of) in group.items():
            order = (of // length).sort(stable=True)
            parts = indices[order.indices].split(torch.bincount(order.values, minlength=len(blocks)).tolist())
            for cuts, part in zip(blocks, parts, strict=True):
                if len(part):
                    cuts[key] = part
        first_alone = self.find_coupled_channels(root, length)[0]
        alone = {key: indices for key, (indices, _) in first_alone.items()}
        followed = alone.keys() == blocks[0].keys() and all(torch.equal(alone[key], blocks[0][key]) for key in alone)
        for (layer, side), (indices, _) in group.items():
            extent = get_width(self.layers[layer], side)
            followed &= int(indices[-1]) < extent
            followed &= side == "in" or not multiplies(self.layers[layer]) or len(indices) == extent
        return blocks if followed else []

    def find_coupled_channels(
        self, layer: str, count: int
    ) -> tuple[dict[tuple[str, str], tuple[Tensor, Tensor]], bool]:
        """Return the channels that are coupled to the first `count` output channels of a layer.

        They are {(layer, side): (indices of channels, for each the output channel that it is coupled to)}. The second
        value is whether all of them can be removed.
        """
        module = self.layers[layer]
        prune = self.graph.get_pruner_of_module(module).prune_out_channels
        coupled = {}
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
            coupled[self.names[target], side] = (indices, torch.tensor(item.root_idxs)[order])
        return coupled, removable

    def width(self, layer: str) -> int:
        """Return the number of output channels of a convolution or linear layer."""
        return get_size(self.layers[layer])[1]


def check_block(block: int) -> None:
    """Raise ValueError where the most channels per block are fewer than 1."""
    if block < 1:
        raise ValueError(f"block={block} is not a number of channels; choose 1 or more (8 suits most hardware)")


def get_block_length(count: int, block: int) -> int:
    """Return the largest divisor of `count` channels that is at most `block` and at most half of them."""
    return max(n for n in range(1, min(block, count // 2) + 1) if count % n == 0)


def make_traceable(outputs: Any) -> list[Tensor]:
    """Return a network's output tensors after one more operation each, so that they are nodes of the graph."""
    tensors = torch_pruning.utils.flatten_as_list(outputs)
    if not any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors):
        raise ValueError("forward=... returns no tensor with a gradient; channels are traced through autograd")
    return [tensor * 1 for tensor in tensors if isinstance(tensor, Tensor) and tensor.requires_grad]


def list_attention_projections(network: nn.Module) -> list[nn.Module]:
    """Return the layers of diffusers' attentions whose outputs are divided into heads."""
    names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    attentions = [module for module in network.modules() if isinstance(module, Attention)]
    return [layer for module in attentions for name in names if (layer := getattr(module, name, None)) is not None]


def can_shrink(module: nn.Module) -> bool:
    """Return whether a layer can lose channels: no grouped convolution, nor a LayerNorm over several dimensions."""
    if isinstance(module, _ConvNd):
        return module.groups == 1 or is_depthwise(module)
    return not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) == 1


def shrink_size(module: nn.Module, side: str, old: list[int], fewer: int) -> list[int]:
    """Return the size of a layer (see `get_size`) with some channels fewer on one side."""
    if isinstance(module, nn.GroupNorm):
        count = old[0] - fewer
        return [count, max(n for n in range(1, old[1] + 1) if count % n == 0)]
    if isinstance(module, _ConvNd) and is_depthwise(module):
        return [n - fewer for n in old]
    changed = len(old) - 1 if side == "out" else 0
    return [n - fewer if i == changed else n for i, n in enumerate(old)]
