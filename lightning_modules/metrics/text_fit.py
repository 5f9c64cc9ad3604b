"""How well samples fit their captions."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_modules.metrics.protocol import Labels, Reference, Samples


class TextFit:
    """What measures share that say how well images fit the captions they were asked for: a score an image, averaged."""

    better: Literal["lower", "higher"] = "higher"
    transform = "the model's own preprocessing"
    batch_size = 32

    def check(self, shape: tuple[int, int, int], captions: Sequence[str] | None, labels: Labels) -> None:
        if captions is None:
            raise ValueError("it needs captions: a teacher that takes text, and data (or evaluation.prompts) with some")
        if shape[0] != 3:
            raise ValueError(f"it takes images of 3 channels, these are {shape}")

    def fingerprint(self) -> str:
        """Of the model's weights."""
        raise NotImplementedError

    def protocol(self, reference: Reference) -> dict[str, Any]:
        return {"features": self.fingerprint(), "transform": self.transform}

    def scores(self, images: np.ndarray, captions: list[str], device: torch.device) -> Tensor:
        """uint8 (N,H,W,3) images and their captions -> (N,)."""
        raise NotImplementedError

    def __call__(self, samples: Samples, reference: Reference) -> float:
        captions = samples.captions
        assert captions is not None

        @torch.inference_mode()
        def scored(part: np.ndarray) -> np.ndarray:
            batches = np.split(part, range(self.batch_size, len(part), self.batch_size))
            found = [self.scores(samples.images[b], [captions[k] for k in b], samples.device) for b in batches]
            return torch.cat(found).double().cpu().numpy()

        return float(samples.mapped(scored, type(self).__name__).mean())
