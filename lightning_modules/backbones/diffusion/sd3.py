"""Stable Diffusion 3 transformers."""

from typing import Any

import torch

from lightning_modules.backbones.diffusion.transformer import TransformerBackbone


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
