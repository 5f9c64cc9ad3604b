"""The backbone class of each diffusion transformer of diffusers."""

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


def backbone_class(network: nn.Module) -> type[TransformerBackbone]:
    """Return the backbone class for a network whose class is among FAMILIES."""
    return FAMILIES[type(network)]
