"""Sites: layers of a pruned network that can be refitted so that a feature map equals the unpruned network's again."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_modules.backbones.width.blocks import Blocks


@dataclass(frozen=True)
class Site:
    """A layer of the student, and the two feature maps that its new weights bring together.

    The student's map depends on the layer's output element by element: it is the output times a gain, plus what other
    layers compute. See lightning_modules/modules/repair.py.
    """

    layer: str
    """module path of the refitted layer in the student, an nn.Linear or nn.Conv2d"""
    student: str
    """module path in the student of the feature map: the layer itself, a module around it, or one behind it"""
    reference: str
    """module path of the same feature map in the network that the student was pruned from"""
    channels: Tensor | None = None
    """indices of the reference's channels that the student has; None where it has all of them"""


def find_layer_sites(
    blocks: Mapping[str, nn.Module], moved: Mapping[str, str], order: Mapping[str, int]
) -> Iterator[Site]:
    """Yield the sites of a sequence of blocks from which whole blocks were removed, as in transformers.

    The last linear layer of the block before removed blocks makes up for them. Blocks that are removed at the
    beginning of the sequence have none before them.

    Args:
        blocks: all blocks before removal by module path, in the order of the forward pass.
        moved: {module path of a block that stays: its module path in the student}.
        order: {module path in the student: position of its first call in a forward pass}.
    """
    names = list(blocks)
    for name, behind in zip(names, [*names[1:], None], strict=True):
        if name not in moved or behind in (None, *moved):
            continue
        parts = blocks[name].named_modules(prefix=moved[name])
        # The layers of a text stream beside the image stream have names such as `ff_context`.
        linear = [path for path, part in parts if isinstance(part, nn.Linear) and "context" not in path]
        called = [path for path in linear if path in order]
        last_removed = names[find_last_removed(names, moved, names.index(name))]
        if called:
            yield Site(max(called, key=order.__getitem__), moved[name], last_removed)


def find_last_removed(names: list[str], moved: Mapping[str, str], start: int) -> int:
    """Return the index of the last block in the run of removed blocks that follows the block `start`."""
    end = start
    while end + 1 < len(names) and names[end + 1] not in moved:
        end += 1
    return end


def find_width_sites(channels: Blocks, names: Iterable[str]) -> Iterator[Site]:
    """Yield the sites of a network that lost these blocks of channels: the layers that read them.

    The output of such a layer is fitted to the same layer's output before, as Optimal Brain Compression (Frantar &
    Alistarh 2022, arXiv 2208.11580) refits the weights of a layer that stay.
    """
    removed = channels.merge_cuts(names)
    for layer, side in removed:
        if side == "in" and is_refittable(channels.network.get_submodule(layer)):
            outputs = channels.network.get_submodule(layer).weight.shape[0]  # type: ignore[index]
            kept = torch.ones(int(outputs), dtype=torch.bool)
            kept[removed.get((layer, "out"), [])] = False
            yield Site(layer, layer, layer, None if kept.all() else kept.nonzero().flatten())


def is_refittable(layer: nn.Module) -> bool:
    """Tell whether a layer is a linear layer, or a convolution without groups that pads with zeros."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def sort_sites(sites: Iterable[Site], order: Mapping[str, int]) -> list[Site]:
    """Return sites in the order in which a forward pass computes their layers, one per layer: the last one given."""
    unique = {site.layer: site for site in sites}
    return sorted(unique.values(), key=lambda site: order[site.layer])
