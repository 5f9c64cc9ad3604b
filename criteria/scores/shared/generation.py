"""What criteria share that look at what a network generates, not at single predictions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from criteria.base import Backbone, Batch


@dataclass
class Generation:
    """How samples are drawn: `sampler` makes a diffusers scheduler, `guidance` 1 is none; the same for all units."""

    sampler: Callable[..., Any]
    steps: int
    guidance: float = 1.0

    def dense(self, backbone: Backbone, batch: Batch) -> Tensor:
        """The samples (N,C,H,W) of the whole network. Raises FloatingPointError where they are not finite."""
        samples = backbone.generate(batch, self.sampler, self.steps, self.guidance)
        if not torch.isfinite(samples).all():
            raise FloatingPointError("generated samples are not finite")
        return samples

    def without(self, backbone: Backbone, batch: Batch, name: str) -> Tensor | None:
        """The samples from the same seeds with one unit removed; None where some are not finite."""
        with backbone.without([name]):
            try:
                return self.dense(backbone, batch)
            except FloatingPointError:
                return None


def check_seeds(seeds: int) -> int:
    """`criterion.seeds`; raises ValueError where it is no number of samples."""
    if seeds < 1:
        raise ValueError(f"criterion.seeds={seeds} is out of range; choose a whole number of 1 or more")
    return seeds


def generates(backbone: Backbone) -> str | None:
    """None, or the reason why samples cannot be drawn from this network."""
    return None if hasattr(backbone, "generate") else "it generates nothing"
