"""Backbone of the diffusion U-Nets of diffusers: DDPM, LDM, Stable Diffusion 1, 2 and XL."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from diffusers import Transformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from criteria.base import Batch, ChangeKind, Level, Shared, Unit, parse_level
from criteria.selection.base import check_names
from lightning_modules.backbones.base import Change
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone, copy_network
from lightning_modules.backbones.diffusion.pruned_unet import (
    Bypass,
    PrunedUNet2DConditionModel,
    PrunedUNet2DModel,
    list_basic_blocks,
    list_blocks,
    list_depth_units,
    list_operators,
    list_sizes,
    list_stages,
    make_stand_in,
    remove_units,
)
from lightning_modules.backbones.diffusion.restage import make_student_config, restage
from lightning_modules.backbones.repair.sites import Site, find_width_sites, sort_sites
from lightning_modules.backbones.repair.unet_sites import find_unet_sites
from lightning_modules.backbones.width.graph import Channels

CLASSES = {
    cls.__name__: cls for cls in (UNet2DModel, UNet2DConditionModel, PrunedUNet2DModel, PrunedUNet2DConditionModel)
}
"""classes of U-Nets by name"""
KINDS = {
    ResnetBlock2D: "resnet",
    Attention: "attention",
    Transformer2DModel: "transformer",
    BasicTransformerBlock: "block",
    nn.GroupNorm: "norm",
    nn.LayerNorm: "norm",
}
"""kind of a unit by its class; convolutions have many"""
TEXT_TOKENS = 77
"""length of the text states of CLIP"""
SIZE_NUMBERS = 6
"""numbers in SDXL's `time_ids`"""


class UNetBackbone(DiffusionBackbone):
    """A U-Net.

    Its options are `transformers` (block | module: whether a basic block or a whole Transformer2D is one unit),
    `pointwise` (sum | centre: the weights of the 1x1 convolutions that replace operators) and `sample_size` (height and
    width of the latents, where they are not the configuration's).
    """

    GUIDANCE = 8.0
    """scale of the guidance under which a network that embeds it is scored and distilled: that of the examples beside
    the published latent consistency models (arXiv 2310.04378), our choice"""

    @property
    def transformers(self) -> str:
        """The transformer unit: block or module."""
        return self.options.get("transformers", "block")

    # Units and their removal

    def units(self, level: str = "depth") -> list[Unit]:
        """Return the units of a level.

        Of depth: ResNet blocks, attentions, transformer blocks. Operators: convolutions, attentions, normalisations.
        Channels: blocks of coupled channels.
        """
        level = parse_level(level)
        if level == Level.CHANNEL:
            return self.channels.units()
        if level == Level.DEPTH:
            return [self.describe_unit(name, self.network.get_submodule(name), level) for name in self.survivors()]
        order = self.forward_order()
        modules = list_operators(self.network)
        return [self.describe_unit(name, modules[name], level) for name in sorted(modules, key=order.__getitem__)]

    def describe_unit(self, name: str, module: nn.Module, level: Level) -> Unit:
        """Return a unit with its costs: those of its module less those of what stands in for it."""
        macs = self.macs()
        kept_params = kept_macs = 0
        if isinstance(module, ResnetBlock2D) and module.conv_shortcut is not None:
            kept_params = sum(p.numel() for p in module.conv_shortcut.parameters())
            kept_macs = macs.of(f"{name}.conv_shortcut")
        elif isinstance(module, nn.Conv2d) and not isinstance(make_stand_in(module), nn.Identity):
            taps = module.kernel_size[0] * module.kernel_size[1]
            kept_params = module.weight.numel() // taps + (0 if module.bias is None else len(module.bias))
            kept_macs = macs.of(name) // taps
        parent = name.rpartition(".")[0]
        return Unit(
            name=name,
            kind=KINDS.get(type(module), "conv"),
            params=sum(p.numel() for p in module.parameters()) - kept_params,
            macs=macs.of(name) - kept_macs,
            change=ChangeKind.BYPASS if level == Level.DEPTH else ChangeKind.REPLACE,
            inside=parent if isinstance(self.network.get_submodule(parent), Attention) else None,
            level=level,
        )

    def shared(self, level: str = "depth") -> list[Shared]:
        """Return the norm and projections of each Transformer2D of several blocks: they go when all blocks go."""
        if level != "depth" or self.transformers != "block":
            return []
        macs, parts = self.macs(), []
        for name, module in list_blocks(self.network).items():
            if len(list_basic_blocks(module)) > 1:
                kept = {
                    f"{name}.transformer_blocks.{i}": block
                    for i, block in enumerate(list_basic_blocks(module))
                    if not isinstance(block, Bypass)
                }
                params = [sum(p.numel() for p in part.parameters()) for part in (module, *kept.values())]
                products = [macs.of(name), *(macs.of(block) for block in kept)]
                parts.append(Shared(name, tuple(kept), params[0] - sum(params[1:]), products[0] - sum(products[1:])))
        return parts

    def freed_weights(self, unit: Unit, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        if unit.level == Level.CHANNEL:
            return self.channels.weights(unit.name, tensors)
        module = self.network.get_submodule(unit.name)
        return [
            tensors[f"{unit.name}.{key}"]
            for key, _ in module.named_parameters()
            if not (isinstance(module, ResnetBlock2D) and key.startswith("conv_shortcut."))
        ]

    @functools.cached_property
    def channels(self) -> Channels:
        """The groups of coupled channels, found at the first use."""
        inputs = self.arguments(self.example_inputs(1, next(self.network.parameters()).device))
        return Channels(self.network, lambda network: network(**inputs, return_dict=False)[0])

    def make_sliced(self, sliced: nn.Module) -> Self:
        """Return a student with the weights of a network whose layers have other widths.

        Its class is a pruned one, which keeps the widths in its configuration.
        """
        config = self.network.config
        stock = CLASSES[type(self.network).__name__.removeprefix("Pruned")]
        with torch.device("meta"):
            full = list_sizes(stock.from_config({key: value for key, value in config.items() if key != "sizes"}))
        changed = {name: size for name, size in list_sizes(sliced).items() if full.get(name) != size}
        cls = CLASSES["Pruned" + stock.__name__]
        return self.student(copy_network(sliced, {"removed_units": [], **config, "sizes": changed}, cls))

    def survivors(self) -> list[str]:
        units = list_depth_units(self.network, self.transformers)
        return [name for name, module in units.items() if not isinstance(module, Bypass)]

    def remove(self, names: Iterable[str]) -> dict[str, nn.Module]:
        return remove_units(self.network, names, self.options.get("pointwise", "sum"))

    def stand_in(self, unit: nn.Module) -> nn.Module:
        return make_stand_in(unit, self.options.get("pointwise", "sum"))

    def check_plan(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change["kind"] == "restage":
                make_student_config(self.network.config, change["variant"])

    def pruned(self, changes: Sequence[Change]) -> Self:
        kinds = {change["kind"] for change in changes}
        if kinds == {"restage"}:
            return self.adopt(restage(self.network, changes[0]["variant"]), changes)
        names = [change["unit"] for change in changes]
        if kinds == {"slice"}:
            return self.make_sliced(self.channels.sliced(names))
        if "slice" in kinds:
            raise ValueError(f"a plan of {sorted(kinds)}: one plan cannot both slice channels and remove units")
        for kind, level in ((ChangeKind.BYPASS, Level.DEPTH), (ChangeKind.REPLACE, Level.OPERATOR)):
            if kind in kinds:
                units = [change["unit"] for change in changes if change["kind"] == kind]
                check_names(units, self.units(level), "plan.units")
        config = self.network.config
        removed = [*config.get("removed_units", ()), *names]
        cls = CLASSES["Pruned" + type(self.network).__name__.removeprefix("Pruned")]
        with self.without(names):
            return self.adopt(copy_network(self.network, {**config, "removed_units": removed}, cls))

    def adopt(self, network: nn.Module, changes: Sequence[Change] = ()) -> Self:
        variants = [change["variant"] for change in changes if change["kind"] == "restage"]
        return self.student(network, stage_pairs(variants[0], len(self.network.down_blocks)) if variants else None)

    def repair_sites(self, student: Self, changes: Sequence[Change]) -> list[Site]:
        kinds = {change["kind"] for change in changes}
        if kinds == {"slice"}:
            sites = find_width_sites(self.channels, [change["unit"] for change in changes])
        elif "restage" in kinds:
            return []
        else:
            before = set() if student is self else set(find_unet_sites(self.network))
            sites = (site for site in find_unet_sites(student.network) if site not in before)
        return sort_sites(sites, student.forward_order())

    def stages(self) -> dict[str, nn.Module]:
        return list_stages(self.network)

    # What the network takes

    def complete_conditions(self, conditions: dict[str, Any], batch: Batch, device: torch.device) -> dict[str, Any]:
        """Return the conditions with the guidance scale and SDXL's `time_ids`, for networks that take these.

        `time_ids` are original size, crop (top, left) and target size, from the data or, without them, of whole images.
        """
        conditions = self.with_guidance(conditions, self.GUIDANCE)
        if "added_cond_kwargs" not in conditions:
            return conditions
        count = len(conditions["encoder_hidden_states"])
        target = torch.tensor([self.image_shape()[1:]]).expand(count, 2)
        original, crop = batch.get("original_size", target), batch.get("crop", torch.zeros(count, 2))
        time_ids = torch.cat([part.to(device).float() for part in (original, crop, target)], dim=1)
        return conditions | {"added_cond_kwargs": conditions["added_cond_kwargs"] | {"time_ids": time_ids}}

    @property
    def predicts_variance(self) -> bool:
        return bool(self.network.config.out_channels == 2 * self.network.config.in_channels)

    @property
    def embeds_guidance(self) -> bool:
        return self.network.config.get("time_cond_proj_dim") is not None

    @property
    def can_embed_guidance(self) -> bool:  # type: ignore[override]
        return "time_cond_proj_dim" in self.network.config

    def add_guidance_embedding(self, width: int) -> None:
        """Give the network a projection of the guidance scale's embedding of this width, with weights of 0.

        With them it computes what it did, whatever the scale. It is the one that diffusers makes.
        """
        embedding = self.network.time_embedding
        embedding.cond_proj = nn.Linear(
            width, embedding.linear_1.in_features, bias=False, device=embedding.linear_1.weight.device
        )
        nn.init.zeros_(embedding.cond_proj.weight)
        defaults = self.network.config.get("_use_default_values", ())  # fields that diffusers would leave out of copies
        defaults = [name for name in defaults if name != "time_cond_proj_dim"]
        self.network.register_to_config(time_cond_proj_dim=width, _use_default_values=defaults)
        self.counts = None

    def arguments(self, inputs: Batch) -> dict[str, Any]:
        arguments = super().arguments(inputs)
        if not self.embeds_guidance:  # the inputs may be those of a student that does
            arguments.pop("timestep_cond", None)
        return arguments

    def with_guidance(self, conditions: dict[str, Any], guidance: float | Tensor) -> dict[str, Any]:
        if not self.embeds_guidance:
            return conditions
        states = conditions["encoder_hidden_states"]
        embedding = embed_guidance(guidance, self.network.config.time_cond_proj_dim)
        return conditions | {"timestep_cond": embedding.to(states).expand(len(states), -1)}

    def example_conditions(self, batch: int) -> dict[str, Any]:
        config = self.network.config
        if not isinstance(self.network, UNet2DConditionModel):
            return {}
        conditions: dict[str, Any] = {"encoder_hidden_states": torch.zeros(batch, TEXT_TOKENS, text_width(config))}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - SIZE_NUMBERS * config.addition_time_embed_dim
            conditions["added_cond_kwargs"] = {
                "text_embeds": torch.zeros(batch, pooled),
                "time_ids": torch.zeros(batch, SIZE_NUMBERS),
            }
        return self.with_guidance(conditions, self.GUIDANCE)


def embed_guidance(guidance: float | Tensor, width: int) -> Tensor:
    """Return the sinusoidal embedding of guidance scales, as latent consistency models take it.

    It embeds w = guidance - 1 (arXiv 2310.04378, section 4.2), multiplied by 1,000 as a timestep would be.

    Args:
        guidance: one scale, for an embedding (1,width), or the scales of samples (N,), for one (N,width).
        width: number of components of the embedding.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, dtype=torch.float32))
    scales_N1 = torch.as_tensor(guidance, dtype=torch.float64).reshape(-1, 1)
    angles = (1000.0 * (scales_N1 - 1)).float() * frequencies
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width - 2 * half))


def text_width(config: Any) -> int:
    """Return the width of the text states that a UNet2DConditionModel takes, from its configuration.

    Raises ValueError where its stages want text states of different widths.
    """
    if config.encoder_hid_dim is not None:
        return int(config.encoder_hid_dim)
    widths = config.cross_attention_dim
    if isinstance(widths, int):
        return widths
    attended = {width for width, block in zip(widths, config.down_block_types, strict=True) if "CrossAttn" in block} | (
        {widths[-1]} if "CrossAttn" in str(config.mid_block_type) else set()
    )
    if len(attended) != 1:
        raise ValueError(
            f"the U-Net of teacher.path has cross_attention_dim={list(widths)}: its stages want text states of "
            f"{len(attended)} widths, and a text encoder gives one; choose another teacher"
        )
    return int(attended.pop())


def check_channels(config: Any, path: str) -> None:
    """Raise ValueError for a U-Net that takes more than noised samples, text and SDXL's sizes."""
    inputs, outputs = config.in_channels, config.out_channels
    if outputs not in (inputs, 2 * inputs):  # twice as many: it predicts variances, too
        raise ValueError(
            f"teacher.path={path!r} takes {inputs} channels and gives {outputs}: an inpainting, upscaling or "
            "instruction-following network takes further images (mask, low resolution, original) that no data here "
            "give; choose a teacher that takes noised samples alone"
        )
    known = {
        "addition_embed_type": (None, "text", "text_time"),
        "encoder_hid_dim_type": (None, "text_proj"),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
    }
    for field, values in known.items():
        if config.get(field) not in values:
            raise ValueError(
                f"teacher.path={path!r} has {field}={config[field]!r}: it takes conditions (classes, pictures, ...) "
                f"that no data here give; choose a teacher with {field} {' or '.join(map(str, values))}"
            )
    if config.get("cross_attention_dim") is not None:
        text_width(config)


def stage_pairs(variant: str, stages: int) -> dict[str, str]:
    """Return {stage of the teacher: stage of a BK-SDM student} for the stages whose outputs have the same shape."""
    dropped = 1 if variant == "tiny" else 0
    # Without the innermost stage the one before it no longer downsamples, so its output has another size.
    pairs = {f"down_blocks.{i}": f"down_blocks.{i}" for i in range(stages - 2 * dropped)}
    if variant == "base":
        pairs["mid_block"] = "mid_block"
    return pairs | {f"up_blocks.{i}": f"up_blocks.{i - dropped}" for i in range(dropped, stages)}
