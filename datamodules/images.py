"""Images for calibration, training and evaluation, in an order that is a function of (seed, position)."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from datamodules.seeding import numpy_rng, torch_rng
from datamodules.sources import Folder, Source


class ImageSet(Dataset):
    """Batches of a source as {"image": float (N,C,H,W) in [-1,1], "label": (N,), "index": (N,)}, and what else it has.

    A position `p` is sample `p % len(source)` of pass `p // len(source)`, so that an augmentation can depend on the
    pass without any state.
    """

    def __init__(self, source: Source, seed: int = 0, flip: bool = False, crop: int = 0) -> None:
        self.source, self.seed, self.flip, self.crop = source, seed, flip, crop

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        indices = np.asarray(positions) % len(self.source)
        record = self.source.take(indices)
        images = record.pop("image")
        if self.flip or self.crop:
            images = np.stack([self.augment(image, p) for image, p in zip(images, positions, strict=True)])
        tensor = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous().float()
        rest = {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in record.items()}
        return {"image": tensor / 127.5 - 1, "index": torch.from_numpy(indices), **rest}

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
    ) -> None:
        super().__init__()
        self.make = {"train": train, "holdout": holdout}
        self.batch_size, self.seed, self.flip, self.crop, self.num_workers = batch_size, seed, flip, crop, num_workers
        self.statistics = dict(statistics or {})
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

    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the first training image."""
        height, width, channels = self.source("train").take(np.array([0]))["image"].shape[1:]
        return channels, height, width

    def train_dataloader(self) -> StatefulDataLoader:
        source = self.source("train")
        if len(source) < self.batch_size:
            raise ValueError(
                f"data.batch_size={self.batch_size} is more than the {len(source)} training samples there are; "
                f"choose data.batch_size of {len(source)} or less"
            )
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        if self.batch_size % world:
            raise ValueError(f"data.batch_size={self.batch_size} cannot be shared by {world} ranks; choose a multiple")
        return StatefulDataLoader(
            ImageSet(source, self.seed, self.flip, self.crop),
            batch_size=self.batch_size // world,
            sampler=Stream(len(source), self.seed, rank, world),
            num_workers=self.num_workers,
            collate_fn=collated,
        )

    def subset(self, split: str, count: int, seed: int, batch_size: int, spread: bool = False) -> DataLoader:
        """`count` fixed samples of a split, drawn without replacement as a function of `seed`, in fixed batches.

        They come in the order of their numbers, or `spread`: in a random order, so that the first batches are like
        all (timesteps go with the numbers). Raises ValueError if the split has fewer.
        """
        source = self.source(split)
        if count > len(source):
            raise ValueError(f"{count} samples of data.{split} were asked for; it has {len(source)}")
        order = torch.randperm(len(source), generator=torch_rng(seed, "subset", split))[:count]
        numbered = Numbered(ImageSet(source), order.tolist())
        places = torch.randperm(count, generator=torch_rng(seed, "spread")).tolist() if spread else range(count)
        return DataLoader(numbered, batch_size=batch_size, collate_fn=collated, sampler=places)


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
) -> Images:
    """One folder of pictures, of which `holdout_images`, of every subfolder its share, are held out."""
    return Images(
        train=functools.partial(Folder, path, size, mode, start=holdout_images, captions=captions),
        holdout=functools.partial(Folder, path, size, mode, stop=holdout_images, captions=captions),
        batch_size=batch_size,
        seed=seed,
        flip=flip,
        crop=crop,
        num_workers=num_workers,
    )
