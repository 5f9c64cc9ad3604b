"""Tiny networks of both U-Net families, and batches that fit them."""

import copy
from collections.abc import Iterable

import torch
from conftest import TINY
from diffusers import DDPMScheduler, Transformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from lightning_modules.backbones.unet import UNetBackbone

FAMILIES = {
    "UNet2DModel": (UNet2DModel, TINY),
    "UNet2DConditionModel": (
        UNet2DConditionModel,
        TINY
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 6,
        },
    ),
}
LAST_LAYER = {ResnetBlock2D: "conv2", Attention: "to_out.0", Transformer2DModel: "proj_out"}


def tiny_backbone(family: str) -> UNetBackbone:
    """A network of random weights, the same in every call."""
    cls, config = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNetBackbone(cls(**config).eval(), DDPMScheduler())


def tiny_batch(backbone: UNetBackbone, count: int = 4, of: int | None = None) -> dict[str, Tensor]:
    """The first `count` of `of` samples, as Images.subset gives them, with conditions where the network takes them."""
    rng = torch.Generator().manual_seed(1)
    images = torch.rand(of or count, 3, 8, 8, generator=rng) * 2 - 1
    batch = {"image": images[:count], "number": torch.arange(count), "of": torch.full((count,), of or count)}
    if isinstance(backbone.network, UNet2DConditionModel):
        batch["conditions"] = {"encoder_hidden_states": torch.randn(of or count, 5, 6, generator=rng)[:count]}
    return batch


def bypasses(names: Iterable[str]) -> list[dict[str, str]]:
    """A plan that bypasses these units."""
    return [{"unit": name, "kind": "bypass"} for name in names]


def last_layer(unit: nn.Module) -> nn.Module:
    return unit.get_submodule(LAST_LAYER[type(unit)])


@torch.no_grad()
def with_zeroed(backbone: UNetBackbone, names: Iterable[str]) -> UNetBackbone:
    """A copy in which the last layer of each of these units is zero, weight and bias.

    An Attention turns its feature map to channels-last strides, in which later convolutions round differently; here it
    keeps the strides it was given, so that nothing but the zeros is compared.
    """
    zeroed = copy.deepcopy(backbone)
    for name in names:
        unit = zeroed.network.get_submodule(name)
        for parameter in last_layer(unit).parameters():
            parameter.zero_()
        if isinstance(unit, Attention):
            unit.register_forward_hook(lambda module, given, output: torch.empty_like(given[0]).copy_(output))
    return zeroed


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """The same names with the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
