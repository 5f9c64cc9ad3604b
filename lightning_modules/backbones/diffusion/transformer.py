"""Backbone of the diffusion transformers of diffusers: DiT, PixArt, Stable Diffusion 3, FLUX.

Their units are whole blocks. A student is a network of the same class with fewer blocks, numbered from 0.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from diffusers.models.attention import JointTransformerBlock
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.modeling_utils import no_init_weights
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from criteria.base import Batch, Level, Unit, parse_level
from criteria.selection.base import check_names
from lightning_modules.backbones.base import Change
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.backbones.diffusion.pruned_unet import put_modules
from lightning_modules.backbones.repair.sites import Site, find_layer_sites, sort_sites

JOINT = (JointTransformerBlock, FluxTransformerBlock, FluxSingleTransformerBlock)
"""Classes of blocks with a text stream beside the image stream; they return the text stream first."""


class Skip(nn.Module):
    """Stands in for a removed block: returns its input, of both streams where there are two."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.joint = isinstance(block, JOINT)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
        return (encoder_hidden_states, hidden_states) if self.joint else hidden_states


class TransformerBackbone(DiffusionBackbone):
    """A diffusion transformer.

    The option `sample_size` is the height and width of the latents, where it is not the configuration's.
    """

    component = "transformer"
    block_counts = {"transformer_blocks": "num_layers"}
    """{attribute of the network that lists blocks: field of the configuration with their number}"""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for part in self.network.modules():
            if isinstance(part, LabelEmbedding):
                part.dropout_prob = 0.0  # `training_inputs` drops labels, so that student and teacher get the same

    # Units and their removal

    def blocks(self) -> dict[str, nn.Module]:
        """Return all blocks, or their stand-ins, by module path, in the order of the forward pass."""
        return {
            f"{name}.{i}": block for name in self.block_counts for i, block in enumerate(getattr(self.network, name))
        }

    def required_blocks(self) -> set[str]:
        """Return the blocks that cannot be removed, because the network takes more from them than their output."""
        return set()

    def units(self, level: str = "depth") -> list[Unit]:
        """Return the removable blocks; raises ValueError for a level other than depth."""
        if parse_level(level) != Level.DEPTH:
            raise ValueError(
                f"criterion.level={level!r}: operators and channels can be removed from U-Nets only; of a "
                f"{type(self.network).__name__} choose criterion.level=depth"
            )
        macs = self.macs()
        return [
            Unit(name, "block", sum(p.numel() for p in block.parameters()), macs.of(name))
            for name, block in self.blocks().items()
            if name not in self.required_blocks() and not isinstance(block, Skip)
        ]

    def freed_weights(self, unit: Unit, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [tensors[f"{unit.name}.{key}"] for key, _ in self.network.get_submodule(unit.name).named_parameters()]

    def survivors(self) -> list[str]:
        return [name for name, block in self.blocks().items() if not isinstance(block, Skip)]

    def self_contained(self) -> list[str]:
        return [name for name in self.survivors() if name not in self.required_blocks()]

    def kept(self) -> list[str]:
        return list(self.moved) or self.survivors()

    def stand_in(self, unit: nn.Module) -> nn.Module:
        return Skip(unit)

    def remove(self, names: Iterable[str]) -> dict[str, nn.Module]:
        removed = {name: self.network.get_submodule(name) for name in names}
        put_modules(self.network, {name: Skip(block) for name, block in removed.items()})
        return removed

    def pruned(self, changes: Sequence[Change]) -> Self:
        kinds = {change["kind"] for change in changes}
        if kinds - {"bypass"}:
            raise ValueError(
                f"a {type(self.network).__name__} can only lose whole blocks; the plan says {sorted(kinds)}"
            )
        check_names([change["unit"] for change in changes], self.units(), "plan.units")
        moved = self.renumbered(changes)
        # Entries that begin with an underscore would set fields back to their defaults.
        config = {key: value for key, value in self.network.config.items() if not key.startswith("_")}
        for name, count in self.block_counts.items():
            config[count] = sum(block.startswith(f"{name}.") for block in moved)
        if config.get("dual_attention_layers"):
            kept = {int(old.split(".")[1]): int(new.split(".")[1]) for old, new in moved.items()}
            config["dual_attention_layers"] = [kept[i] for i in config["dual_attention_layers"] if i in kept]
        with next(self.network.parameters()).device, no_init_weights():
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
        """Return {path of a kept block: its path in the student}."""
        gone = {change["unit"] for change in changes}
        moved: dict[str, str] = {}
        for name in self.block_counts:
            kept = [block for block in self.blocks() if block.startswith(f"{name}.") and block not in gone]
            moved |= {block: f"{name}.{i}" for i, block in enumerate(kept)}
        return moved

    def adopt(self, network: nn.Module, changes: Sequence[Change] = ()) -> Self:
        return self.student(network, self.renumbered(changes))

    def repair_sites(self, student: Self, changes: Sequence[Change]) -> list[Site]:
        order = student.forward_order()
        return sort_sites(find_layer_sites(self.blocks(), self.paths_in(student), order), order)

    def stages(self) -> dict[str, nn.Module]:
        """Return the blocks: each is a stage."""
        return self.blocks()

    # What the network takes

    @property
    def predicts_variance(self) -> bool:
        return bool(self.network.config.out_channels == 2 * self.network.config.in_channels)

    def arguments(self, inputs: Batch) -> dict[str, Any]:
        return {"hidden_states": inputs["sample"], "timestep": inputs["timestep"], **inputs["conditions"]}
