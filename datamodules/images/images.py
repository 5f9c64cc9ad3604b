"""Data sets of images for calibration, training and evaluation."""

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from datamodules.bad_samples import BadSampleCounter, read_or_replace, take_or_replace
from datamodules.base import DataModule, Preview
from datamodules.images.batches import DrawSet, ImageSet, LatentSet
from datamodules.inventory import describe_data, fingerprint_source, list_names, match_labels
from datamodules.latents import StoredSplit, check_augmentation, read_manifest
from datamodules.readers.base import MissingData, Record, Source
from datamodules.readers.folder import Folder
from datamodules.readers.shards import Shards
from datamodules.teacher_outputs import Draws, StoredOutputs

SPLITS = ("train", "holdout")


class Images(DataModule):
    """A data set of images, or of sounds as images of their mel spectrograms.

    Args:
        train: function that makes the source of training samples.
        holdout: function that makes the source of samples that training never sees.
        batch_size: number of images in a training batch, over all ranks.
        seed: seed of the order and the augmentations of training.
        flip: mirror training images at random.
        crop: shift training images at random, by up to so many pixels.
        num_workers: number of processes that read images; 0 reads in the process itself.
        statistics: {name of a Frechet distance: file with its statistics of the training images}.
        mel: turns images of sounds back into sounds (see datamodules/audio/sounds.py); None for images.
        max_bad_fraction: share of the samples seen that may be bad, see DataModule.
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
        self.counters: dict[str, BadSampleCounter] = {}
        """{split: count of the bad samples among those that `take` returned}"""
        self.latents: Path | None = None
        self.outputs: StoredOutputs | None = None
        self.labels: dict[str, np.ndarray | None] = {}
        """{split: the label that takes the place of each label of its source}"""

    # What the data are

    def fingerprint(self) -> str | None:
        """Return a hash of the content of both splits; None where they are not on this machine."""
        try:
            return "-".join(fingerprint_source(self.source(split)) for split in SPLITS)
        except MissingData:
            return None

    def describe(self) -> list[str]:
        try:
            return describe_data(self.source("train"), self.source("holdout"))
        except MissingData:  # stored latents are enough to train on
            return []

    def match_classes(self, names: Mapping[str, int], count: int) -> None:
        """Number the classes as a network does, see `match_labels`.

        Raises ValueError for classes and labels that the network does not have, and where the two splits have different
        classes.
        """
        with contextlib.suppress(MissingData):  # stored latents do not need the images
            classes = {split: getattr(self.source(split), "class_names", None) for split in SPLITS}
            labels = {split: match_labels(split, known, names, count) for split, known in classes.items()}
            for split in SPLITS:
                check_largest_label(split, getattr(self.source(split), "labels", None), count)
            in_order = all(each is None for each in labels.values())
            if in_order and classes["train"] and classes["holdout"] and classes["train"] != classes["holdout"]:
                raise ValueError(
                    f"data.train has the classes {list_names(classes['train'])}, data.holdout "
                    f"{list_names(classes['holdout'])}, so that their labels differ; of folders choose "
                    "data.holdout.classes, the folder whose classes are numbered"
                )
            self.labels = labels

    def sample_shape(self) -> tuple[int, ...]:
        return self.image_shape()

    def image_shape(self) -> tuple[int, int, int]:
        """Return (channels, height, width) of the images."""
        if self.manifest is not None:
            return tuple(self.manifest["image_shape"])
        height, width, channels = self.take("train", np.array([0]))["image"].shape[1:]
        return channels, height, width

    # Samples

    def use_latents(self, folder: str) -> None:
        """Read samples from the latents that `python -m experiments.precompute` made of this data set.

        The images themselves are then only read for reference statistics. Raises MissingData where the folder is not
        finished, and ValueError where it lacks the mirrored images that `flip` needs.
        """
        manifest = read_manifest(folder)
        check_augmentation(manifest, folder, self.flip, self.crop)
        self.latents, self.manifest = Path(folder).expanduser(), manifest

    def with_teacher_outputs(self) -> Self:
        if self.latents is None or self.manifest is None:
            return super().with_teacher_outputs()
        twin = copy.copy(self)
        twin.outputs = StoredOutputs(self.latents, self.manifest)
        return twin

    def dataset(self, split: str, seed: int = 0, flip: bool = False, crop: int = 0) -> ImageSet:
        """Return the samples of a split in batches: stored latents where there are some, else images."""
        labels = self.labels.get(split)
        if self.manifest is None or self.latents is None:
            return ImageSet(self.source(split), seed, flip, crop, labels)
        outputs = self.outputs if split == "train" else None
        return LatentSet(StoredSplit(self.latents, split, self.manifest), seed, flip, labels, outputs)

    def training(self, seed: int) -> ImageSet:
        return self.dataset("train", seed, self.flip, self.crop)

    def enumerate_draws(self, draws: Draws) -> DrawSet:
        """Return every draw of every training sample, for storing the teacher's outputs beside stored latents."""
        assert self.latents is not None and self.manifest is not None
        return DrawSet(StoredSplit(self.latents, "train", self.manifest), draws, self.labels.get("train"))

    def make_previews(self, batch: dict[str, Any]) -> list[Preview]:
        previews = super().make_previews(batch)
        pictures = batch.get("image")  # stored latents have none
        for row, preview in enumerate(previews):
            if pictures is not None:
                values = (pictures[row].permute(1, 2, 0) + 1) * 127.5
                preview.picture = values.round().clamp(0, 255).to(torch.uint8).numpy()
            preview.caption = batch["caption"][row] if "caption" in batch else None
            preview.label = int(batch["label"][row]) if int(batch["label"][row]) >= 0 else None
        return previews

    def take(self, split: str, indices: np.ndarray) -> Record:
        """Return some samples as the source has them: images uint8 (N,H,W,C), bad ones replaced as in `subset`."""
        source = self.source(split)
        record, _, skipped = take_or_replace(source, indices, indices.tolist(), seed=0)
        counter = self.counters.setdefault(split, self.new_counter(split, len(source)))
        counter.add({"index": indices, "skipped": skipped})
        return record

    def captions(self, split: str, count: int) -> list[str] | None:
        """Return the captions of the first `count` samples of a split, of all where it has fewer; None without any.

        Bad ones are replaced as in `subset`.
        """
        texts = self.dataset(split).source.captions
        if texts is None:
            return None
        return [read_or_replace(texts.__getitem__, k, len(texts), 0, k)[0] for k in range(min(count, len(texts)))]


def check_largest_label(split: str, labels: np.ndarray | None, count: int) -> None:
    """Raise ValueError where a label is not below `count`, the number of a network's classes."""
    if labels is not None and len(labels) and labels.max() >= count:
        raise ValueError(
            f"data.{split} has the label {labels.max()}, and the teacher has {count} classes, from 0 on; choose the "
            "data that it was trained on"
        )


def hold_out(source: Callable[..., Source], count: int, **options: Any) -> Images:
    """Return a data set that holds out `count` samples of a source; `options` are arguments of Images.

    `source` makes the source, with arguments `start` and `stop` that select a part of its shuffled samples.
    """
    return Images(
        train=functools.partial(source, start=count), holdout=functools.partial(source, stop=count), **options
    )


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
    fit: str = "crop",
    pixel_range: list[float] | None = None,
) -> Images:
    """Return the data set of one folder of pictures, of which some are held out.

    Args:
        path: the folder.
        size: edge of the images in pixels.
        holdout_images: number of pictures that are held out, drawn from all subfolders alike.
        batch_size: number of images in a training batch, over all ranks.
        mode: RGB, or L for grey.
        seed: see Images, as `flip`, `crop`, `num_workers`, `statistics` and `max_bad_fraction`.
        captions: see Folder, as `file_column`, `caption_column`, `box` and `get`.
        fit: see PictureForm, as `pixel_range`.
    """
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
        fit=fit,
        pixel_range=pixel_range,
    )
    return hold_out(
        source,
        holdout_images,
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
    fit: str = "crop",
    pixel_range: list[float] | None = None,
) -> Images:
    """Return the data set of tar files of pictures, of which some samples are held out.

    Args:
        path: the shards.
        size: edge of the images in pixels.
        holdout_images: number of samples that are held out, drawn from all shards alike.
        batch_size: number of images in a training batch, over all ranks.
        mode: RGB, or L for grey.
        seed: see Images, as `flip`, `crop`, `num_workers`, `statistics` and `max_bad_fraction`.
        images: see Shards, as `path`, `caption` and `max_missing`.
        fit: see PictureForm, as `pixel_range`.
    """
    source = functools.partial(
        Shards,
        path,
        size,
        mode,
        images=images,
        caption=caption,
        max_missing=max_missing,
        fit=fit,
        pixel_range=pixel_range,
    )
    return hold_out(
        source,
        holdout_images,
        batch_size=batch_size,
        seed=seed,
        flip=flip,
        crop=crop,
        num_workers=num_workers,
        statistics=statistics,
        max_bad_fraction=max_bad_fraction,
    )
