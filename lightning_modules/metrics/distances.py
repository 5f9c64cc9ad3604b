"""Distances between generated samples and reference images.

A configuration has any number of measures, `evaluation.metrics: {name: {_target_: ...}}`. A class outside the
repository can be one, too: see the protocol `Measure`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from cleanfid.fid import kernel_distance

from datamodules.readers.base import located
from lightning_modules.metrics.features import Features
from lightning_modules.metrics.protocol import PART, Labels, OnFeatures, Reference, Samples, describe_reference, origin
from lightning_modules.metrics.statistics import Statistics, check_scipy


class Frechet(OnFeatures):
    """Frechet distance between the Gaussians of two sets of features (FID, arXiv 1706.08500).

    The reference statistics are those of the data set's training images, or of the file `statistics` (also below
    $SECATEUR_DATA): safetensors as written here, or pytorch-fid's .npz. Raises MissingData where it does not exist.
    """

    def __init__(self, features: Features, statistics: str | None = None) -> None:
        super().__init__(features)
        self.path = None if statistics is None else located(statistics, "`statistics` names it; put it there")

    def check(self, shape: tuple[int, int, int], captions: Sequence[str] | None, labels: Labels) -> None:
        check_scipy()
        super().check(shape, captions, labels)

    def reference_statistics(self, reference: Reference) -> Statistics:
        if self.path is None:
            return reference.statistics(self.features)
        return Statistics.load(self.path, **origin(self.features))

    def protocol(self, reference: Reference) -> dict[str, Any]:
        statistics = self.reference_statistics(reference)
        settings = super().protocol(reference)
        settings |= {"reference_images": statistics.count, "reference": statistics.digest()[:8]}
        return settings if self.path is None else settings | {"statistics": self.path.name}

    def __call__(self, samples: Samples, reference: Reference) -> float:
        statistics = Statistics.of(samples.features(self.features), f"samples of {samples.name}")
        return statistics.distance(self.reference_statistics(reference))


class KernelDistance(OnFeatures):
    """Kernel distance (KID, arXiv 1801.01401) by clean-fid, around 0 for equal distributions and below 0 by chance.

    It is the unbiased squared MMD under the kernel (x.y / D + 1)^3, averaged over `subsets` random subsets of at most
    `subset_size` images.
    """

    def __init__(self, features: Features, subsets: int = 100, subset_size: int = 1000) -> None:
        super().__init__(features)
        self.subsets, self.subset_size = subsets, subset_size

    def protocol(self, reference: Reference) -> dict[str, Any]:
        sizes = {"subsets": self.subsets, "subset_size": self.subset_size}
        return super().protocol(reference) | sizes | describe_reference(reference.features(self.features))

    def __call__(self, samples: Samples, reference: Reference) -> float:
        sets = reference.features(self.features), samples.features(self.features)
        state = np.random.get_state()
        np.random.seed(0)  # clean-fid draws its subsets from the global generator
        try:
            return float(kernel_distance(*sets, num_subsets=self.subsets, max_subset_size=self.subset_size))
        finally:
            np.random.set_state(state)


class Precision(OnFeatures):
    """Fraction of the samples that lie in the manifold of the reference images (arXiv 1904.06991, equations 1 and 2).

    The manifold consists of the balls around all reference images that reach to their `k`-th nearest neighbour.
    """

    better = "higher"

    def __init__(self, features: Features, k: int = 3) -> None:
        super().__init__(features)
        self.k = k

    def protocol(self, reference: Reference) -> dict[str, Any]:
        return super().protocol(reference) | {"k": self.k} | describe_reference(reference.features(self.features))

    def __call__(self, samples: Samples, reference: Reference) -> float:
        return share_within(reference.features(self.features), samples.features(self.features), self.k, samples.device)


class Recall(Precision):
    """Fraction of the reference images that lie in the manifold of the samples; see Precision."""

    def __call__(self, samples: Samples, reference: Reference) -> float:
        return share_within(samples.features(self.features), reference.features(self.features), self.k, samples.device)


def share_within(manifold_ND: np.ndarray, points_MD: np.ndarray, k: int, device: torch.device) -> float:
    """Return the fraction of points that lie within the k-th-nearest-neighbour ball of a point of the manifold.

    Raises ValueError where the manifold has no more than k points.
    """
    if len(manifold_ND) <= k:
        raise ValueError(f"k={k} neighbours were asked for, of {len(manifold_ND)} images; choose more images")
    manifold, points = (torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in (manifold_ND, points_MD))
    radius_N = torch.cat([torch.cdist(part, manifold).kthvalue(k + 1).values for part in manifold.split(PART)])
    within = [(torch.cdist(part, manifold) <= radius_N).any(1) for part in points.split(PART)]
    return float(torch.cat(within).double().mean())
