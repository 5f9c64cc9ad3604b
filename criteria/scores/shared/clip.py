"""Cosines between images and captions under CLIP (arXiv 2103.00020), for the criterion and the metric `clip_score`."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def clip_cosines(model: Any, processor: Any, images: np.ndarray, captions: list[str], device: torch.device) -> Tensor:
    """Return the cosines (N,) of the embeddings of images and their captions, in float64.

    Args:
        model: a CLIPModel of transformers, which is moved to the device.
        processor: its CLIPProcessor; captions are truncated to the positions that the model has.
        images: uint8 images (N,H,W,C).
        captions: one per image.
        device: the device of the computation.
    """
    longest = model.config.text_config.max_position_embeddings
    inputs = processor(
        text=captions, images=list(images), return_tensors="pt", padding=True, truncation=True, max_length=longest
    )
    embedded = model.to(device)(**inputs.to(device))
    cosines_N: Tensor = (embedded.image_embeds.double() * embedded.text_embeds.double()).sum(1)
    return cosines_N
