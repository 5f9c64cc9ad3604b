"""The share of samples that show the class that was asked for."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_modules.metrics.features import Features
from lightning_modules.metrics.protocol import Labels, OnFeatures, Reference, Samples


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
