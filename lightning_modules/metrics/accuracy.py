"""Accuracy of an image classifier."""

import functools
import hashlib
from typing import Any, Literal

import numpy as np
import torch

from lightning_modules.backbones.classification.backbone import ClassifierBackbone
from lightning_modules.metrics.protocol import in_parts

PROBED_IMAGES = 256
"""Number of held-out images whose content identifies the data set in the protocol, and whose labels are checked where
reading a label means reading an image."""


class Accuracy:
    """Percent of the held-out images whose label is among the `top` classes of the largest logits.

    Args:
        data: name of the data set in the protocol.
        images: size of a fixed random choice of the held-out images; None takes all.
        batch_size: images per forward pass; ranks share the batches.
        top: number of classes.
    """

    of = "network"
    better: Literal["lower", "higher"] = "higher"
    parts: tuple[str, ...] = ()

    def __init__(self, data: str, images: int | None = None, batch_size: int = 250, top: int = 1) -> None:
        for name, value in (("images", images), ("batch_size", batch_size), ("top", top)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is out of range; choose a whole number of 1 or more")
        self.name, self.images, self.batch_size, self.top = data, images, batch_size, top
        self.data: Any = None

    def check(self, backbone: Any, data: Any) -> None:
        """Raise ValueError for a network that is no classifier, too few images, and missing or unknown labels.

        The data of the first call are measured. Later calls pass the data that scores were made on, which may be any.
        """
        if not backbone.classifies:
            raise ValueError(
                "accuracy is of an image classifier, and this teacher is none; choose one, such as teacher=resnet56"
            )
        if self.data is not None:
            return
        if self.top >= backbone.classes:
            raise ValueError(f"top={self.top}: the teacher has {backbone.classes} classes; choose a number below that")
        available = len(data.source("holdout"))
        if self.images is not None and self.images > available:
            raise ValueError(
                f"images={self.images}: data.holdout has {available}; choose a number up to that, or null for all"
            )
        self.data = data
        if not {"image", "label"} <= self.probed.keys():
            raise ValueError(f"data={self.name}: {type(data).__name__} gives no images with labels")
        known = getattr(data.source("holdout"), "labels", None)
        check_labels(self.probed["label"].numpy() if known is None else known, backbone.classes, self.name)

    @functools.cached_property
    def samples(self) -> Any:
        """The measured images; `__getitems__` gives batches by their numbers."""
        count = self.images or len(self.data.source("holdout"))
        return self.data.subset("holdout", count, seed=0, batch_size=self.batch_size).dataset

    @functools.cached_property
    def probed(self) -> dict[str, Any]:
        """A batch of at most PROBED_IMAGES of the measured images, evenly spaced."""
        numbers = np.linspace(0, len(self.samples) - 1, min(len(self.samples), PROBED_IMAGES)).astype(int)
        return self.samples.__getitems__(numbers.tolist())

    def protocol(self) -> dict[str, Any]:
        batch = self.probed
        content = hashlib.sha256(batch["image"].numpy().tobytes() + batch["label"].numpy().tobytes()).hexdigest()[:8]
        return {"data": self.name, "content": content, "images": len(self.samples), "top": self.top}

    @torch.no_grad()
    def __call__(self, backbone: ClassifierBackbone, device: torch.device) -> float:
        backbone.to(device).eval()
        skipped = self.data.new_counter("holdout", len(self.samples))

        def classify(part: np.ndarray) -> np.ndarray:
            """Return for each image whether its label is among the `top` classes."""
            batch = self.samples.__getitems__(part.tolist())
            skipped.add(batch)
            label_N = batch["label"]
            check_labels(label_N.numpy(), backbone.classes, self.name)
            logits_NK = backbone.predict({"sample": batch["image"].to(device)}).float().cpu()
            return (logits_NK.topk(self.top).indices == label_N[:, None]).any(1).numpy()

        parts = in_parts(len(self.samples), classify, f"accuracy on {self.name}", self.batch_size)
        correct_N = np.concatenate(list(parts))
        skipped.report()
        return 100 * int(correct_N.sum()) / len(correct_N)


def check_labels(label_N: np.ndarray, classes: int, name: str) -> None:
    """Raise ValueError for images without a label, and for labels outside of 0 to `classes` - 1."""
    if (label_N < 0).any():
        raise ValueError(f"data={name}: there are images without a label; choose data with a label for each image")
    if label_N.max() >= classes:
        raise ValueError(
            f"data={name} has labels up to {label_N.max()}, and the teacher has {classes} classes, from 0 on; choose "
            "the data that the teacher was trained on"
        )
