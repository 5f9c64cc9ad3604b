"""Diffusers U-Nets with some of their parts removed. This file travels with exported weights.

It needs torch and diffusers only. Loading: `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`, or
`PrunedUNet2DModel.from_pretrained(folder)` with this file at hand.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import Transformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import ADDED_KV_ATTENTION_PROCESSORS, Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

VARIANT = "pruned"
"""The variant under which weights are saved, as diffusion_pytorch_model.pruned.safetensors"""

OPERATORS = (nn.Conv2d, nn.GroupNorm, nn.LayerNorm, Attention)
"""Classes of modules that are operators in LD-Pruner's sense (arXiv 2404.11936)"""


class Bypass(nn.Module):
    """Replaces a removed unit by the identity, or by the 1x1 `conv_shortcut` of a ResNet block that changes channels.

    It equals the unit with its last layer (`conv2`, `to_out`, `proj_out`) zeroed, bit for bit. (An attention's output
    has other strides than its input, with which a later convolution may round differently; the bypass keeps those of
    the input.)
    """

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.conv_shortcut = unit.conv_shortcut if isinstance(unit, ResnetBlock2D) else None
        self.scale = 1.0
        if isinstance(unit, ResnetBlock2D):
            self.scale = unit.output_scale_factor
        elif isinstance(unit, Attention) and unit.residual_connection:
            self.scale = unit.rescale_output_factor
        self.in_tuple = isinstance(unit, Transformer2DModel)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        if self.conv_shortcut is not None:
            hidden_states = self.conv_shortcut(hidden_states)
        if self.scale != 1:
            hidden_states = hidden_states / self.scale
        return (hidden_states,) if self.in_tuple else hidden_states


class Nothing(nn.Module):
    """Replaces an attention whose output is added to a residual stream outside of it: returns zeros."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states * 0  # not zeros_like: DDP needs a gradient (of zeros) for the layers before


class Pointwise(nn.Module):
    """Replaces a convolution by a 1x1 convolution of the same channels, at the centre of each position of the kernel.

    `init` says where its weights start: from the sum of the kernel's taps (`sum`, equal on constant images), or from
    the centre tap (`centre`). Both are our choice: LD-Pruner (arXiv 2404.11936) only says that the replacement is a 1x1
    convolution.
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
                self.conv.bias.copy_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        top, left = self.offset
        height, width = (n - k + 1 + 2 * p for n, k, p in zip(x.shape[2:], self.size, self.padding, strict=True))  # type: ignore[operator]
        return self.conv(x[:, :, top : top + height, left : left + width])


def make_stand_in(module: nn.Module, pointwise: str = "sum") -> nn.Module:
    """Return the module that takes the place of a removed one: a bypass for a block, a cheaper module for an operator.

    `pointwise` is the `init` of a `Pointwise`.
    """
    if isinstance(module, Attention) and not adds_input(module):
        return Nothing()
    if isinstance(module, nn.GroupNorm | nn.LayerNorm):
        return nn.Identity()
    if isinstance(module, nn.Conv2d):
        if module.in_channels == module.out_channels and module.stride == (1, 1):
            return nn.Identity()
        return module if module.kernel_size == (1, 1) else Pointwise(module, pointwise)
    return Bypass(module)


def adds_input(attention: Attention) -> bool:
    """Tell whether an attention adds its input to its output itself, so that the identity can replace it.

    In SimpleCrossAttn blocks (DeepFloyd IF, Kandinsky 2) the processor does so although `residual_connection` is False.
    """
    return attention.residual_connection or isinstance(attention.processor, ADDED_KV_ATTENTION_PROCESSORS)


def list_stages(unet: Any) -> dict[str, Any]:
    """Return the down, middle and up blocks by module path, in the order of the forward pass."""
    stages = {f"down_blocks.{i}": block for i, block in enumerate(unet.down_blocks)}
    if unet.mid_block is not None:
        stages["mid_block"] = unet.mid_block
    return stages | {f"up_blocks.{i}": block for i, block in enumerate(unet.up_blocks)}


def list_blocks(unet: nn.Module) -> dict[str, nn.Module]:
    """Return ResNet blocks, attentions and Transformer2D modules, or their bypasses, by module path.

    They are the entries of the `resnets` and `attentions` lists of the stages, in the order of the forward pass.
    Samplers, embeddings and the first and last convolutions are not among them.
    """
    blocks = {}
    for stage, block in list_stages(unet).items():
        resnets, attentions = list(block.resnets), list(getattr(block, "attentions", None) or [])
        pairs = [(f"{stage}.resnets.{i}", unit, 2 * i) for i, unit in enumerate(resnets)]
        # A middle block starts with one ResNet block; each of its attentions comes before the next ResNet block.
        pairs += [(f"{stage}.attentions.{i}", unit, 2 * i + 1) for i, unit in enumerate(attentions) if unit is not None]
        assert stage != "mid_block" or len(resnets) == len(attentions) + 1
        blocks.update({name: unit for name, unit, _ in sorted(pairs, key=lambda pair: pair[2])})
    return blocks


def list_depth_units(unet: nn.Module, transformers: str = "block") -> dict[str, nn.Module]:
    """Return the depth units of a U-Net, or their bypasses, by module path, in the order of the forward pass.

    A Transformer2D with several basic blocks is as many units (`transformers="block"`) or one (`"module"`); with one
    basic block it is one unit.
    """
    units: dict[str, nn.Module] = {}
    for name, unit in list_blocks(unet).items():
        inner = list_basic_blocks(unit)
        if transformers == "block" and len(inner) > 1:
            units |= {f"{name}.transformer_blocks.{i}": block for i, block in enumerate(inner)}
        else:
            units[name] = unit
    return units


def list_basic_blocks(unit: nn.Module) -> list[nn.Module]:
    """Return the basic blocks of a Transformer2D, or their bypasses; an empty list for other units."""
    return list(getattr(unit, "transformer_blocks", ())) if isinstance(unit, Transformer2DModel) else []


def list_operators(unet: nn.Module) -> dict[str, nn.Module]:
    """Return LD-Pruner's operators by module path: instances of OPERATORS, except those inside a `Pointwise`."""
    replaced = {id(module.conv) for module in unet.modules() if isinstance(module, Pointwise)}
    return {n: part for n, part in unet.named_modules() if isinstance(part, OPERATORS) and id(part) not in replaced}


def remove_units(unet: nn.Module, names: Iterable[str], pointwise: str = "sum") -> dict[str, nn.Module]:
    """Replace units by their stand-ins, in place; returns the replaced modules, with which `put_modules` undoes it.

    A Transformer2D whose basic blocks are all bypassed is bypassed as a whole.
    """
    removed = {name: unet.get_submodule(name) for name in names}
    put_modules(unet, {name: make_stand_in(module, pointwise) for name, module in removed.items()})
    for name in {name.partition(".transformer_blocks.")[0] for name in removed if ".transformer_blocks." in name}:
        whole = unet.get_submodule(name)
        if isinstance(whole, Transformer2DModel) and all(isinstance(b, Bypass) for b in list_basic_blocks(whole)):
            removed = {name: whole} | removed  # first, so that its blocks are put back into it, not into its bypass
            put_modules(unet, {name: Bypass(whole)})
    return removed


def put_modules(unet: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules into a network, in place: {module path: module}."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, module)


# Widths

SIZE_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    _ConvNd: ("in_channels", "out_channels"),
    nn.Linear: ("in_features", "out_features"),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.GroupNorm: ("num_channels", "num_groups"),
    nn.LayerNorm: ("normalized_shape",),
    _NormBase: ("num_features",),
}
"""{class of a layer: the attributes with its size}"""


def get_size(module: nn.Module) -> list[int]:
    """Return a layer's size, in the order of SIZE_ATTRIBUTES; an empty list for a module that has none."""
    for cls, attributes in SIZE_ATTRIBUTES.items():
        if isinstance(module, cls):
            values = [getattr(module, attribute) for attribute in attributes]
            return list(values[0]) if isinstance(module, nn.LayerNorm) else values
    return []


def list_sizes(network: nn.Module) -> dict[str, list[int]]:
    """Return the size of every layer by module path: JSON-able."""
    return {name: get_size(module) for name, module in network.named_modules() if get_size(module)}


def resize_layers(network: nn.Module, sizes: Mapping[str, Sequence[int]]) -> None:
    """Give layers these sizes, in place; tensors whose shape changes become zeros, for `load_state_dict` to fill.

    Raises ValueError for a path that is not a layer with as many numbers in its size.
    """
    modules = dict(network.named_modules())
    for name, new in sizes.items():
        module = modules.get(name, network)
        old = get_size(module)
        if len(old) != len(new) or name not in modules:
            raise ValueError(f"sizes[{name!r}]={list(new)} fits no layer of this {type(network).__name__}")
        if old == list(new):
            continue
        if isinstance(module, _ConvNd) and is_depthwise(module):
            module.groups = new[1]
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(new)
        else:
            attributes = next(attributes for cls, attributes in SIZE_ATTRIBUTES.items() if isinstance(module, cls))
            for attribute, value in zip(attributes, new, strict=True):
                setattr(module, attribute, value)
        for side in ("in", "out"):
            for tensor, dim in channel_axes(module, side):
                resize_tensor(module, tensor, dim, get_width(module, side))
    update_channel_counts(network)


def get_width(module: nn.Module, side: str) -> int:
    """Return how long a layer's tensors are along the dimension that `channel_axes` gives for a side (in | out)."""
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm, _NormBase)):
        return get_size(module)[0]
    return get_size(module)[1] if side == "out" else get_size(module)[0] // getattr(module, "groups", 1)


def channel_axes(module: nn.Module, side: str) -> list[tuple[str, int]]:
    """Return (tensor, dimension) for every tensor of a layer that shrinks with the channels of one side (in | out)."""
    if isinstance(module, nn.Embedding):
        return [("weight", 1)] if side == "out" else []
    if not isinstance(module, (_ConvNd, nn.Linear)):
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        return [(name, 0) for name, tensor in tensors if tensor.dim() == 1 and side == "out"]
    dims = {"out": 0, "in": 1}
    if getattr(module, "transposed", False) and not is_depthwise(module):
        dims = {"out": 1, "in": 0}
    return [("weight", dims[side])] + ([("bias", 0)] if side == "out" and module.bias is not None else [])


def is_depthwise(module: nn.Module) -> bool:
    """Tell whether a module is a convolution with one group per channel, so that inputs and outputs correspond."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1


def resize_tensor(module: nn.Module, name: str, dim: int, extent: int) -> None:
    """Replace a parameter or buffer by zeros with length `extent` in one dimension."""
    old = getattr(module, name)
    new = old.detach().new_zeros([*old.shape[:dim], extent, *old.shape[dim + 1 :]])
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def update_channel_counts(network: nn.Module) -> None:
    """Set the attributes in which diffusers' modules keep numbers of channels to those of their layers."""
    for module in network.modules():
        if isinstance(module, (Downsample2D, Upsample2D)):
            for conv in [part for part in module.modules() if isinstance(part, _ConvNd)]:
                module.channels, module.out_channels = conv.in_channels, conv.out_channels
        elif isinstance(module, ResnetBlock2D):
            module.in_channels, module.out_channels = module.conv1.in_channels, module.conv2.out_channels
            for sampler in (module.upsample, module.downsample):
                if isinstance(sampler, (Downsample2D, Upsample2D)):
                    sampler.channels = sampler.out_channels = module.in_channels
        elif isinstance(module, Attention):
            module.query_dim = module.to_q.in_features
            if module.to_k is not None:
                module.cross_attention_dim = module.to_k.in_features
            if module.to_out is not None:
                module.out_dim = module.to_out[0].out_features  # type: ignore[assignment]


# Classes


class _Pruned:
    """Makes the stock network, then resizes the layers in its configuration's `sizes` and removes `removed_units`."""

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = dict(config)
        removed, other_sizes = list(config.pop("removed_units", ())), dict(config.pop("sizes", {}))
        result = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)  # type: ignore[misc]
        model = result[0] if return_unused_kwargs else result
        resize_layers(model, other_sizes)
        remove_units(model, removed)
        model.register_to_config(removed_units=removed, sizes=other_sizes)
        return result

    # The file of weights has another name than the stock class expects: opening it as the stock class then fails, and
    # does not fill removed parts with random numbers.

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(*args, **{**kwargs, "variant": VARIANT})  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return super().from_pretrained(*args, **{**kwargs, "variant": VARIANT})  # type: ignore[misc]


class PrunedUNet2DModel(_Pruned, UNet2DModel):
    """A UNet2DModel without its `removed_units`."""


class PrunedUNet2DConditionModel(_Pruned, UNet2DConditionModel):
    """A UNet2DConditionModel without its `removed_units`."""
