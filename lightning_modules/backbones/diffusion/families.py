"""Which backbone a diffusion transformer of diffusers gets."""

from typing import Any

from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn

from lightning_modules.backbones.diffusion.dit import DiTBackbone
from lightning_modules.backbones.diffusion.flux import FluxBackbone
from lightning_modules.backbones.diffusion.pixart import PixArtBackbone
from lightning_modules.backbones.diffusion.sd3 import SD3Backbone
from lightning_modules.backbones.diffusion.transformer import TransformerBackbone

FAMILIES: dict[Any, type[TransformerBackbone]] = {
    DiTTransformer2DModel: DiTBackbone,
    PixArtTransformer2DModel: PixArtBackbone,
    SD3Transformer2DModel: SD3Backbone,
    FluxTransformer2DModel: FluxBackbone,
}
CLASSES: dict[str, Any] = {cls.__name__: cls for cls in FAMILIES}


def family(network: nn.Module) -> type[TransformerBackbone]:
    """The backbone of a transformer's class."""
    return FAMILIES[type(network)]
