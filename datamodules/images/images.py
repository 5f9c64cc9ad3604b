"""Images for calibration, training and evaluation, in an order that is a function of (seed, position)."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.bad_samples import Skipped, take_usable, usable
from datamodules.base import DataModule, Samples
from datamodules.inventory import describe, fingerprint_source, list_names, match_labels
from datamodules.latents import StoredSplit, check_augmentation, read_manifest
from datamodules.readers.base import MissingData, Record, Source
from datamodules.readers.folder import Folder
from datamodules.readers.shards import Shards
from datamodules.seeding import derive, numpy_rng


class ImageSet(Samples):
    """Batches of a source as {"image": float (N,C,H,W) in [-1,1], "label": (N,), "index": (N,)}, and what else it has.

    Mirroring (`flip`) and shifting (`crop`, in pixels) are functions of (seed, position). Where `labels` is given,
    labels[k] takes the place of the label k.
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
        # From these a VAE's posterior is drawn: a function of (seed, epoch, sample), whatever the batch or rank.
        seeds = [derive(self.seed, "posterior", position) for position in positions]
        batch = super().__getitems__(positions) | {"posterior": torch.tensor(seeds)}
        if self.labels is not None:
            label = batch["label"]
            batch["label"] = torch.where(label < 0, label, torch.from_numpy(self.labels)[label])
        return batch

    def record(self, positions: list[int], indices: np.ndarray) -> dict[str, Any]:
        """What the source has of some samples, their images augmented."""
        record = super().record(positions, indices)
        images = record.pop("image")
        if self.flip or self.crop:
            images = np.stack([self.augment(image, p) for image, p in zip(images, positions, strict=True)])
        tensor = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous().float()
        return record | {"image": tensor / 127.5 - 1}

    def augment(self, image: np.ndarray, position: int) -> np.ndarray:
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
    """Batches with "latent_mean" and "latent_std" (N,C,h,w) in the place of "image"; "text" has stored text states.

    A picture that `ImageSet` would mirror comes as the posterior of the mirrored picture.
    """

    def record(self, positions: list[int], indices: np.ndarray) -> dict[str, Any]:
        source: Any = self.source
        flipped = [self.flip and numpy_rng(self.seed, "augment", p).random() < 0.5 for p in positions]
        return source.take(indices, np.array(flipped))


class Images(DataModule):
    """Images for every stage: a `train` source and a `holdout` source that training never sees (see DataModule).

    `statistics` names files with reference statistics of the training images, by the name of the Frechet distance they
    are for. `mel` turns pictures of sounds back into sound (datamodules/audio/sounds.py); null for images.
    """

    def __init__(
        self,
        train: Callable[[], Source],
        holdout: Callable[[], Source],
        batch_size: int,
        seed: int = 0,
        flip: bool = True,
        crop: int = 0,
        num_workers: int = 0,
        statistics: dict[str, str] | None = None,
        mel: Any = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        super().__init__({"train": train, "holdout": holdout}, batch_size, seed, num_workers, max_bad_fraction)
        self.flip, self.crop, self.mel = flip, crop, mel
        self.statistics = dict(statistics or {})
        self.taken: dict[str, Skipped] = {}
        self.latents: Path | None = None
        self.manifest: dict[str, Any] | None = None
        self.labels: dict[str, np.ndarray | None] = {}
        """{split: what is to take the place of each label}"""

    def fingerprint(self) -> str | None:
        """Return a hash of the content of both splits; None where they are not on this machine."""
        try:
            return "-".join(fingerprint_source(self.source(split)) for split in ("train", "holdout"))
        except MissingData:
            return None

    def describe(self) -> list[str]:
        try:
            return describe(self.source("train"), self.source("holdout"))
        except MissingData:  # stored latents are enough to train on
            return []

    def match_classes(self, names: Mapping[str, int], count: int) -> None:
        with contextlib.suppress(MissingData):  # of stored latents the pictures need not be here
            classes = {split: getattr(self.source(split), "class_names", None) for split in ("train", "holdout")}
            labels = {split: match_labels(split, found, names, count) for split, found in classes.items()}
            for split in classes:
                known = getattr(self.source(split), "labels", np.empty(0))
                if len(known) and known.max() >= count:
                    raise ValueError(
                        f"data.{split} has the label {known.max()}, and the teacher has {count} classes, from 0 on; "
                        "choose the data that it was trained on"
                    )
            by_place = labels["train"] is None and labels["holdout"] is None
            if by_place and classes["train"] and classes["holdout"] and classes["train"] != classes["holdout"]:
                raise ValueError(
                    f"data.train has the classes {list_names(classes['train'])}, data.holdout "
                    f"{list_names(classes['holdout'])}, so that their labels differ; of folders choose "
                    "data.holdout.classes, the folder whose classes are numbered"
                )
            self.labels = labels

    def use_latents(self, folder: str) -> None:
        """Take samples as the posteriors and text states that `python -m experiments.precompute` made of this data set.

        Pictures are then only read for reference statistics. Raises MissingData where the folder is not finished, and
        ValueError where it lacks the mirrored pictures that are wanted.
        """
        manifest = read_manifest(folder)
        check_augmentation(manifest, folder, self.flip, self.crop)
        self.latents, self.manifest = Path(folder).expanduser(), manifest

    def dataset(self, split: str, seed: int = 0, flip: bool = False, crop: int = 0) -> ImageSet:
        """The samples of a split in batches: stored latents where `latents` names some, else pictures."""
        if self.manifest is None or self.latents is None:
            return ImageSet(self.source(split), seed, flip, crop, self.labels.get(split))
        return LatentSet(StoredSplit(self.latents, split, self.manifest), seed, flip, labels=self.labels.get(split))

    def training(self, seed: int) -> ImageSet:
        return self.dataset("train", seed, self.flip, self.crop)

    def sample_shape(self) -> tuple[int, int, int]:
        return self.image_shape()

    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the first training image."""
        if self.manifest is not None:
            return tuple(self.manifest["image_shape"])
        height, width, channels = self.take("train", np.array([0]))["image"].shape[1:]
        return channels, height, width

    def take(self, split: str, indices: np.ndarray) -> Record:
        """Some pictures of a split as the source has them, bad ones replaced as in `subset`."""
        source = self.source(split)
        record, _, skipped = take_usable(source, indices, indices.tolist(), seed=0)
        self.taken.setdefault(split, self.counted(split, len(source))).add({"index": indices, "skipped": skipped})
        return record

    def captions(self, split: str, count: int) -> list[str] | None:
        """The captions of the first `count` samples of a split, or of all where there are fewer; None without any.

        Bad ones are replaced as in `subset`.
        """
        texts = self.dataset(split).source.captions
        if texts is None:
            return None
        return [usable(texts.__getitem__, k, len(texts), 0, k)[0] for k in range(min(count, len(texts)))]


def image_folder(
    path: str,
    size: int,
    holdout_images: int,
    batch_size: int,
    mode: str = "RGB",
    seed: int = 0,
    flip: bool = True,
    crop: int = 0,
    num_workers: int = 0,
    captions: str | None = None,
    file_column: str = "file_name",
    caption_column: str = "text",
    box: list[int] | None = None,
    get: str | None = None,
    statistics: dict[str, str] | None = None,
    max_bad_fraction: float = 0.01,
) -> Images:
    """One folder of pictures (see Folder), of which `holdout_images`, of every subfolder its share, are held out."""
    source = functools.partial(
        Folder,
        path,
        size,
        mode,
        captions=captions,
        file_column=file_column,
        caption_column=caption_column,
        box=box,
        get=get,
    )
    return Images(
        train=functools.partial(source, start=holdout_images),
        holdout=functools.partial(source, stop=holdout_images),
        batch_size=batch_size,
        seed=seed,
        flip=flip,
        crop=crop,
        num_workers=num_workers,
        statistics=statistics,
        max_bad_fraction=max_bad_fraction,
    )


def image_shards(
    path: str | list[str],
    size: int,
    holdout_images: int,
    batch_size: int,
    mode: str = "RGB",
    seed: int = 0,
    flip: bool = False,
    crop: int = 0,
    num_workers: int = 0,
    images: list[str] | None = None,
    caption: str | None = "txt",
    max_missing: float = 0.05,
    statistics: dict[str, str] | None = None,
    max_bad_fraction: float = 0.01,
) -> Images:
    """The shards of one data set, of which `holdout_images` samples, drawn from all shards alike, are held out."""
    source = functools.partial(Shards, path, size, mode, images=images, caption=caption, max_missing=max_missing)
    return Images(
        train=functools.partial(source, start=holdout_images),
        holdout=functools.partial(source, stop=holdout_images),
        batch_size=batch_size,
        seed=seed,
        flip=flip,
        crop=crop,
        num_workers=num_workers,
        statistics=statistics,
        max_bad_fraction=max_bad_fraction,
    )
