"""Features of DINOv2 (arXiv 2304.07193): a Frechet distance on them is FD-DINOv2 (arXiv 2306.04675), or FDD."""

import functools
from typing import Any

import numpy as np
import torch

from lightning_modules.metrics.features import CPU, resized
from lightning_modules.metrics.published import digest_of, local_folder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Per channel, of ImageNet."""


class Dino:
    """Class token after the last layer, of images resized to `size` pixels by PIL's bicubic filter.

    The defaults are those of dgm-eval (layer6ai-labs): ViT-L/14 without registers at 224 pixels. Its position
    embeddings are interpolated by transformers here and by DINOv2's own code there, which changes features slightly:
    compare distances of one implementation only. `path` is a folder or the id of a downloaded model of the hub.
    """

    name = "fdd"

    def __init__(self, path: str = "facebook/dinov2-large", size: int = 224) -> None:
        from transformers import AutoConfig  # noqa: PLC0415  slow to import

        self.folder, self.size = local_folder(path), size
        self.dimension = AutoConfig.from_pretrained(self.folder, local_files_only=True).hidden_size
        self.transform = f"PIL bicubic, {size}x{size}, ImageNet mean and deviation"

    def check(self, shape: tuple[int, int, int]) -> None:
        if shape[0] != 3:
            raise ValueError(f"DINOv2 takes images of 3 channels, these are {shape}; leave fdd out")

    @functools.cached_property
    def weights(self) -> str:
        return digest_of(self.folder.glob("*.safetensors"))

    def fingerprint(self) -> str:
        return self.weights

    @functools.cached_property
    def network(self) -> Any:
        from transformers import AutoModel  # noqa: PLC0415  slow to import

        return AutoModel.from_pretrained(self.folder, local_files_only=True, use_safetensors=True).eval()

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, device: torch.device = CPU) -> np.ndarray:
        network = self.network.to(device)
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
        features = []
        for start in range(0, len(images), 32):
            pixels = resized(images[start : start + 32], self.size)
            pixels_NCHW = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2) / 255
            features.append(network((pixels_NCHW - mean) / std).last_hidden_state[:, 0].double().cpu())
        return torch.cat(features).numpy()
