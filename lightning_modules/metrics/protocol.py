"""Protocols of measures, of generated samples and of networks, and of the images that they compare."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from tqdm import tqdm

from lightning_modules.metrics.features import Features
from lightning_modules.metrics.statistics import Statistics

PART = 500
"""Number of images whose features are computed in one call."""
Labels = np.ndarray | None


class Reference(Protocol):
    """The images that samples are compared with."""

    def statistics(self, features: Features) -> Statistics:
        """Return the mean and covariance of the features of all images."""
        ...

    def features(self, features: Features) -> np.ndarray:
        """Return the features (M, dimension), float64, of at most `evaluation.reference_images` images."""
        ...


class Samples:
    """The images that a network generated, with their captions and labels.

    Features are computed once for all measures. Ranks share them in the same parts, so that they have the same bits on
    any number of ranks.

    Args:
        images: uint8 (N,H,W,C), memory-mapped.
        name: name of the network, for progress bars and warnings.
        captions: the caption of each image; None where the network takes none.
        labels: the class of each image; None where the network takes none.
        device: device of the computation of features.
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
        """Return the features (N, dimension) of all samples, float64."""
        key = (features.name, *origin(features).values())
        if key not in self.known:
            self.known[key] = self.map_parts(lambda part: features(self.images[part], self.device), features.name)
        return self.known[key]

    def map_parts(self, compute: Callable[[np.ndarray], np.ndarray], what: str) -> np.ndarray:
        """Return compute(indices of some samples) for all samples, concatenated in their order."""
        return np.concatenate(list(in_parts(len(self), compute, f"{what} of {self.name}")))


def in_parts(
    count: int, compute: Callable[[np.ndarray], np.ndarray], what: str, size: int | None = None
) -> Iterator[np.ndarray]:
    """Yield compute(indices) for parts of `size` (or PART) indices, in their order, on every rank.

    Each rank computes its share of the parts. `what` is the title of the progress bar.
    """
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if spread else (0, 1)
    size = size or PART
    parts = np.split(np.arange(count), range(size, count, size))
    for start in tqdm(range(0, len(parts), world), desc=what, disable=rank > 0 or len(parts) <= world):
        number = start + rank
        results: list[Any] = [compute(parts[number]) if number < len(parts) else None]
        if world > 1:
            gathered: list[Any] = [None] * world
            torch.distributed.all_gather_object(gathered, results[0])
            results = gathered
        yield from (result for result in results if result is not None)


def origin(features: Features) -> dict[str, str]:
    """Return what identifies features: two computations that agree in it give the same features of an image."""
    return {"features": features.fingerprint(), "transform": features.transform}


class Measure(Protocol):
    """One number for a set of samples; a number that needs no samples is a `NetworkMeasure`."""

    better: Literal["lower", "higher"]

    def check(self, shape: tuple[int, int, int], captions: Sequence[str] | None, labels: Labels) -> None:
        """Raise ValueError where samples of a shape (C,H,W) with these captions and labels cannot be measured."""
        ...

    def protocol(self, reference: Reference) -> dict[str, Any]:
        """Return the settings, for metrics.json, that must agree for two values to be comparable."""
        ...

    def __call__(self, samples: Samples, reference: Reference) -> float: ...


class NetworkMeasure(Protocol):
    """One number for a network, or the mean of several, without samples; recognised by `of = "network"`."""

    of: Literal["network"]
    better: Literal["lower", "higher"]
    parts: Sequence[str]
    """Names of the values whose mean the number is, each reported as `<measure>_<part>`; () for none."""

    def check(self, backbone: Any, data: Any) -> None:
        """Raise ValueError where this backbone cannot be measured, or is trained on the data of the measure."""
        ...

    def protocol(self) -> dict[str, Any]:
        """Return the settings, for metrics.json, that must agree for two values to be comparable."""
        ...

    def __call__(self, backbone: Any, device: torch.device) -> float | dict[str, float]:
        """Return the number, or one per part. It is called on all ranks, under the precision of the evaluation."""
        ...


class OnFeatures:
    """Base class of the measures that are computed from features of images."""

    better: Literal["lower", "higher"] = "lower"

    def __init__(self, features: Features) -> None:
        self.features = features

    def check(self, shape: tuple[int, int, int], captions: Sequence[str] | None, labels: Labels) -> None:
        self.features.check(shape)

    def protocol(self, reference: Reference) -> dict[str, Any]:
        return origin(self.features)

    def __call__(self, samples: Samples, reference: Reference) -> float:
        raise NotImplementedError


def describe_reference(features_ND: np.ndarray) -> dict[str, Any]:
    """Return the number of reference images, and a digest of their features."""
    return {"reference_images": len(features_ND), "reference": hashlib.sha256(features_ND.tobytes()).hexdigest()[:8]}
