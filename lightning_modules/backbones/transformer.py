"""Diffusion transformers of diffusers as backbones: DiT, PixArt, Stable Diffusion 3, FLUX.

Their units are whole blocks, and a student is the stock class with fewer of them, renumbered.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from criteria.base import Batch, Unit, check_level
from criteria.selection import known
from lightning_modules.backbones.base import Change
from lightning_modules.backbones.diffusion import DiffusionBackbone, is_flow
from lightning_modules.backbones.pruned_unet import put

JOINT = (JointTransformerBlock, FluxTransformerBlock, FluxSingleTransformerBlock)
"""Blocks that carry a text stream along, and give it first."""


class Skip(nn.Module):
    """What stays of a removed block: its input, of both streams where there are two."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.joint = isinstance(block, JOINT)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
        return (encoder_hidden_states, hidden_states) if self.joint else hidden_states


class TransformerBackbone(DiffusionBackbone):
    """A diffusion transformer. Option: `sample_size` (of the latents, if not the configuration's)."""

    component = "transformer"
    counts = {"transformer_blocks": "num_layers"}
    """list of blocks -> the configuration's name for its length"""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for part in self.network.modules():
            if isinstance(part, LabelEmbedding):  # labels are dropped with the batch, the same for student and teacher
                part.dropout_prob = 0.0

    # Units and their removal

    def blocks(self) -> dict[str, nn.Module]:
        """Every block (or what stands for it) by module path, in the order of the forward pass."""
        return {f"{name}.{i}": block for name in self.counts for i, block in enumerate(getattr(self.network, name))}

    def needed(self) -> set[str]:
        """Blocks that cannot go, because the stock network takes more from them than their output."""
        return set()

    def units(self, level: str = "depth") -> list[Unit]:
        """The blocks; ValueError for the other levels."""
        if check_level(level) != "depth":
            raise ValueError(
                f"criterion.level={level!r}: operators and channels can be removed from U-Nets only; of a "
                f"{type(self.network).__name__} choose criterion.level=depth"
            )
        macs = self.macs()
        return [
            Unit(name, "block", sum(p.numel() for p in block.parameters()), macs.of(name))
            for name, block in self.blocks().items()
            if name not in self.needed() and not isinstance(block, Skip)
        ]

    def freed_weights(self, name: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [tensors[f"{name}.{key}"] for key, _ in self.network.get_submodule(name).named_parameters()]

    def survivors(self) -> list[str]:
        return [name for name, block in self.blocks().items() if not isinstance(block, Skip)]

    def kept(self) -> list[str]:
        return list(self.moved) or self.survivors()

    def stand_in(self, unit: nn.Module) -> nn.Module:
        return Skip(unit)

    def remove(self, names: Iterable[str]) -> dict[str, nn.Module]:
        removed = {name: self.network.get_submodule(name) for name in names}
        put(self.network, {name: Skip(block) for name, block in removed.items()})
        return removed

    def pruned(self, changes: Sequence[Change]) -> Self:
        kinds = {change["kind"] for change in changes}
        if kinds - {"bypass"}:
            raise ValueError(
                f"a {type(self.network).__name__} can only lose whole blocks; the plan says {sorted(kinds)}"
            )
        known([change["unit"] for change in changes], self.units(), "plan.units")
        moved = self.renumbered(changes)
        # Notes that begin with an underscore would set fields back to their defaults.
        config = {key: value for key, value in self.network.config.items() if not key.startswith("_")}
        for name, count in self.counts.items():
            config[count] = sum(block.startswith(f"{name}.") for block in moved)
        if config.get("dual_attention_layers"):
            kept = {int(old.split(".")[1]): int(new.split(".")[1]) for old, new in moved.items()}
            config["dual_attention_layers"] = [kept[i] for i in config["dual_attention_layers"] if i in kept]
        with next(self.network.parameters()).device:
            student = type(self.network).from_config(config)
        state = {}
        for key, value in self.network.state_dict().items():
            block = re.match(r"\w*blocks\.\d+", key)
            if block is None:
                state[key] = value
            elif block[0] in moved:
                state[moved[block[0]] + key[block.end() :]] = value
        student.load_state_dict(state)
        return self.adopt(student, changes)

    def renumbered(self, changes: Sequence[Change]) -> dict[str, str]:
        """{path of a block that stays: its path in the student}."""
        gone = {change["unit"] for change in changes}
        moved: dict[str, str] = {}
        for name in self.counts:
            kept = [block for block in self.blocks() if block.startswith(f"{name}.") and block not in gone]
            moved |= {block: f"{name}.{i}" for i, block in enumerate(kept)}
        return moved

    def adopt(self, network: nn.Module, changes: Sequence[Change] = ()) -> Self:
        return self.student(network, self.renumbered(changes))

    def stages(self) -> dict[str, nn.Module]:
        """The blocks themselves."""
        return self.blocks()

    # What the network takes

    def arguments(self, inputs: Batch) -> dict[str, Any]:
        return {"hidden_states": inputs["sample"], "timestep": inputs["timestep"], **inputs["conditions"]}


class DiTBackbone(TransformerBackbone):
    """DiT (arXiv 2212.09748): class labels. Its first block stays: the network embeds timestep and class for its
    output layer with that block's `norm1`."""

    DROPPED = 0.1
    """share of training labels that are replaced by the null class, as in the paper"""

    def needed(self) -> set[str]:
        return {"transformer_blocks.0"}

    @property
    def null_class(self) -> int:
        return self.network.config.num_embeds_ada_norm

    def conditions(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """The labels of a batch, else (of generated images) the seed modulo the number of classes."""
        if "conditions" in batch:
            return batch["conditions"]
        labels = batch.get("label", None if "seed" not in batch else batch["seed"] % self.null_class)
        if labels is None or int(labels.min()) < 0 or int(labels.max()) > self.null_class:
            raise ValueError(
                f"the teacher takes class labels from 0 to {self.null_class - 1}, and the data give "
                f"{'none' if labels is None or int(labels.min()) < 0 else int(labels.max())}; choose labelled data"
            )
        return {"class_labels": labels.to(device)}

    def unconditions(self, batch: Batch, conditions: dict[str, Any]) -> dict[str, Any]:
        return {"class_labels": torch.full_like(conditions["class_labels"], self.null_class)}

    def training_inputs(self, batch: Batch) -> Batch:
        inputs = super().training_inputs(batch)
        labels = inputs["conditions"]["class_labels"]
        dropped = (torch.rand(len(labels)) < self.DROPPED).to(labels.device)
        return inputs | {"conditions": {"class_labels": torch.where(dropped, self.null_class, labels)}}

    def example_conditions(self, batch: int) -> dict[str, Any]:
        return {"class_labels": torch.zeros(batch, dtype=torch.long)}


class PixArtBackbone(TransformerBackbone):
    """PixArt-alpha (arXiv 2310.00426): T5 captions by cross attention; at 1024 pixels also size and aspect ratio."""

    def with_sizes(self, conditions: dict[str, Any], batch: Batch, device: torch.device) -> dict[str, Any]:
        if not self.network.use_additional_conditions:
            return conditions
        count, size = len(conditions["encoder_hidden_states"]), torch.tensor([self.image_shape()[1:]], device=device)
        size = size.expand(count, 2).float()
        resolution = batch.get("original_size", size).to(device).float()
        # The resolution is that of the picture before it was cropped, the aspect ratio that of what is seen of it.
        sizes = {"resolution": resolution, "aspect_ratio": size[:, :1] / size[:, 1:]}
        return conditions | {"added_cond_kwargs": sizes}

    def example_conditions(self, batch: int) -> dict[str, Any]:
        found: dict[str, Any] = {"encoder_hidden_states": torch.zeros(batch, 120, self.network.config.caption_channels)}
        if self.network.use_additional_conditions:
            found["added_cond_kwargs"] = {"resolution": torch.ones(batch, 2), "aspect_ratio": torch.ones(batch, 1)}
        return found


class SD3Backbone(TransformerBackbone):
    """Stable Diffusion 3 (arXiv 2403.03206): joint blocks. The last one stays: it alone ends the text stream."""

    def needed(self) -> set[str]:
        return {f"transformer_blocks.{len(self.network.transformer_blocks) - 1}"}

    def example_conditions(self, batch: int) -> dict[str, Any]:
        config = self.network.config
        return {
            "encoder_hidden_states": torch.zeros(batch, 333, config.joint_attention_dim),
            "pooled_projections": torch.zeros(batch, config.pooled_projection_dim),
        }


class FluxBackbone(TransformerBackbone):
    """FLUX.1: joint blocks, then single-stream blocks, on patches of 2x2 latents; the guidance scale is an argument."""

    counts = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}
    embeds_guidance = True
    GUIDANCE = 3.5
    """scale under which calibration and distillation run, the pipeline's default: our choice"""

    def data_shape(self) -> tuple[int, int, int]:
        size = self.options.get("sample_size") or 128  # the pipeline's default; the configuration does not say
        return self.network.config.in_channels // 4, size, size

    def with_sizes(self, conditions: dict[str, Any], batch: Batch, device: torch.device) -> dict[str, Any]:
        return self.guided(conditions, self.GUIDANCE)

    def guided(self, conditions: dict[str, Any], guidance: float) -> dict[str, Any]:
        if not self.network.config.guidance_embeds:
            return conditions
        states = conditions["encoder_hidden_states"]
        return conditions | {"guidance": torch.full((len(states),), float(guidance), device=states.device)}

    def step_options(self, scheduler: Any, steps: int) -> dict[str, Any]:
        """As in its pipeline, the steps before any shift are evenly spaced from 1 to 1/steps."""
        options = super().step_options(scheduler, steps)
        if is_flow(scheduler):
            options["sigmas"] = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
        return options

    def arguments(self, inputs: Batch) -> dict[str, Any]:
        sample = inputs["sample"]
        batch, channels, height, width = sample.shape
        patches = sample.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        rows, columns = torch.meshgrid(
            torch.arange(height // 2, device=sample.device),
            torch.arange(width // 2, device=sample.device),
            indexing="ij",
        )
        ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3)
        return {
            "hidden_states": patches.reshape(batch, height * width // 4, channels * 4),
            "timestep": inputs["timestep"] / 1000,
            "img_ids": ids.to(sample.dtype),
            **inputs["conditions"],
        }

    def predict(self, inputs: Batch) -> Tensor:
        batch, channels, height, width = inputs["sample"].shape
        patches = self.network(**self.arguments(inputs), return_dict=False)[0]
        patches = patches.view(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(batch, channels, height, width)

    def example_conditions(self, batch: int) -> dict[str, Any]:
        config = self.network.config
        conditions = {
            "encoder_hidden_states": torch.zeros(batch, 512, config.joint_attention_dim),
            "pooled_projections": torch.zeros(batch, config.pooled_projection_dim),
            "txt_ids": torch.zeros(512, 3),
        }
        return self.guided(conditions, self.GUIDANCE)


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
