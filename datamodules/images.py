"""Images for calibration, training and evaluation, in an order that is a function of (seed, position)."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from datamodules.bad_samples import LEAST, Skipped, take_usable, usable
from datamodules.folders import Folder
from datamodules.latents import StoredSplit, check_augmentation, read_manifest
from datamodules.seeding import derive, numpy_rng, torch_rng
from datamodules.sources import Record, Source


class ImageSet(Dataset):
    """Batches of a source as {"image": float (N,C,H,W) in [-1,1], "label": (N,), "index": (N,)}, and what else it has.

    A position `p` is sample `p % len(source)` of pass `p // len(source)`, so that an augmentation can depend on the
    pass without any state. A sample that cannot be used is replaced by another, as a function of (seed, position): then
    "index" has that other one's, and "skipped" a list of messages, one for each that was replaced.
    """

    def __init__(self, source: Source, seed: int = 0, flip: bool = False, crop: int = 0) -> None:
        self.source, self.seed, self.flip, self.crop = source, seed, flip, crop

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        indices = np.asarray(positions) % len(self.source)
        record = self.record(positions, indices)
        # From these a VAE's posterior is drawn: a function of (seed, epoch, sample), whatever the batch or rank.
        seeds = [derive(self.seed, "posterior", position) for position in positions]
        rest = {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in record.items()}
        return {"index": torch.from_numpy(indices), "posterior": torch.tensor(seeds), **rest}

    def record(self, positions: list[int], indices: np.ndarray) -> dict[str, Any]:
        """What the source has of some samples, their images augmented."""
        record, used, skipped = take_usable(self.source, indices, positions, self.seed)
        images = record.pop("image")
        if self.flip or self.crop:
            images = np.stack([self.augment(image, p) for image, p in zip(images, positions, strict=True)])
        tensor = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous().float()
        return record | {"image": tensor / 127.5 - 1, "index": used} | ({"skipped": skipped} if skipped else {})

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


class Stream(Sampler[int]):
    """Endless positions, shuffled anew in every pass, one rank's share of them."""

    def __init__(self, length: int, seed: int, rank: int, world: int) -> None:
        self.length, self.seed, self.rank, self.world = length, seed, rank, world

    def __iter__(self) -> Iterator[int]:
        epoch = 0
        while True:
            order = torch.randperm(self.length, generator=torch_rng(self.seed, "order", epoch))
            start = (self.rank - epoch * self.length) % self.world  # positions go round the ranks, over passes too
            yield from (epoch * self.length + order[start :: self.world]).tolist()
            epoch += 1


class Images(pl.LightningDataModule):
    """Images for every stage: a `train` source and a `holdout` source that training never sees.

    `batch_size` is the global one, over all ranks. The sources are made when they are first needed. `statistics` names
    files with reference statistics of the training images, by the name of the Frechet distance they are for.
    `mel` turns pictures of sounds back into sound (datamodules/audio.py); null for images. Samples that cannot be used
    are replaced, and counted; TooManyBadSamples is raised where there are more of them than `max_bad_fraction` of what
    was seen (see Skipped). Training counts over all passes and, from a checkpoint on, over resumes; each rank counts
    its own share, and after a resume goes on from what rank 0 had counted. A fixed subset is counted by itself, each
    time it is gone through.
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
        super().__init__()
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction={max_bad_fraction} is out of range; choose 0 to 1")
        self.mel = mel
        self.max_bad_fraction = max_bad_fraction
        self.skipped = Skipped("data.train", max_bad_fraction)
        self.make = {"train": train, "holdout": holdout}
        self.batch_size, self.seed, self.flip, self.crop, self.num_workers = batch_size, seed, flip, crop, num_workers
        self.statistics = dict(statistics or {})
        self.taken: dict[str, Skipped] = {}
        self.latents: Path | None = None
        self.manifest: dict[str, Any] | None = None
        self.sources: dict[str, Source] = {}

    def source(self, split: str) -> Source:
        if split not in self.sources:
            source = self.make[split]()
            if len(source) == 0:
                raise ValueError(
                    f"data.{split} is empty; there may be too few samples for what is held out (data.holdout_images): "
                    f"{self.make[split]}"
                )
            self.sources[split] = source
        return self.sources[split]

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
            return ImageSet(self.source(split), seed, flip, crop)
        return LatentSet(StoredSplit(self.latents, split, self.manifest), seed, flip)

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

    def counted(self, split: str, samples: int) -> Skipped:
        """A count of its own, for so many samples."""
        return Skipped(f"data.{split}", self.max_bad_fraction, max(samples, LEAST))

    # Called by Lightning around training

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.skipped.add(batch)
        return batch

    def teardown(self, stage: str) -> None:
        self.skipped.report()

    def state_dict(self) -> dict[str, Any]:
        return self.skipped.state_dict() | {"samples": len(self.dataset("train"))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        found = len(self.dataset("train"))
        if state_dict["samples"] != found:
            raise ValueError(
                f"the run that is to be resumed had {state_dict['samples']} training samples, now data.train has "
                f"{found}: the order would be another. Restore the data, or begin anew with force=true"
            )
        self.skipped.load_state_dict(state_dict)

    # Batches

    def train_dataloader(self) -> StatefulDataLoader:
        dataset = self.dataset("train", self.seed, self.flip, self.crop)
        if len(dataset) < self.batch_size:
            raise ValueError(
                f"data.batch_size={self.batch_size} is more than the {len(dataset)} training samples there are; "
                f"choose data.batch_size of {len(dataset)} or less"
            )
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        if self.batch_size % world:
            raise ValueError(f"data.batch_size={self.batch_size} cannot be shared by {world} ranks; choose a multiple")
        return StatefulDataLoader(
            dataset,
            batch_size=self.batch_size // world,
            sampler=Stream(len(dataset), self.seed, rank, world),
            num_workers=self.num_workers,
            collate_fn=collated,
        )

    def subset(self, split: str, count: int, seed: int, batch_size: int, spread: bool = False) -> DataLoader:
        """`count` fixed samples of a split, drawn without replacement as a function of `seed`, in fixed batches.

        They come in the order of their numbers, or `spread`: in a random order, so that the first batches are like
        all (timesteps go with the numbers). Raises ValueError if the split has fewer.
        """
        dataset = self.dataset(split)
        if count > len(dataset):
            raise ValueError(f"{count} samples of data.{split} were asked for; it has {len(dataset)}")
        order = torch.randperm(len(dataset), generator=torch_rng(seed, "subset", split))[:count]
        numbered = Numbered(dataset, order.tolist())
        places = torch.randperm(count, generator=torch_rng(seed, "spread")).tolist() if spread else range(count)
        count_anew = functools.partial(self.counted, split, count)
        return Counting(numbered, count_anew, batch_size=batch_size, collate_fn=collated, sampler=places)


class Counting(DataLoader):
    """Counts replaced samples as its batches come, anew each time it is gone through, and reports them once."""

    def __init__(self, dataset: Dataset, count_anew: Callable[[], Skipped], **options: Any) -> None:
        super().__init__(dataset, **options)
        self.count_anew, self.reported = count_anew, False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skipped = self.count_anew()
        for batch in super().__iter__():
            skipped.add(batch)
            yield batch
        if not self.reported:
            skipped.report()
            self.reported = True


class Numbered(Dataset):
    """Some positions of a set in a given order; each sample also carries its place in that order as "number"."""

    def __init__(self, images: ImageSet, positions: list[int]) -> None:
        self.images, self.positions = images, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitems__(self, numbers: list[int]) -> dict[str, Any]:
        batch = self.images.__getitems__([self.positions[number] for number in numbers])
        return batch | {"number": torch.tensor(numbers), "of": torch.full((len(numbers),), len(self))}


def collated(batch: Any) -> Any:
    """Batches come whole from `__getitems__`."""
    return batch


def folder(
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
