"""Samples in an order that is a function of (seed, position): what the data of pictures and of texts share."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from datamodules.bad_samples import LEAST, Skipped, take_usable
from datamodules.readers.base import Source
from datamodules.seeding import torch_rng


class Samples(Dataset):
    """Batches of a source: what it has of some samples, as tensors where it has arrays, and "index" (N,).

    A position `p` is sample `p % len(source)` of pass `p // len(source)`, so that an augmentation can depend on the
    pass without any state. A sample that cannot be used is replaced by another, as a function of (seed, position): then
    "index" has that other one's, and "skipped" a list of messages, one for each that was replaced.
    """

    def __init__(self, source: Source, seed: int = 0) -> None:
        self.source, self.seed = source, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, positions: list[int]) -> dict[str, Any]:
        indices = np.asarray(positions) % len(self.source)
        record = {"index": indices} | self.record(positions, indices)
        return {
            key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in record.items()
        }

    def record(self, positions: list[int], indices: np.ndarray) -> dict[str, Any]:
        """What the source has of some samples."""
        record, used, skipped = take_usable(self.source, indices, positions, self.seed)
        return record | {"index": used} | ({"skipped": skipped} if skipped else {})


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


class DataModule(pl.LightningDataModule):
    """A `train` source and a `holdout` source that training never sees, made when they are first needed.

    `batch_size` is the global one, over all ranks. Samples that cannot be used are replaced, and counted;
    TooManyBadSamples is raised where there are more of them than `max_bad_fraction` of what was seen (see Skipped).
    Training counts over all passes and, from a checkpoint on, over resumes; each rank counts its own share, and after a
    resume goes on from what rank 0 had counted. A fixed subset is counted by itself, each time it is gone through.
    """

    def __init__(
        self,
        make: Mapping[str, Callable[[], Source]],
        batch_size: int,
        seed: int,
        num_workers: int,
        max_bad_fraction: float,
    ) -> None:
        super().__init__()
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction={max_bad_fraction} is out of range; choose 0 to 1")
        self.make, self.max_bad_fraction = make, max_bad_fraction
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers
        self.skipped = Skipped("data.train", max_bad_fraction)
        self.sources: dict[str, Source] = {}

    def source(self, split: str) -> Source:
        if split not in self.sources:
            source = self.make[split]()
            if len(source) == 0:
                raise ValueError(
                    f"data.{split} is empty: {call_of(self.make[split])} has no samples; there may be too few for what "
                    "is held out (data.holdout_images), or none at all"
                )
            self.sources[split] = source
        return self.sources[split]

    def fingerprint(self) -> str | None:
        """Return a hash of the content of all splits, wherever they lie; None where the class has none."""
        return None

    def describe(self) -> list[str]:
        """Return lines for the log: what the data hold that a user may not expect."""
        return []

    def match_classes(self, names: Mapping[str, int], count: int) -> None:
        """Give labels the numbers that they have in a network of `count` classes: see `match_labels`."""

    def dataset(self, split: str) -> Samples:
        """The samples of a split as they are calibrated and evaluated on."""
        raise NotImplementedError

    def training(self, seed: int) -> Samples:
        """The training samples as they are trained on: what is random in that is a function of (seed, position)."""
        raise NotImplementedError

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
        dataset = self.training(self.seed)
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

    def subset(
        self,
        split: str,
        count: int,
        seed: int,
        batch_size: int,
        spread: bool = False,
        augment: bool = False,
        field: str = "count",
    ) -> DataLoader:
        """`count` fixed samples of a split, drawn without replacement as a function of `seed`, in fixed batches.

        They come in the order of their numbers, or `spread`: each batch has numbers from everywhere, so that it is like
        all (timesteps go with the numbers). With `augment` they are training samples as they are trained on
        (mirrored, shifted), as a function of `seed`, too. Raises ValueError if the split has fewer, in terms of the
        `field` that `count` comes from.
        """
        assert not augment or split == "train"
        dataset = self.training(seed) if augment else self.dataset(split)
        if count > len(dataset):
            raise ValueError(f"{field}={count}: data.{split} has {len(dataset)} samples; choose a number up to that")
        order = torch.randperm(len(dataset), generator=torch_rng(seed, "subset", split))[:count]
        numbered = Numbered(dataset, order.tolist())
        batches = -(-count // batch_size) if spread else 1
        starts = torch.randperm(batches, generator=torch_rng(seed, "spread")).tolist()
        places = [place for start in starts for place in range(start, count, batches)]
        count_anew = functools.partial(self.counted, split, count)
        workers = {"num_workers": self.num_workers, "batch_size": batch_size}
        return Counting(numbered, count_anew, collate_fn=collated, sampler=places, **workers)


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

    def __init__(self, samples: Samples, positions: list[int]) -> None:
        self.samples, self.positions = samples, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitems__(self, numbers: list[int]) -> dict[str, Any]:
        batch = self.samples.__getitems__([self.positions[number] for number in numbers])
        return batch | {"number": torch.tensor(numbers), "of": torch.full((len(numbers),), len(self))}


def call_of(make: Callable[[], Source]) -> str:
    """Return how a source is made, as in a configuration: the class and where its data lie."""
    if not isinstance(make, functools.partial):
        return str(getattr(make, "__name__", type(make).__name__))
    path = make.keywords.get("path", make.args[0] if make.args else None)
    return f"{getattr(make.func, '__name__', make.func)}{f' of {path}' if path is not None else ''}"


def collated(batch: Any) -> Any:
    """Batches come whole from `__getitems__`."""
    return batch
