"""Measures of what a network generates: against reference images, or of the samples alone.

A configuration names any number of them, `evaluation.metrics: {name: {_target_: ...}}`; a class of a user's own is one
that has what `Measure` says.
"""

from typing import Any

import numpy as np
import torch
from cleanfid.fid import kernel_distance

from datamodules.readers.base import located
from lightning_modules.metrics.features import Features
from lightning_modules.metrics.protocol import PART, OnFeatures, Reference, Samples, origin, told
from lightning_modules.metrics.statistics import Statistics


class Frechet(OnFeatures):
    """The Frechet distance between the Gaussians of both sets of features (FID, arXiv 1706.08500).

    Reference statistics are those of the data set's training images, or of the file `statistics` (also below
    $SECATEUR_DATA): safetensors as written here, or pytorch-fid's .npz. Raises MissingData where it is not there.
    """

    def __init__(self, features: Features, statistics: str | None = None) -> None:
        super().__init__(features)
        self.path = None if statistics is None else located(statistics, "`statistics` names it; put it there")

    def against(self, reference: Reference) -> Statistics:
        if self.path is None:
            return reference.statistics(self.features)
        return Statistics.load(self.path, **origin(self.features))

    def protocol(self, reference: Reference) -> dict[str, Any]:
        against = self.against(reference)
        found = super().protocol(reference) | {"reference_images": against.count, "reference": against.digest()[:8]}
        return found if self.path is None else found | {"statistics": self.path.name}

    def __call__(self, samples: Samples, reference: Reference) -> float:
        found = Statistics.of(samples.features(self.features), f"samples of {samples.name}")
        return found.distance(self.against(reference))


class KernelDistance(OnFeatures):
    """KID (arXiv 1801.01401) by clean-fid: the unbiased squared MMD under the kernel (x.y / D + 1)^3, averaged over
    `subsets` random subsets of at most `subset_size` images. Around 0 for the same distribution, below 0 by chance."""

    def __init__(self, features: Features, subsets: int = 100, subset_size: int = 1000) -> None:
        super().__init__(features)
        self.subsets, self.subset_size = subsets, subset_size

    def protocol(self, reference: Reference) -> dict[str, Any]:
        sizes = {"subsets": self.subsets, "subset_size": self.subset_size}
        return super().protocol(reference) | sizes | told(reference.features(self.features))

    def __call__(self, samples: Samples, reference: Reference) -> float:
        sets = reference.features(self.features), samples.features(self.features)
        state = np.random.get_state()
        np.random.seed(0)  # clean-fid draws its subsets from the global generator
        try:
            return float(kernel_distance(*sets, num_subsets=self.subsets, max_subset_size=self.subset_size))
        finally:
            np.random.set_state(state)


class Precision(OnFeatures):
    """Share of the samples that lie in the reference images' manifold: within the distance of one of these from its
    `k`-th nearest neighbour (arXiv 1904.06991)."""

    better = "higher"

    def __init__(self, features: Features, k: int = 3) -> None:
        super().__init__(features)
        self.k = k

    def protocol(self, reference: Reference) -> dict[str, Any]:
        return super().protocol(reference) | {"k": self.k} | told(reference.features(self.features))

    def __call__(self, samples: Samples, reference: Reference) -> float:
        return share_within(reference.features(self.features), samples.features(self.features), self.k, samples.device)


class Recall(Precision):
    """Share of the reference images that lie in the samples' manifold; see Precision."""

    def __call__(self, samples: Samples, reference: Reference) -> float:
        return share_within(samples.features(self.features), reference.features(self.features), self.k, samples.device)


def share_within(manifold_ND: np.ndarray, points_MD: np.ndarray, k: int, device: torch.device) -> float:
    """The share of points that are no farther from some point of the manifold than its k-th nearest other one is.

    Raises ValueError where the manifold has no more than k points.
    """
    if len(manifold_ND) <= k:
        raise ValueError(f"k={k} neighbours were asked for, of {len(manifold_ND)} images; choose more images")
    manifold, points = (torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in (manifold_ND, points_MD))
    radius_N = torch.cat([torch.cdist(part, manifold).kthvalue(k + 1).values for part in manifold.split(PART)])
    within = [(torch.cdist(part, manifold) <= radius_N).any(1) for part in points.split(PART)]
    return float(torch.cat(within).double().mean())
