"""The fraction of samples that show the requested class."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_modules.metrics.features import Features
from lightning_modules.metrics.protocol import Labels, OnFeatures, Reference, Samples


class ClassAccuracy(OnFeatures):
    """Fraction of the samples that a classifier assigns to the requested class.

    The requested class is the label of a class-conditional network, or the one of `classes` whose name is a word of
    the caption. `features` are the log-probabilities of `classes`, in this order.
    """

    better = "higher"

    def __init__(self, features: Features, classes: list[str]) -> None:
        super().__init__(features)
        self.classes = classes
        if len(classes) != features.dimension:
            raise ValueError(f"classes={classes}: the classifier has {features.dimension} classes")

    def check(self, shape: tuple[int, int, int], captions: Sequence[str] | None, labels: Labels) -> None:
        super().check(shape, captions, labels)
        self.requested_classes(captions, labels)

    def requested_classes(self, captions: Sequence[str] | None, labels: Labels) -> np.ndarray:
        """Return the number of each sample's class; raises ValueError naming a caption or label without one."""
        if labels is not None:
            if labels.min() < 0 or labels.max() >= len(self.classes):
                raise ValueError(
                    f"the teacher has labels from {labels.min()} to {labels.max()}, there are {len(self.classes)} "
                    f"classes: {', '.join(self.classes)}"
                )
            return labels
        if captions is None:
            raise ValueError("its classes are asked for by labels or captions, and this teacher takes neither")
        return np.array([self.class_in(caption) for caption in captions])

    def class_in(self, caption: str) -> int:
        """Return the number of the one class that a caption names; raises ValueError for none or several."""
        words = {word.strip(".,;:!?\"'()").lower() for word in caption.split()}
        numbers = [number for number, name in enumerate(self.classes) if name.lower() in words]
        if len(numbers) != 1:
            raise ValueError(f"caption {caption!r} has to name one of these classes: {', '.join(self.classes)}")
        return numbers[0]

    def protocol(self, reference: Reference) -> dict[str, Any]:
        return super().protocol(reference) | {"classes": len(self.classes)}

    def __call__(self, samples: Samples, reference: Reference) -> float:
        classes_N = samples.features(self.features).argmax(1)
        return float((classes_N == self.requested_classes(samples.captions, samples.labels)).mean())
