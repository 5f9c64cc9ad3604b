"""Backbone of PixArt transformers."""

from typing import Any

import torch

from criteria.base import Batch
from lightning_modules.backbones.diffusion.transformer import TransformerBackbone

TEXT_TOKENS = 120
"""length to which the pipeline pads captions"""


class PixArtBackbone(TransformerBackbone):
    """PixArt-alpha (arXiv 2310.00426), conditioned on T5 text states; at 1024 pixels also on size and aspect ratio."""

    has_onnx = False  # onnxruntime refuses the file that torch writes: a squeeze of a dimension that is not 1

    def complete_conditions(self, conditions: dict[str, Any], batch: Batch, device: torch.device) -> dict[str, Any]:
        if not self.network.use_additional_conditions:
            return conditions
        count, size = len(conditions["encoder_hidden_states"]), torch.tensor([self.image_shape()[1:]], device=device)
        size = size.expand(count, 2).float()
        resolution = batch.get("original_size", size).to(device).float()
        # The resolution is that of the image before it was cropped, the aspect ratio that after.
        sizes = {"resolution": resolution, "aspect_ratio": size[:, :1] / size[:, 1:]}
        return conditions | {"added_cond_kwargs": sizes}

    def example_conditions(self, batch: int) -> dict[str, Any]:
        states = torch.zeros(batch, TEXT_TOKENS, self.network.config.caption_channels)
        if not self.network.use_additional_conditions:
            return {"encoder_hidden_states": states}
        sizes = {"resolution": torch.ones(batch, 2), "aspect_ratio": torch.ones(batch, 1)}
        return {"encoder_hidden_states": states, "added_cond_kwargs": sizes}
