"""Backbone of the transformers of Stable Diffusion 3."""

from typing import Any

import torch

from lightning_modules.backbones.diffusion.transformer import TransformerBackbone

TEXT_TOKENS = 77 + 256
"""length of the text states in the pipeline: tokens of CLIP, then of T5"""


class SD3Backbone(TransformerBackbone):
    """Stable Diffusion 3 (arXiv 2403.03206), a stack of joint blocks.

    The last block is not removable: it is the only one that returns no text stream.
    """

    def required_blocks(self) -> set[str]:
        return {f"transformer_blocks.{len(self.network.transformer_blocks) - 1}"}

    def example_conditions(self, batch: int) -> dict[str, Any]:
        config = self.network.config
        return {
            "encoder_hidden_states": torch.zeros(batch, TEXT_TOKENS, config.joint_attention_dim),
            "pooled_projections": torch.zeros(batch, config.pooled_projection_dim),
        }
