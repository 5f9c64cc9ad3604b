"""How well samples fit their captions."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_modules.metrics.protocol import Labels, Reference, Samples


class TextFit:
    """Base class of the measures of how well images fit their captions: the mean of a score per image."""

    better: Literal["lower", "higher"] = "higher"
    transform = "the model's own preprocessing"
    batch_size = 32

    def check(self, shape: tuple[int, int, int], captions: Sequence[str] | None, labels: Labels) -> None:
        if captions is None:
            raise ValueError("it needs captions: a teacher that takes text, and data (or evaluation.prompts) with some")
        if shape[0] != 3:
            raise ValueError(f"it takes images of 3 channels, these are {shape}")

    def fingerprint(self) -> str:
        """Return a digest of the model's weights."""
        raise NotImplementedError

    def protocol(self, reference: Reference) -> dict[str, Any]:
        return {"features": self.fingerprint(), "transform": self.transform}

    def scores(self, images: np.ndarray, captions: list[str], device: torch.device) -> Tensor:
        """Return the scores (N,) of uint8 images (N,H,W,3) and their captions."""
        raise NotImplementedError

    def __call__(self, samples: Samples, reference: Reference) -> float:
        captions = samples.captions
        assert captions is not None

        @torch.inference_mode()
        def score(part: np.ndarray) -> np.ndarray:
            batches = np.split(part, range(self.batch_size, len(part), self.batch_size))
            scores = [self.scores(samples.images[b], [captions[k] for k in b], samples.device) for b in batches]
            return torch.cat(scores).double().cpu().numpy()

        return float(samples.map_parts(score, type(self).__name__).mean())
