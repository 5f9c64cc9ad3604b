"""Batches of images, of stored latents, and of what a teacher is given for them."""

from typing import Any

import numpy as np
import torch

from datamodules.base import Samples
from datamodules.latents import StoredSplit
from datamodules.readers.base import Source
from datamodules.seeding import derive, numpy_rng
from datamodules.teacher_outputs import Draws, StoredOutputs


class ImageSet(Samples):
    """Batches of a source: "image" float32 (N,C,H,W) in [-1,1], "label" (N,), "index" (N,), and the rest of its record.

    A batch also has "posterior" (N,), the seeds from which a VAE's latents are drawn. These seeds, mirroring and
    shifting are functions of (seed, position).

    Args:
        source: the source.
        seed: seed of everything that is random.
        flip: mirror every other image, at random.
        crop: shift each image by up to so many pixels in both directions, at random; black comes in at the border.
        labels: (classes,) the label that takes the place of each label of the source; None leaves them.
    """

    def __init__(
        self,
        source: Source,
        seed: int = 0,
        flip: bool = False,
        crop: int = 0,
        labels: np.ndarray | None = None,
    ) -> None:
        super().__init__(source, seed)
        self.flip, self.crop, self.labels = flip, crop, labels

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        seeds = [derive(self.seed, "posterior", position) for position in positions]
        batch = super().__getitems__(positions) | {"posterior": torch.tensor(seeds)}
        if self.labels is not None:
            label_N = batch["label"]
            batch["label"] = torch.where(label_N < 0, label_N, torch.from_numpy(self.labels)[label_N])
        return batch

    def record(self, positions: list[int], indices: np.ndarray) -> dict[str, Any]:
        """Return the source's record of some samples, with augmented images as a float tensor."""
        record = super().record(positions, indices)
        images = record.pop("image")
        if self.flip or self.crop:
            images = np.stack([self.augment(image, p) for image, p in zip(images, positions, strict=True)])
        tensor = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous().float()
        return record | {"image": tensor / 127.5 - 1}

    def augment(self, image: np.ndarray, position: int) -> np.ndarray:
        """Return an image (H,W,C), mirrored and shifted as a function of (seed, position)."""
        rng = numpy_rng(self.seed, "augment", position)
        if self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        if self.crop:
            top, left = rng.integers(0, 2 * self.crop + 1, 2)
            height, width = image.shape[:2]
            padded = np.pad(image, ((self.crop, self.crop), (self.crop, self.crop), (0, 0)))
            image = padded[top : top + height, left : left + width]
        return image


class LatentSet(ImageSet):
    """Batches with stored latents: "latent_mean" and "latent_std" (N,C,h,w) in place of "image", and "text" (states).

    For an image that `ImageSet` would mirror, these are the latents of the mirrored image. With stored outputs of the
    teacher, a batch has one of them per sample, see StoredOutputs; which one is a function of (seed, position).

    Args:
        source: the stored latents.
        seed: see ImageSet.
        flip: see ImageSet.
        labels: see ImageSet.
        outputs: the stored outputs of the teacher; None for batches without them.
    """

    def __init__(
        self,
        source: StoredSplit,
        seed: int = 0,
        flip: bool = False,
        labels: np.ndarray | None = None,
        outputs: StoredOutputs | None = None,
    ) -> None:
        super().__init__(source, seed, flip, labels=labels)
        self.outputs = outputs

    def record(self, positions: list[int], indices: np.ndarray) -> dict[str, Any]:
        source: Any = self.source
        flipped = np.array([self.flip and numpy_rng(self.seed, "augment", p).random() < 0.5 for p in positions])
        record = source.take(indices, flipped)
        if self.outputs is None:
            return record
        return record | self.outputs.take(indices, self.outputs.draws.choose(self.seed, positions, len(self), flipped))


class DrawSet(LatentSet):
    """Batches of what a teacher is given: position p is draw `p // len(source)` of sample `p % len(source)`.

    They are those of LatentSet with "draw_seed" (N,), which have no output of a teacher yet.
    """

    def __init__(self, source: StoredSplit, draws: Draws, labels: np.ndarray | None = None) -> None:
        super().__init__(source, labels=labels)
        self.draws = draws

    def record(self, positions: list[int], indices: np.ndarray) -> dict[str, Any]:
        source: Any = self.source
        numbers = np.array(positions) // len(source)
        record = source.take(indices, numbers >= self.draws.per_picture)
        return record | {"draw_seed": self.draws.seeds(indices, numbers)}
