"""Diffusers U-Nets with some ResNet and attention blocks bypassed. This file travels with exported weights.

It needs torch and diffusers only. Loading: `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`, or
`PrunedUNet2DModel.from_pretrained(folder)` with this file at hand.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from diffusers import Transformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

VARIANT = "pruned"
"""diffusion_pytorch_model.pruned.safetensors"""


class Bypass(nn.Module):
    """What stays of a removed unit: the identity, or the 1x1 `conv_shortcut` of a ResNet block that changes channels.

    Equal, bit for bit, to the unit with its last layer (`conv2`, `to_out`, `proj_out`) zeroed. (An attention's output
    has other strides than its input, after which a convolution may round otherwise; the bypass keeps the input's.)
    """

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.conv_shortcut = unit.conv_shortcut if isinstance(unit, ResnetBlock2D) else None
        self.scale = 1.0
        if isinstance(unit, ResnetBlock2D):
            self.scale = unit.output_scale_factor
        elif isinstance(unit, Attention):
            self.scale = unit.rescale_output_factor
        self.in_tuple = isinstance(unit, Transformer2DModel)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        if self.conv_shortcut is not None:
            hidden_states = self.conv_shortcut(hidden_states)
        if self.scale != 1:
            hidden_states = hidden_states / self.scale
        return (hidden_states,) if self.in_tuple else hidden_states


def removable(unet: nn.Module) -> dict[str, nn.Module]:
    """The depth units of a U-Net by module path, in the order of the forward pass.

    They are the blocks in the `resnets` and `attentions` lists of its stages; samplers, embeddings and the first and
    last convolutions are not units.
    """
    found = {}
    stages = [(f"down_blocks.{i}", block, False) for i, block in enumerate(unet.down_blocks)]  # type: ignore[arg-type]
    stages += [("mid_block", unet.mid_block, True)] if unet.mid_block is not None else []
    stages += [(f"up_blocks.{i}", block, False) for i, block in enumerate(unet.up_blocks)]  # type: ignore[arg-type]
    for stage, block, is_mid in stages:
        resnets, attentions = list(block.resnets), list(getattr(block, "attentions", None) or [])
        pairs = [(f"{stage}.resnets.{i}", unit, 2 * i) for i, unit in enumerate(resnets)]
        # In a middle block the first ResNet block comes alone and each attention precedes its ResNet block.
        pairs += [(f"{stage}.attentions.{i}", unit, 2 * i + 1) for i, unit in enumerate(attentions) if unit is not None]
        assert not is_mid or len(resnets) == len(attentions) + 1
        found.update({name: unit for name, unit, _ in sorted(pairs, key=lambda pair: pair[2])})
    return found


def bypass(unet: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Replace units by their Bypass, in place; returns the units that were there, for `restore`."""
    units = removable(unet)
    removed = {name: units[name] for name in names}
    put(unet, {name: Bypass(unit) for name, unit in removed.items()})
    return removed


def put(unet: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Set modules by path."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, module)


class _Pruned:
    """Builds the stock network, then bypasses the units that its configuration lists as `removed_units`."""

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = dict(config)
        removed = list(config.pop("removed_units", ()))
        made = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)  # type: ignore[misc]
        model = made[0] if return_unused_kwargs else made
        bypass(model, removed)
        model.register_to_config(removed_units=removed)
        return made

    # The weights have a name of their own, so that opening them as the stock class fails instead of filling what is
    # not there with random numbers.

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(*args, **{**kwargs, "variant": VARIANT})  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return super().from_pretrained(*args, **{**kwargs, "variant": VARIANT})  # type: ignore[misc]


class PrunedUNet2DModel(_Pruned, UNet2DModel):
    """A UNet2DModel with `removed_units` bypassed."""


class PrunedUNet2DConditionModel(_Pruned, UNet2DConditionModel):
    """A UNet2DConditionModel with `removed_units` bypassed."""
