"""PixArt transformers."""

from typing import Any

import torch

from criteria.base import Batch
from lightning_modules.backbones.diffusion.transformer import TransformerBackbone


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
