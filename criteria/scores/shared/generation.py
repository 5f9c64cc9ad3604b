"""Generation of samples for the criteria that compare what a network generates, not single predictions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from criteria.base import Backbone, Batch
from criteria.protocols import Generative


@dataclass
class Generation:
    """How samples are generated, the same for all units.

    `sampler` makes a diffusers scheduler from the network's own; `guidance` is the scale of classifier-free guidance, 1
    is none.
    """

    sampler: Callable[..., Any]
    steps: int
    guidance: float = 1.0

    def generate(self, backbone: Generative, batch: Batch) -> Tensor:
        """Return the samples (N,C,H,W) of the network as it is; raises FloatingPointError if they are not finite."""
        samples = backbone.generate(batch, self.sampler, self.steps, self.guidance)
        if not torch.isfinite(samples).all():
            raise FloatingPointError("generated samples are not finite")
        return samples

    def generate_without(self, backbone: Generative, batch: Batch, name: str) -> Tensor | None:
        """Return the samples from the same seeds with one unit removed; None if some are not finite."""
        with backbone.without([name]):
            try:
                return self.generate(backbone, batch)
            except FloatingPointError:
                return None


def check_seeds(seeds: int) -> int:
    """Return `criterion.seeds`; raises ValueError where it is no number of samples."""
    if seeds < 1:
        raise ValueError(f"criterion.seeds={seeds} is out of range; choose a whole number of 1 or more")
    return seeds


def explain_no_samples(backbone: Backbone) -> str | None:
    """Return the reason why a network cannot generate samples, None if it can."""
    return None if hasattr(backbone, "generate") else "it generates nothing"
