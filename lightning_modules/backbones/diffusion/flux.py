"""Backbone of FLUX transformers."""

from typing import Any

import torch
from torch import Tensor

from criteria.base import Batch
from lightning_modules.backbones.diffusion.schedule import takes_argument
from lightning_modules.backbones.diffusion.transformer import TransformerBackbone

LATENT_SIZE = 128
"""height and width of latents where `teacher.sample_size` is not set: the pipeline's default"""
TEXT_TOKENS = 512
"""length to which the pipeline pads captions for T5"""


class FluxBackbone(TransformerBackbone):
    """FLUX.1: joint blocks, then single-stream blocks, on patches of 2x2 latents; the guidance scale is an argument."""

    block_counts = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}
    GUIDANCE = 3.5
    """guidance scale of calibration and distillation: the pipeline's default, our choice"""

    @property
    def embeds_guidance(self) -> bool:
        return True

    def data_shape(self) -> tuple[int, int, int]:
        size = self.options.get("sample_size") or LATENT_SIZE
        return self.network.config.in_channels // 4, size, size

    def complete_conditions(self, conditions: dict[str, Any], batch: Batch, device: torch.device) -> dict[str, Any]:
        return self.with_guidance(conditions, self.GUIDANCE)

    def with_guidance(self, conditions: dict[str, Any], guidance: float | Tensor) -> dict[str, Any]:
        if not self.network.config.guidance_embeds:
            return conditions
        states = conditions["encoder_hidden_states"]
        scales = torch.as_tensor(guidance, dtype=torch.float32, device=states.device)
        return conditions | {"guidance": scales.expand(len(states))}

    def step_options(self, scheduler: Any, steps: int) -> dict[str, Any]:
        """Return the shift, and noise levels evenly spaced from 1 to 1/steps before the shift, as in its pipeline."""
        options = super().step_options(scheduler, steps)
        if takes_argument(scheduler.set_timesteps, "sigmas"):
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
            "encoder_hidden_states": torch.zeros(batch, TEXT_TOKENS, config.joint_attention_dim),
            "pooled_projections": torch.zeros(batch, config.pooled_projection_dim),
            "txt_ids": torch.zeros(TEXT_TOKENS, 3),
        }
        return self.with_guidance(conditions, self.GUIDANCE)
