"""Diffusion U-Nets of diffusers as backbones: DDPM, LDM, Stable Diffusion 1, 2 and XL."""

import functools
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
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone, copied
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
from lightning_modules.backbones.width.graph import Channels

CLASSES = {
    cls.__name__: cls for cls in (UNet2DModel, UNet2DConditionModel, PrunedUNet2DModel, PrunedUNet2DConditionModel)
}
KINDS = {
    ResnetBlock2D: "resnet",
    Attention: "attention",
    Transformer2DModel: "transformer",
    BasicTransformerBlock: "block",
    nn.GroupNorm: "norm",
    nn.LayerNorm: "norm",
}


class UNetBackbone(DiffusionBackbone):
    """A U-Net. Options: `transformers` (block | module: what one transformer unit is, where a Transformer2D has
    several basic blocks), `pointwise` (sum | centre: the weights of 1x1 convolutions in the place of operators) and
    `sample_size` (of the latents, where another than the configuration's is wanted)."""

    @property
    def transformers(self) -> str:
        return self.options.get("transformers", "block")

    # Units and their removal

    def units(self, level: str = "depth") -> list[Unit]:
        """Depth: ResNet blocks, attentions, transformer blocks. Operators: convolutions, attentions, normalisations.
        Channels: blocks of coupled channels."""
        level = parse_level(level)
        if level == Level.CHANNEL:
            return self.channels.units()
        if level == Level.DEPTH:
            return [self.unit(name, self.network.get_submodule(name), level) for name in self.survivors()]
        order = self.forward_order()
        there = list_operators(self.network)
        return [self.unit(name, there[name], level) for name in sorted(there, key=order.__getitem__)]

    def unit(self, name: str, module: nn.Module, level: Level) -> Unit:
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
        """Norm and projections of each Transformer2D of several basic blocks: they go when all its blocks go."""
        if level != "depth" or self.transformers != "block":
            return []
        macs, found = self.macs(), []
        for name, module in list_blocks(self.network).items():
            if len(list_basic_blocks(module)) > 1:
                left = {
                    f"{name}.transformer_blocks.{i}": block
                    for i, block in enumerate(list_basic_blocks(module))
                    if not isinstance(block, Bypass)
                }
                params = [sum(p.numel() for p in part.parameters()) for part in (module, *left.values())]
                products = [macs.of(name), *(macs.of(block) for block in left)]
                found.append(Shared(name, tuple(left), params[0] - sum(params[1:]), products[0] - sum(products[1:])))
        return found

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
        """The groups of coupled channels."""
        inputs = self.arguments(self.example_inputs(1, next(self.network.parameters()).device))
        return Channels(self.network, lambda network: network(**inputs, return_dict=False)[0])

    def as_pruned(self, sliced: nn.Module) -> Self:
        """A network whose layers have other widths, as one of a class that says so in its configuration."""
        config = self.network.config
        stock = CLASSES[type(self.network).__name__.removeprefix("Pruned")]
        with torch.device("meta"):
            full = list_sizes(stock.from_config({key: value for key, value in config.items() if key != "sizes"}))
        changed = {name: size for name, size in list_sizes(sliced).items() if full.get(name) != size}
        cls = CLASSES["Pruned" + stock.__name__]
        return self.student(copied(sliced, {"removed_units": [], **config, "sizes": changed}, cls))

    def survivors(self) -> list[str]:
        there = list_depth_units(self.network, self.transformers)
        return [name for name, module in there.items() if not isinstance(module, Bypass)]

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
            return self.as_pruned(self.channels.sliced(names))
        if "slice" in kinds:
            raise ValueError(f"a plan of {sorted(kinds)}: channels cannot be sliced in the same plan as units go")
        for kind, level in ((ChangeKind.BYPASS, Level.DEPTH), (ChangeKind.REPLACE, Level.OPERATOR)):
            if kind in kinds:
                units = [change["unit"] for change in changes if change["kind"] == kind]
                check_names(units, self.units(level), "plan.units")
        config = self.network.config
        removed = [*config.get("removed_units", ()), *names]
        cls = CLASSES["Pruned" + type(self.network).__name__.removeprefix("Pruned")]
        with self.without(names):
            return self.adopt(copied(self.network, {**config, "removed_units": removed}, cls))

    def adopt(self, network: nn.Module, changes: Sequence[Change] = ()) -> Self:
        variants = [change["variant"] for change in changes if change["kind"] == "restage"]
        return self.student(network, stage_pairs(variants[0], len(self.network.down_blocks)) if variants else None)

    def stages(self) -> dict[str, nn.Module]:
        return list_stages(self.network)

    # What the network takes

    def with_sizes(self, conditions: dict[str, Any], batch: Batch, device: torch.device) -> dict[str, Any]:
        """SDXL's `time_ids`: original size, crop (top, left) and target size, from the data or, without them, whole."""
        if "added_cond_kwargs" not in conditions:
            return conditions
        count = len(conditions["encoder_hidden_states"])
        target = torch.tensor([self.image_shape()[1:]]).expand(count, 2)
        original, crop = batch.get("original_size", target), batch.get("crop", torch.zeros(count, 2))
        time_ids = torch.cat([part.to(device).float() for part in (original, crop, target)], dim=1)
        return conditions | {"added_cond_kwargs": conditions["added_cond_kwargs"] | {"time_ids": time_ids}}

    def example_conditions(self, batch: int) -> dict[str, Any]:
        config = self.network.config
        if not isinstance(self.network, UNet2DConditionModel):
            return {}
        found: dict[str, Any] = {"encoder_hidden_states": torch.zeros(batch, 77, config.cross_attention_dim)}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            found["added_cond_kwargs"] = {"text_embeds": torch.zeros(batch, pooled), "time_ids": torch.zeros(batch, 6)}
        return found


def check_channels(config: Any, path: str) -> None:
    """Raise ValueError for a U-Net that takes more than noised samples."""
    taken, given = config.in_channels, config.out_channels
    if given not in (taken, 2 * taken):  # twice as many: it predicts variances, too
        raise ValueError(
            f"teacher.path={path!r} takes {taken} channels and gives {given}: an inpainting, upscaling or "
            "instruction-following network takes further images (mask, low resolution, original) that no data here "
            "give; choose a teacher that takes noised samples alone"
        )


def stage_pairs(variant: str, stages: int) -> dict[str, str]:
    """{stage of the teacher: stage of a BK-SDM student} whose outputs have the same shape."""
    dropped = 1 if variant == "tiny" else 0
    # Without the innermost stage the one before it does not downsample any more: its output has another size.
    pairs = {f"down_blocks.{i}": f"down_blocks.{i}" for i in range(stages - 2 * dropped)}
    if variant == "base":
        pairs["mid_block"] = "mid_block"
    return pairs | {f"up_blocks.{i}": f"up_blocks.{i - dropped}" for i in range(dropped, stages)}
