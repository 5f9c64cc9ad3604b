"""Diffusers U-Nets with some of their parts removed. This file travels with exported weights.

It needs torch and diffusers only. Loading: `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`, or
`PrunedUNet2DModel.from_pretrained(folder)` with this file at hand.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import Transformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

VARIANT = "pruned"
"""diffusion_pytorch_model.pruned.safetensors"""

OPERATORS = (nn.Conv2d, nn.GroupNorm, nn.LayerNorm, Attention)


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


class Nothing(nn.Module):
    """What stays of an attention whose output is added to a residual stream outside of it: zeros."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(hidden_states)


class Pointwise(nn.Module):
    """A 1x1 convolution in the place of a larger one: same channels, and each output at its kernel's centre.

    Its weights are the sum of the kernel's taps (`sum`: equal on constant images) or the centre tap (`centre`). The
    choice of both is ours: LD-Pruner (arXiv 2404.11936) only says that the replacement is a 1x1 convolution.
    """

    def __init__(self, conv: nn.Conv2d, init: str) -> None:
        super().__init__()
        self.conv = nn.utils.skip_init(  # draws no random numbers
            nn.Conv2d,
            *(conv.in_channels, conv.out_channels, 1, conv.stride),
            groups=conv.groups,
            bias=conv.bias is not None,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        self.offset = [k // 2 - p for k, p in zip(conv.kernel_size, conv.padding, strict=True)]  # type: ignore[operator]
        self.size, self.padding = conv.kernel_size, conv.padding
        with torch.no_grad():
            height, width = conv.kernel_size
            weight = (
                conv.weight.sum((2, 3), keepdim=True)
                if init == "sum"
                else conv.weight[:, :, height // 2, width // 2, None, None]
            )
            self.conv.weight.copy_(weight)
            if conv.bias is not None:
                self.conv.bias.copy_(conv.bias)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        top, left = self.offset
        height, width = (n - k + 1 + 2 * p for n, k, p in zip(x.shape[2:], self.size, self.padding, strict=True))  # type: ignore[operator]
        return self.conv(x[:, :, top : top + height, left : left + width])


def stand_in(module: nn.Module, pointwise: str = "sum") -> nn.Module:
    """What takes a removed module's place: a bypass for a block, for an operator nothing or a cheaper one."""
    if isinstance(module, Attention) and not module.residual_connection:
        return Nothing()
    if isinstance(module, nn.GroupNorm | nn.LayerNorm):
        return nn.Identity()
    if isinstance(module, nn.Conv2d):
        if module.in_channels == module.out_channels and module.stride == (1, 1):
            return nn.Identity()
        return module if module.kernel_size == (1, 1) else Pointwise(module, pointwise)
    return Bypass(module)


def stages(unet: Any) -> dict[str, nn.Module]:
    """Down, middle and up blocks by module path, in the order of the forward pass."""
    found = {f"down_blocks.{i}": block for i, block in enumerate(unet.down_blocks)}
    if unet.mid_block is not None:
        found["mid_block"] = unet.mid_block
    return found | {f"up_blocks.{i}": block for i, block in enumerate(unet.up_blocks)}


def blocks(unet: nn.Module) -> dict[str, nn.Module]:
    """The ResNet blocks, attentions and Transformer2D modules (or their bypasses), in the order of the forward pass.

    They are the entries of the `resnets` and `attentions` lists of the stages; samplers, embeddings and the first and
    last convolutions are not among them.
    """
    found = {}
    for stage, block in stages(unet).items():
        resnets, attentions = list(block.resnets), list(getattr(block, "attentions", None) or [])  # type: ignore[call-overload,arg-type]
        pairs = [(f"{stage}.resnets.{i}", unit, 2 * i) for i, unit in enumerate(resnets)]
        # In a middle block the first ResNet block comes alone and each attention precedes its ResNet block.
        pairs += [(f"{stage}.attentions.{i}", unit, 2 * i + 1) for i, unit in enumerate(attentions) if unit is not None]
        assert stage != "mid_block" or len(resnets) == len(attentions) + 1
        found.update({name: unit for name, unit, _ in sorted(pairs, key=lambda pair: pair[2])})
    return found


def removable(unet: nn.Module, transformers: str = "block") -> dict[str, nn.Module]:
    """The depth units of a U-Net (or their bypasses) by module path, in the order of the forward pass.

    A Transformer2D of several basic blocks is that many units (`block`) or one (`module`); with one block it is one.
    """
    found: dict[str, nn.Module] = {}
    for name, unit in blocks(unet).items():
        inner = list(unit.transformer_blocks) if isinstance(unit, Transformer2DModel) else []
        if transformers == "block" and len(inner) > 1:
            found |= {f"{name}.transformer_blocks.{i}": block for i, block in enumerate(inner)}
        else:
            found[name] = unit
    return found


def operators(unet: nn.Module) -> dict[str, nn.Module]:
    """LD-Pruner's operators: every convolution, normalisation and attention, by module path."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, OPERATORS)}


def remove(unet: nn.Module, names: Iterable[str], pointwise: str = "sum") -> dict[str, nn.Module]:
    """Put stand-ins where units were, in place; returns what was there, for `put`.

    A Transformer2D whose basic blocks are all bypassed is bypassed as a whole.
    """
    removed = {name: unet.get_submodule(name) for name in names}
    put(unet, {name: stand_in(module, pointwise) for name, module in removed.items()})
    for name in {name.partition(".transformer_blocks.")[0] for name in removed if ".transformer_blocks." in name}:
        whole = unet.get_submodule(name)
        if isinstance(whole, Transformer2DModel) and all(isinstance(b, Bypass) for b in whole.transformer_blocks):
            removed = {name: whole} | removed  # first, so that its blocks are put back into it, not into its bypass
            put(unet, {name: Bypass(whole)})
    return removed


def put(unet: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Set modules by path."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, module)


class _Pruned:
    """Builds the stock network, then removes what its configuration lists as `removed_units`."""

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = dict(config)
        removed = list(config.pop("removed_units", ()))
        made = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)  # type: ignore[misc]
        model = made[0] if return_unused_kwargs else made
        remove(model, removed)
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
    """A UNet2DModel without its `removed_units`."""


class PrunedUNet2DConditionModel(_Pruned, UNet2DConditionModel):
    """A UNet2DConditionModel without its `removed_units`."""
