"""What data sets of images and of texts share: samples in an order that is a function of (seed, position)."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from datamodules.bad_samples import MIN_COUNTED, BadSampleCounter, take_or_replace
from datamodules.readers.base import Source
from datamodules.seeding import torch_rng


class Samples(Dataset):
    """Batches of a source: its record of some samples, with tensors in place of arrays, and "index" (N,).

    A position `p` is sample `p % len(source)` of pass `p // len(source)` through the data, so that an augmentation can
    depend on the pass without any state. A bad sample is replaced by another one, a function of (seed, position); then
    "index" has the number of the replacement, and "skipped" is a list with a message for each bad sample.
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
        """Return the source's record of some samples, bad ones replaced; `indices` are the samples at `positions`."""
        record, used, skipped = take_or_replace(self.source, indices, positions, self.seed)
        return record | {"index": used} | ({"skipped": skipped} if skipped else {})


class EndlessShuffle(Sampler[int]):
    """Yields positions without end, shuffled anew in every pass: one rank's share of them."""

    def __init__(self, length: int, seed: int, rank: int, world: int) -> None:
        self.length, self.seed, self.rank, self.world = length, seed, rank, world

    def __iter__(self) -> Iterator[int]:
        epoch = 0
        while True:
            order = torch.randperm(self.length, generator=torch_rng(self.seed, "order", epoch))
            start = (self.rank - epoch * self.length) % self.world  # positions go round the ranks, over passes too
            yield from (epoch * self.length + order[start :: self.world]).tolist()
            epoch += 1


@dataclass
class Preview:
    """One sample as a network gets it, for a person to look at; None for what it does not have.

    Args:
        index: number of the sample in its source.
        picture: uint8 (H,W,C).
        text: what its tokens say.
        caption: its caption.
        label: its class.
    """

    index: int
    picture: np.ndarray | None = None
    text: str | None = None
    caption: str | None = None
    label: int | None = None


class DataModule(pl.LightningDataModule):
    """A data set for every stage of a job: a `train` source, and a `holdout` source that training never sees.

    This class is what stages, networks and measures rely on. Subclasses add what their kind of data has: images their
    shape, texts their tokenizer. Sources are made when they are first needed.

    Bad samples are replaced and counted; TooManyBadSamples is raised where more than `max_bad_fraction` of the samples
    seen are bad (see BadSampleCounter). Training counts over all passes and, through checkpoints, over resumes; each
    rank counts its own share, and after a resume continues from the count of rank 0. A fixed subset is counted by
    itself, each time it is iterated over.

    Args:
        make: for each split, a function that makes its source.
        batch_size: number of samples in a training batch, over all ranks.
        seed: seed of the order and the augmentations of training.
        num_workers: number of processes that read samples; 0 reads in the process itself.
        max_bad_fraction: share of the samples seen that may be bad, from 0 to 1.
    """

    statistics: Mapping[str, str] = {}
    """{name of a Frechet distance: file with its statistics of the training images}."""
    mel: Any = None
    """Turns pictures of sounds back into sounds; None for all other data."""
    manifest: dict[str, Any] | None = None
    """The manifest of the stored latents that samples are read from; None where they are read from the sources."""

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
        self.skipped = BadSampleCounter("data.train", max_bad_fraction)
        self.sources: dict[str, Source] = {}

    # What subclasses define

    def sample_shape(self) -> tuple[int, ...]:
        """Return the shape of one sample, without the batch."""
        raise NotImplementedError

    def dataset(self, split: str) -> Samples:
        """Return the samples of a split, not augmented, as calibration and evaluation see them."""
        raise NotImplementedError

    def training(self, seed: int) -> Samples:
        """Return the training samples as training sees them: augmented, as a function of (seed, position)."""
        raise NotImplementedError

    def captions(self, split: str, count: int) -> list[str] | None:
        """Return the captions of the first `count` samples of a split; None for data without captions."""
        return None

    def use_latents(self, folder: str) -> None:
        """Read samples from stored latents. Raises ValueError for data that have none."""
        raise ValueError(f"latents={folder}: {type(self).__name__} has no latents; choose latents=null")

    def with_teacher_outputs(self) -> Self:
        """Return this data module with stored outputs of the teacher in its training batches, see StoredOutputs.

        Raises ValueError for data that are not read from stored latents, MissingData where no outputs are stored.
        """
        raise ValueError(
            f"distillation.teacher_outputs='stored', but the data ({type(self).__name__}) are not read from stored "
            "latents; choose distillation.teacher_outputs=live, or latents=... for a diffusion model with a VAE"
        )

    def fingerprint(self) -> str | None:
        """Return a hash of the content of all splits, wherever it is stored; None where it cannot be told."""
        return None

    def describe(self) -> list[str]:
        """Return lines for the log about the data, such as their classes."""
        return []

    def match_classes(self, names: Mapping[str, int], count: int) -> None:
        """Number the classes as a network does: `names` are {name: label}, {} where its `count` classes have no names.

        Raises ValueError for classes that the network does not have.
        """

    # For a person

    def preview(self, split: str, count: int) -> list[Preview]:
        """Return `count` samples: of "train" the first of the training, augmented as there; of others the first."""
        is_train = split == "train"
        samples = self.training(self.seed) if is_train else self.dataset(split)
        order: Iterator[int] = iter(EndlessShuffle(len(samples), self.seed, 0, 1)) if is_train else iter(range(count))
        positions = list(itertools.islice(order, min(count, len(samples))))
        return self.make_previews(samples.__getitems__(positions))

    def make_previews(self, batch: dict[str, Any]) -> list[Preview]:
        """Return the samples of a batch for a person to look at; subclasses add what their batches have."""
        return [Preview(int(index)) for index in batch["index"]]

    # Sources

    def source(self, split: str) -> Source:
        """Return the source of a split. Raises ValueError for one without samples, and what its reader raises."""
        if split not in self.sources:
            source = self.make[split]()
            if len(source) == 0:
                raise ValueError(f"data.{split} is empty: {explain_empty(self.make[split])}")
            self.sources[split] = source
        return self.sources[split]

    def new_counter(self, split: str, samples: int) -> BadSampleCounter:
        """Return a counter of bad samples for `samples` samples of a split."""
        return BadSampleCounter(f"data.{split}", self.max_bad_fraction, max(samples, MIN_COUNTED))

    # Called by Lightning around training

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.skipped.add(batch)
        return batch

    def teardown(self, stage: str) -> None:
        self.skipped.report()

    def state_dict(self) -> dict[str, Any]:
        return self.skipped.state_dict() | {"samples": len(self.dataset("train"))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        samples = len(self.dataset("train"))
        if state_dict["samples"] != samples:
            raise ValueError(
                f"the run that is to be resumed had {state_dict['samples']} training samples, now data.train has "
                f"{samples}, so that their order would differ. Restore the data, or begin anew with force=true"
            )
        self.skipped.load_state_dict(state_dict)

    # Batches

    def train_dataloader(self) -> StatefulDataLoader:
        """Return endless training batches, this rank's share of each; its position can be saved and restored."""
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
            sampler=EndlessShuffle(len(dataset), self.seed, rank, world),
            num_workers=self.num_workers,
            collate_fn=return_batch,
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
        """Return a loader of fixed samples of a split, drawn without replacement, in fixed batches.

        Each sample has a number from 0 to `count` - 1, see NumberedSamples.

        Args:
            split: "train" or "holdout".
            count: number of samples.
            seed: seed of the draw, and of augmentations.
            batch_size: number of samples in a batch.
            spread: each batch has numbers from the whole range, so that a part of the batches represents all
                (timesteps of diffusion networks go with the numbers); else samples come in the order of their numbers.
            augment: augment the samples as in training (mirrored, shifted); only for the split "train".
            field: name of the configuration's field that `count` is from, for messages.

        Raises:
            ValueError: the split has fewer samples than `count`.
        """
        assert not augment or split == "train"
        dataset = self.training(seed) if augment else self.dataset(split)
        if count > len(dataset):
            raise ValueError(f"{field}={count}: data.{split} has {len(dataset)} samples; choose a number up to that")
        order = torch.randperm(len(dataset), generator=torch_rng(seed, "subset", split))[:count]
        samples = NumberedSamples(dataset, order.tolist())
        batches = -(-count // batch_size) if spread else 1
        starts = torch.randperm(batches, generator=torch_rng(seed, "spread")).tolist()
        numbers = [number for start in starts for number in range(start, count, batches)]
        make_counter = functools.partial(self.new_counter, split, count)
        options = {"num_workers": self.num_workers, "batch_size": batch_size}
        return CountingLoader(samples, make_counter, collate_fn=return_batch, sampler=numbers, **options)


class CountingLoader(DataLoader):
    """A loader that counts bad samples, anew each time it is iterated over, and reports the first count."""

    def __init__(self, dataset: Dataset, make_counter: Callable[[], BadSampleCounter], **options: Any) -> None:
        super().__init__(dataset, **options)
        self.make_counter, self.reported = make_counter, False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        counter = self.make_counter()
        for batch in super().__iter__():
            counter.add(batch)
            yield batch
        if not self.reported:
            counter.report()
            self.reported = True


class NumberedSamples(Dataset):
    """Samples at some positions of a data set, in a given order.

    A batch also has "number" (N,), the places of its samples in that order, and "of" (N,), the number of all samples.
    """

    def __init__(self, samples: Samples, positions: list[int]) -> None:
        self.samples, self.positions = samples, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitems__(self, numbers: list[int]) -> dict[str, Any]:
        batch = self.samples.__getitems__([self.positions[number] for number in numbers])
        return batch | {"number": torch.tensor(numbers), "of": torch.full((len(numbers),), len(self))}


def describe_maker(make: Callable[[], Source]) -> str:
    """Return how a source is made, for messages: its class and the path of its data."""
    if not isinstance(make, functools.partial):
        return str(getattr(make, "__name__", type(make).__name__))
    path = make.keywords.get("path", make.args[0] if make.args else None)
    return f"{getattr(make.func, '__name__', make.func)}{f' of {path}' if path is not None else ''}"


def explain_empty(make: Callable[[], Source]) -> str:
    """Return why a source has no samples: there are none at all, or all of them are held out."""
    name = describe_maker(make)
    if isinstance(make, functools.partial) and (start := make.keywords.get("start")):
        options = {key: value for key, value in make.keywords.items() if key != "start"}
        if count := len(make.func(*make.args, **options)):
            return f"{name} has {count} samples, and {start} are held out; choose data.holdout_images below {count}"
    return f"{name} has no samples"


def return_batch(batch: Any) -> Any:
    """Return a batch as it is: `__getitems__` gives whole batches, so that nothing is left to collate."""
    return batch
