"""How often an image classifier is right."""

import functools
import hashlib
from typing import Any, Literal

import numpy as np
import torch

from lightning_modules.backbones.classification.backbone import ClassifierBackbone
from lightning_modules.metrics.protocol import in_parts

LOOKED_AT = 256
"""held-out images that tell data sets of one name apart, and whose labels stand for all where labels cost an image"""


class Accuracy:
    """Percent of the held-out images whose label is among the `top` classes of the largest logits.

    All held-out images, or a fixed random choice of `images` of them, `batch_size` at a time, shared out over the
    ranks. `data` is what the data set is called in the protocol.
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
        """A network that is no classifier, too few images, no labels, labels that are none of the network's classes.

        The data of the first call are the ones that are measured: later ones are those that scores were made on, of
        which nothing is asked here.
        """
        if not backbone.classifies:
            raise ValueError(
                "accuracy is of an image classifier, and this teacher is none; choose one, such as teacher=resnet56"
            )
        if self.data is not None:
            return
        if self.top >= backbone.classes:
            raise ValueError(f"top={self.top}: the teacher has {backbone.classes} classes; choose a number below that")
        there = len(data.source("holdout"))
        if self.images is not None and self.images > there:
            raise ValueError(
                f"images={self.images}: data.holdout has {there}; choose a number up to that, or null for all"
            )
        self.data = data
        if not {"image", "label"} <= self.looked_at.keys():
            raise ValueError(f"data={self.name}: {type(data).__name__} gives no images with labels")
        known = getattr(data.source("holdout"), "labels", None)
        check_labels(self.looked_at["label"].numpy() if known is None else known, backbone.classes, self.name)

    @functools.cached_property
    def samples(self) -> Any:
        """The images that are measured: batches of them by their numbers."""
        count = self.images or len(self.data.source("holdout"))
        return self.data.subset("holdout", count, seed=0, batch_size=self.batch_size).dataset

    @functools.cached_property
    def looked_at(self) -> dict[str, Any]:
        """Some of the images that are measured, spread evenly over them."""
        places = np.linspace(0, len(self.samples) - 1, min(len(self.samples), LOOKED_AT)).astype(int)
        return self.samples.__getitems__(places.tolist())

    def protocol(self) -> dict[str, Any]:
        some = self.looked_at
        content = hashlib.sha256(some["image"].numpy().tobytes() + some["label"].numpy().tobytes()).hexdigest()[:8]
        return {"data": self.name, "content": content, "images": len(self.samples), "top": self.top}

    @torch.no_grad()
    def __call__(self, backbone: ClassifierBackbone, device: torch.device) -> float:
        backbone.to(device).eval()
        skipped = self.data.counted("holdout", len(self.samples))

        def right(part: np.ndarray) -> np.ndarray:
            """Of each image whether its label is among the `top` classes."""
            batch = self.samples.__getitems__(part.tolist())
            skipped.add(batch)
            label_N = batch["label"]
            check_labels(label_N.numpy(), backbone.classes, self.name)
            logits_NK = backbone.predict({"sample": batch["image"].to(device)}).float().cpu()
            return (logits_NK.topk(self.top).indices == label_N[:, None]).any(1).numpy()

        found = np.concatenate(list(in_parts(len(self.samples), right, f"accuracy on {self.name}", self.batch_size)))
        skipped.report()
        return 100 * int(found.sum()) / len(found)


def check_labels(label_N: np.ndarray, classes: int, name: str) -> None:
    """Raise ValueError for images without a label, and for labels that are none of so many classes."""
    if (label_N < 0).any():
        raise ValueError(f"data={name}: there are images without a label; choose data with a label for each image")
    if label_N.max() >= classes:
        raise ValueError(
            f"data={name} has labels up to {label_N.max()}, and the teacher has {classes} classes, from 0 on; choose "
            "the data that the teacher was trained on"
        )
