"""Measures of what a network generates: against reference images, or of the samples alone.

A configuration names any number of them, `evaluation.metrics: {name: {_target_: ...}}`; a class of a user's own is one
that has what `Measure` says.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from cleanfid.fid import kernel_distance
from torch import Tensor, nn
from tqdm import tqdm

from datamodules.sources import located
from lightning_modules.metrics.frechet import Features, Statistics

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


class InceptionScore(OnFeatures):
    """exp(E KL(p(y|x) || p(y))) over classes (arXiv 1606.03498), the mean over `splits` parts of the samples.

    `features` give the logarithms of the classes' probabilities; on another classifier than Inception it is another
    measure, to be given another name.
    """

    better = "higher"

    def __init__(self, features: Features, splits: int = 10) -> None:
        super().__init__(features)
        self.splits = splits

    def protocol(self, reference: Reference) -> dict[str, Any]:
        return super().protocol(reference) | {"splits": self.splits}

    def __call__(self, samples: Samples, reference: Reference) -> float:
        from torchmetrics.image.inception import InceptionScore as Score  # noqa: PLC0415  slow to import

        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # it keeps the features, and one split has no deviation
            torch.manual_seed(0)  # the samples are shuffled before they are split
            score = Score(feature=nn.Identity(), splits=self.splits)
            score.update(torch.from_numpy(samples.features(self.features)))  # softmax undoes the logarithm
            return float(score.compute()[0])


class ClassAccuracy(OnFeatures):
    """Share of the samples that a classifier puts into the class they were asked for.

    That class is the label of a class-conditional network, or the one of `classes` whose name stands in the caption,
    as a word of its own. `features` give the logarithms of the probabilities of `classes`, in this order.
    """

    better = "higher"

    def __init__(self, features: Features, classes: list[str]) -> None:
        super().__init__(features)
        self.classes = classes
        if len(classes) != features.dimension:
            raise ValueError(f"classes={classes}: the classifier has {features.dimension} classes")

    def check(self, shape: tuple[int, int, int], captions: Sequence[str] | None, labels: Labels) -> None:
        super().check(shape, captions, labels)
        self.asked(captions, labels)

    def asked(self, captions: Sequence[str] | None, labels: Labels) -> np.ndarray:
        """The number of each sample's class. Raises ValueError naming a caption or label without one."""
        if labels is not None:
            if labels.min() < 0 or labels.max() >= len(self.classes):
                raise ValueError(
                    f"the teacher has labels from {labels.min()} to {labels.max()}, there are {len(self.classes)} "
                    f"classes: {', '.join(self.classes)}"
                )
            return labels
        if captions is None:
            raise ValueError("its classes are asked for by labels or captions, and this teacher takes neither")
        return np.array([self.named(caption) for caption in captions])

    def named(self, caption: str) -> int:
        words = {word.strip(".,;:!?\"'()").lower() for word in caption.split()}
        found = [number for number, name in enumerate(self.classes) if name.lower() in words]
        if len(found) != 1:
            raise ValueError(f"caption {caption!r} has to name one of these classes: {', '.join(self.classes)}")
        return found[0]

    def protocol(self, reference: Reference) -> dict[str, Any]:
        return super().protocol(reference) | {"classes": len(self.classes)}

    def __call__(self, samples: Samples, reference: Reference) -> float:
        read = samples.features(self.features).argmax(1)
        return float((read == self.asked(samples.captions, samples.labels)).mean())


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
