"""What a measure is: of generated samples, or of a network itself."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from tqdm import tqdm

from lightning_modules.metrics.features import Features
from lightning_modules.metrics.statistics import Statistics

PART = 500
"""images whose features are computed at once"""
Labels = np.ndarray | None


class Reference(Protocol):
    """The images that samples are compared with."""

    def statistics(self, features: Features) -> Statistics:
        """Mean and covariance of the features of all of them."""
        ...

    def features(self, features: Features) -> np.ndarray:
        """float64 (M, dimension) of some of them, at most `evaluation.reference_images`."""
        ...


class Samples:
    """What a network generated: uint8 (N,H,W,C) images, memory-mapped, and what it was asked for.

    `captions` and `labels` have an entry an image, or are None where the network takes none. Features are computed
    once for all measures, shared out over the ranks, in the same parts and so with the same bits on any number of them.
    """

    def __init__(
        self,
        images: np.ndarray,
        name: str = "samples",
        captions: Sequence[str] | None = None,
        labels: Labels = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.images, self.name, self.captions, self.labels = images, name, captions, labels
        self.device = torch.device(device)
        self.known: dict[tuple[str, ...], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.images)

    def features(self, features: Features) -> np.ndarray:
        """float64 (N, dimension)."""
        key = (features.name, *origin(features).values())
        if key not in self.known:
            self.known[key] = self.mapped(lambda part: features(self.images[part], self.device), features.name)
        return self.known[key]

    def mapped(self, compute: Callable[[np.ndarray], np.ndarray], what: str) -> np.ndarray:
        """What `compute` makes of the indices of a part of the samples, for all of them in their order."""
        return np.concatenate(list(in_parts(len(self), compute, f"{what} of {self.name}")))


def in_parts(
    count: int, compute: Callable[[np.ndarray], np.ndarray], what: str, size: int | None = None
) -> Iterator[np.ndarray]:
    """compute(indices) of `size` (or PART) at a time, in their order on every rank; each rank computes its share."""
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if spread else (0, 1)
    size = size or PART
    parts = np.split(np.arange(count), range(size, count, size))
    for start in tqdm(range(0, len(parts), world), desc=what, disable=rank > 0 or len(parts) <= world):
        mine = start + rank
        found: list[Any] = [compute(parts[mine]) if mine < len(parts) else None]
        if world > 1:
            gathered: list[Any] = [None] * world
            torch.distributed.all_gather_object(gathered, found[0])
            found = gathered
        yield from (part for part in found if part is not None)


def origin(features: Features) -> dict[str, str]:
    """What features of the same images have to agree in to be the same."""
    return {"features": features.fingerprint(), "transform": features.transform}


class Measure(Protocol):
    """One number for a set of samples. (What is measured without samples is a `NetworkMeasure`.)"""

    better: Literal["lower", "higher"]

    def check(self, shape: tuple[int, int, int], captions: Sequence[str] | None, labels: Labels) -> None:
        """Raise ValueError where samples of (channels, height, width), asked for by these, cannot be measured."""
        ...

    def protocol(self, reference: Reference) -> dict[str, Any]:
        """What has to agree for two values to be comparable, for metrics.json."""
        ...

    def __call__(self, samples: Samples, reference: Reference) -> float: ...


class NetworkMeasure(Protocol):
    """One number for a network, or the mean of several, taken without samples: told by `of = "network"`."""

    of: Literal["network"]
    better: Literal["lower", "higher"]
    parts: Sequence[str]
    """Names of what the number is the mean of, which are values of their own, `<measure>_<part>`; () for none."""

    def check(self, backbone: Any, data: Any) -> None:
        """Raise ValueError where this network (a backbone) cannot be measured, or trains on what measures it."""
        ...

    def protocol(self) -> dict[str, Any]:
        """What has to agree for two values to be comparable, for metrics.json."""
        ...

    def __call__(self, backbone: Any, device: torch.device) -> float | dict[str, float]:
        """The number; or, of a measure with `parts`, that of each. Called on all ranks, under the precision."""
        ...


class OnFeatures:
    """What measures share that look at images through some features."""

    better: Literal["lower", "higher"] = "lower"

    def __init__(self, features: Features) -> None:
        self.features = features

    def check(self, shape: tuple[int, int, int], captions: Sequence[str] | None, labels: Labels) -> None:
        self.features.check(shape)

    def protocol(self, reference: Reference) -> dict[str, Any]:
        return origin(self.features)

    def __call__(self, samples: Samples, reference: Reference) -> float:
        raise NotImplementedError


def told(features_ND: np.ndarray) -> dict[str, Any]:
    """How many reference images there are, and what tells them from others."""
    return {"reference_images": len(features_ND), "reference": hashlib.sha256(features_ND.tobytes()).hexdigest()[:8]}
