"""Features and references of whatever numbers a test wants, for measures."""

import numpy as np

from lightning_modules.metrics.protocol import Samples
from lightning_modules.metrics.statistics import Statistics


class Flat:
    """Features that are the image itself: whatever numbers a test wants; counts what it was asked for."""

    name, dimension, transform = "flat", 4, "none"

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.asked = scale, []

    def check(self, shape) -> None:
        if shape != (1, 2, 2):
            raise ValueError(f"flat takes images of (1, 2, 2), these are {shape}")

    def fingerprint(self) -> str:
        return str(self.scale)

    def __call__(self, images, device=None):
        self.asked.append(len(images))
        return images.reshape(len(images), -1).astype(np.float64) * self.scale


class Given:
    """A reference, and features, of given vectors."""

    name, transform = "given", "none"

    def __init__(self, vectors, reference=None) -> None:
        self.vectors, self.reference, self.dimension = np.asarray(vectors, float), reference, np.shape(vectors)[1]

    def check(self, shape) -> None: ...

    def fingerprint(self) -> str:
        return "given"

    def __call__(self, images, device=None):
        return self.vectors[images[:, 0, 0, 0]]

    def features(self, features):
        return np.asarray(self.reference, float)

    def statistics(self, features):
        return Statistics.of(np.asarray(self.reference, float))

    def samples(self, **asked) -> Samples:
        return Samples(np.arange(len(self.vectors), dtype=np.uint8).reshape(-1, 1, 1, 1), **asked)


def drawn(count: int, dimension: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dimension))
