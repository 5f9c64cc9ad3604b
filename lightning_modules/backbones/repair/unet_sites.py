"""Sites of U-Nets that lost blocks or operators: what can make up for each of them without new parameters."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from diffusers import Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from lightning_modules.backbones.diffusion.pruned_unet import (
    Bypass,
    Pointwise,
    list_basic_blocks,
    list_blocks,
    list_stages,
)
from lightning_modules.backbones.repair.sites import Site, is_refittable


@dataclass
class Stream:
    """The walk along a stream of feature maps: which layer wrote it last, and whether a removal is not made up for."""

    network: nn.Module
    writer: str | None = None
    """path of the last layer that added to the stream and that nothing else reads; None where there is none"""
    is_damaged: bool = False
    """whether a unit was removed that no layer before it can make up for"""
    sites: list[Site] = field(default_factory=list)

    def pass_removed(self, name: str, own_layer: str | None) -> None:
        """Go past a removed unit; `own_layer` is the path of a layer that stayed in its place, if any."""
        self.writer = own_layer or self.writer
        if self.writer is None:
            self.is_damaged = True
        else:
            self.sites.append(Site(self.writer, name, name))
            self.is_damaged = self.is_damaged and own_layer is None

    def pass_kept(self, name: str, layer: str | None) -> None:
        """Go past a module that stays; `layer` is the path of the layer with which it writes the stream."""
        self.writer = layer if layer and is_refittable(self.network.get_submodule(layer)) else None
        if self.is_damaged and self.writer is not None:
            self.sites.append(Site(self.writer, name, name))
            self.is_damaged = False

    def branch(self) -> None:
        """Go past a point where the stream is also read elsewhere: a layer before it must not change for one reader."""
        self.writer = None


def find_unet_sites(unet: Any) -> Iterator[Site]:
    """Yield the sites of a U-Net with removed units.

    For a ResNet block that changed channels it is the 1x1 convolution that stayed in its place. For other units it is
    the layer that wrote their input, unless a skip connection reads that, too. Otherwise it is the next layer that
    writes to the stream. Convolutions that became 1x1 are sites of their own.
    """
    stream = Stream(unet)
    for stage, module in list_stages(unet).items():
        stream.branch()  # an up block's first ResNet block reads a skip connection, too
        for name, block in list_blocks_of(unet, stage):
            pass_block(stream, name, block)
            if stage.startswith("down_blocks") and ends_pair(name, module):
                stream.branch()
        for sampler in ("downsamplers", "upsamplers"):
            if getattr(module, sampler, None):
                conv = getattr(getattr(module, sampler)[0], "conv", None)
                path = f"{stage}.{sampler}.0"
                stream.pass_kept(path, None if conv is None else f"{path}.conv")
    yield from stream.sites
    for name, module in unet.named_modules():
        if isinstance(module, Pointwise):
            yield Site(f"{name}.conv", name, name)


def list_blocks_of(unet: Any, stage: str) -> list[tuple[str, nn.Module]]:
    """Return the blocks of a stage with their paths, in the order of the forward pass."""
    return [(name, block) for name, block in list_blocks(unet).items() if name.startswith(f"{stage}.")]


def ends_pair(name: str, stage: Any) -> bool:
    """Tell whether the output of a block of a down stage goes to a skip connection."""
    has_attention = getattr(stage, "attentions", None) is not None and any(
        attention is not None for attention in stage.attentions
    )
    return ".attentions." in name or not has_attention


def pass_block(stream: Stream, name: str, block: nn.Module) -> None:
    """Go past a ResNet block, an attention or a Transformer2D, or what stands in its place."""
    if isinstance(block, Bypass):
        stream.pass_removed(name, None if block.conv_shortcut is None else f"{name}.conv_shortcut")
    elif isinstance(block, ResnetBlock2D):
        # The shortcut reads the stream itself, the second convolution what an activation left of it.
        reads_stream = stream.is_damaged and block.conv_shortcut is not None
        stream.pass_kept(name, f"{name}.conv_shortcut" if reads_stream else f"{name}.conv2")
    elif isinstance(block, Attention):
        stream.pass_kept(name, f"{name}.to_out.0")
    elif isinstance(block, Transformer2DModel):
        pass_basic_blocks(stream, name, block)
        stream.pass_kept(name, f"{name}.proj_out")
    else:
        stream.pass_kept(name, None)


def pass_basic_blocks(stream: Stream, name: str, block: nn.Module) -> None:
    """Add the sites inside a Transformer2D, whose basic blocks have a stream of their own that `proj_in` begins."""
    inner = Stream(stream.network)
    inner.pass_kept(f"{name}.proj_in", f"{name}.proj_in")
    for i, basic in enumerate(list_basic_blocks(block)):
        path = f"{name}.transformer_blocks.{i}"
        if isinstance(basic, Bypass):
            inner.pass_removed(path, None)
        else:
            inner.pass_kept(path, f"{path}.ff.net.2" if isinstance(basic, BasicTransformerBlock) else None)
    stream.sites += inner.sites
