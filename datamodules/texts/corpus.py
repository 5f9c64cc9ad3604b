"""Texts as samples of token ids for language models: blocks of a corpus, or windows of random documents."""

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.base import DataModule, Preview, Samples
from datamodules.inventory import fingerprint_rows
from datamodules.readers.base import BadSample, MissingData, Source
from datamodules.readers.hub import HuggingFace
from datamodules.seeding import numpy_rng, torch_rng
from datamodules.texts.tokens import BOS_CHOICES, Tokenizer, find_text, hash_file, read_text


class Text:
    """Blocks of a text of `length` tokens, one after the other without overlap; a shorter last part is left out.

    Args:
        text: the text.
        tokenizer: returns the ids of a text.
        length: tokens per block.
        name: the text's name in messages.
        beginning: ids that are put before each block, and are part of its length.

    Raises ValueError for a text that does not fill a block.
    """

    captions = None

    def __init__(
        self,
        text: str,
        tokenizer: Callable[[str], list[int]],
        length: int,
        name: str = "text",
        beginning: Sequence[int] = (),
    ) -> None:
        tokens, length_of_text = np.asarray(tokenizer(text), np.int64), length - len(beginning)
        count = len(tokens) // length_of_text
        if not count:
            raise ValueError(f"{name} has {len(tokens)} tokens; choose data.length of that or less, not {length}")
        self.blocks = prepend(beginning, tokens[: count * length_of_text].reshape(count, length_of_text))

    def __len__(self) -> int:
        return len(self.blocks)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Return {"tokens": int64 (N,L)}, the blocks with these numbers."""
        return {"tokens": self.blocks[indices]}


class Documents:
    """Randomly chosen texts of at least `length` tokens each, which are the same for every seed of a run.

    Texts are tokenised in a random order until there are enough of them. A row without a text counts as too short.

    Args:
        texts: the texts.
        tokenizer: returns the ids of a text.
        length: the fewest tokens of a document.
        count: number of documents.
        name: the texts' name in messages.

    Raises ValueError where there are fewer documents than `count`.
    """

    captions = None

    def __init__(
        self, texts: Sequence[str], tokenizer: Callable[[str], list[int]], length: int, count: int, name: str
    ) -> None:
        self.documents: list[np.ndarray] = []
        for number in torch.randperm(len(texts), generator=torch_rng("documents")).numpy():
            with contextlib.suppress(BadSample):
                tokens = np.asarray(tokenizer(texts[int(number)]), np.int64)
                if len(tokens) >= length:
                    self.documents.append(tokens)
            if len(self.documents) == count:
                return
        raise ValueError(
            f"data.documents={count}: {name} has {len(self.documents)} documents of {length} tokens or more; choose "
            "data.documents of that or less, or a shorter data.length"
        )

    def __len__(self) -> int:
        return len(self.documents)

    def take(self, indices: np.ndarray) -> dict[str, Any]:
        """Return {"tokens": a list of N whole documents, int64}."""
        return {"tokens": [self.documents[index] for index in indices]}


class Windows(Samples):
    """Batches of windows of documents; where one begins in its document is a function of (seed, position).

    Args:
        source: the documents.
        length: tokens per window.
        seed: seed of the order and the places.
        beginning: ids that are put before each window, and are part of its length.
    """

    def __init__(self, source: Documents, length: int, seed: int = 0, beginning: Sequence[int] = ()) -> None:
        super().__init__(source, seed)
        self.length_of_text, self.beginning = length - len(beginning), beginning

    def record(self, positions: list[int], indices: np.ndarray) -> dict[str, Any]:
        windows = []
        for tokens, position in zip(self.source.take(indices)["tokens"], positions, strict=True):
            start = numpy_rng(self.seed, "window", position).integers(len(tokens) - self.length_of_text + 1)
            windows.append(tokens[start : start + self.length_of_text])
        return {"tokens": prepend(self.beginning, np.stack(windows))}


def prepend(beginning: Sequence[int], samples: np.ndarray) -> np.ndarray:
    """Return samples of token ids, int64 (N,L), with the same ids before each of them."""
    before = np.broadcast_to(np.asarray(beginning, np.int64), (len(samples), len(beginning)))
    return np.concatenate([before, samples], axis=1)


@dataclass(frozen=True)
class Texts:
    """Texts in a fixed order: files in UTF-8, or the rows of a split of the Hugging Face hub.

    Args:
        path: a file, or a folder of .txt files in alphabetical order, which are looked up in $SECATEUR_DATA and in its
            shared/text, too. With `hub` it is a split.
        hub: id of a data set on the hub, or the folder of a copy.
        subset: see hub_table.
        revision: see hub_table.
        column: column of the texts, with `hub`.
        separator: a file is split at it into several texts; None makes one text of each file.
    """

    path: str
    hub: str | None = None
    subset: str | None = None
    revision: str | None = None
    column: str = "text"
    separator: str | None = None

    @functools.cached_property
    def files(self) -> list[Path]:
        """The files, without `hub`. Raises MissingData where there is none."""
        path = find_text(self.path).resolve()
        files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise MissingData(f"{path} holds no .txt file")
        return files

    @functools.cached_property
    def rows(self) -> HuggingFace:
        """The rows of the split, with `hub`."""
        assert self.hub is not None
        return HuggingFace(
            self.hub, self.path, self.column, None, 0, caption=self.column, subset=self.subset, revision=self.revision
        )

    def read(self) -> Sequence[str]:
        """Return the texts; raises ValueError for a file that is not UTF-8.

        Rows of the hub are read when they are indexed, which raises BadSample for one without a text.
        """
        if self.hub is not None:
            assert self.rows.captions is not None
            return self.rows.captions
        texts = [read_text(file) for file in self.files]
        return texts if self.separator is None else [part for text in texts for part in text.split(self.separator)]

    def identities(self) -> dict[str, str]:
        """Return {sha256: name}, by which these texts are compared with others.

        The sha256 is of the content of each file, or of the name of each split: parts of a split, such as train[:1%],
        count as the whole of it.
        """
        if self.hub is not None:
            splits = [part.partition("[")[0] for part in self.path.split("+")]
            names = [f"{self.hub.rstrip('/')}/{self.subset}/{split}" for split in splits]
            return {hashlib.sha256(name.encode()).hexdigest(): self.path for name in names}
        return {hash_file(file): str(file) for file in self.files if file.stat().st_size}


class Tokens(DataModule):
    """Base class of data of token ids; their batches have "tokens", int64 (N, length), and what else the source gives.

    Args:
        make: for each split, a function that makes its source.
        tokenizer: the tokenizer.
        length: tokens per sample; at least two, since the first is not predicted.
        batch_size: see DataModule.
        seed: see DataModule.
        num_workers: see DataModule.
        max_bad_fraction: see DataModule.
        bos: one of BOS_CHOICES.
    """

    def __init__(
        self,
        make: Mapping[str, Callable[[], Source]],
        tokenizer: Tokenizer,
        length: int,
        batch_size: int,
        seed: int,
        num_workers: int,
        max_bad_fraction: float = 0.0,
        bos: bool | str = "auto",
    ) -> None:
        super().__init__(make, batch_size, seed, num_workers, max_bad_fraction)
        if bos not in BOS_CHOICES:
            raise ValueError(f"data.bos={bos!r} is unknown; choose one of: auto, true, false")
        if length < 2:
            raise ValueError(f"data.length={length} is out of range; choose a whole number of 2 or more")
        self.tokenizer, self.length, self.bos = tokenizer, length, bos

    @property
    def vocabulary(self) -> int:
        """Number of different tokens; every id is below it."""
        return self.tokenizer.vocabulary

    def trained_on(self) -> set[str]:
        """Return the identities of the training texts (see Texts), so that a measure can refuse one of them."""
        raise NotImplementedError

    def sample_shape(self) -> tuple[int]:
        """Return (length,), after reading both splits, which raises whatever is wrong with them."""
        for split in self.make:
            self.source(split)
        return (self.length,)

    def captions(self, split: str, count: int) -> None:
        """Return None, since tokens have no captions."""

    def use_latents(self, folder: str) -> None:
        raise ValueError(f"latents={folder!r}: texts have no latents; choose latents=null")

    def dataset(self, split: str, seed: int = 0) -> Samples:
        return Samples(self.source(split), seed)

    def training(self, seed: int) -> Samples:
        return self.dataset("train", seed)

    def make_previews(self, batch: dict[str, Any]) -> list[Preview]:
        previews = super().make_previews(batch)
        for row, preview in enumerate(previews):
            tokens = batch["tokens"][row].tolist()
            if "mask" in batch:  # without the padding, and without a prompt that is no target
                tokens = [token for token, counts in zip(tokens, batch["mask"][row].tolist(), strict=True) if counts]
            decode = self.tokenizer.decode
            preview.text = " ".join(map(str, tokens)) if decode is None else decode(tokens)
        return previews

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"length": self.length}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["length"] != self.length:
            raise ValueError(
                f"the run to be resumed had data.length={state_dict['length']}, now it is {self.length}, which gives "
                "other samples. Restore it, or begin anew with force=true"
            )
        super().load_state_dict(state_dict)


class Corpus(Tokens):
    """Training texts and held-out texts, as blocks of tokens or as windows of random documents.

    Blocks: the texts are joined by an empty line, as is usual for perplexities on WikiText-2, and cut. Windows: with
    `documents`, a sample is a window at a random place of a random document: a row, a file, or a part of one between
    two `separator`. In a fixed subset the place is always the same, in training it is another in each pass. This is the
    calibration of Shortened LLaMA (arXiv 2402.02834).

    Texts are read when they are first needed. Raises ValueError where training and held-out texts share a file, the
    content of one, a split, or rows of one.

    Args:
        train: the training texts, the `path` of Texts.
        holdout: the held-out texts, the `path` of Texts.
        tokenizer: see Tokens.
        length: see Tokens.
        batch_size: see DataModule.
        seed: see DataModule.
        num_workers: see DataModule.
        hub: see Texts.
        subset: see Texts.
        revision: see Texts.
        column: see Texts.
        documents: number of random documents per split; None gives blocks.
        separator: see Texts; only with `documents` and without `hub`.
        bos: whether the token for the beginning of a text is put before every sample; "auto" does so where networks
            with the tokenizer need it.
    """

    def __init__(
        self,
        train: str,
        holdout: str,
        tokenizer: Tokenizer,
        length: int,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        hub: str | None = None,
        subset: str | None = None,
        revision: str | None = None,
        column: str = "text",
        documents: int | None = None,
        separator: str | None = None,
        bos: bool | str = "auto",
    ) -> None:
        make = {split: functools.partial(self.make_source, split) for split in ("train", "holdout")}
        super().__init__(make, tokenizer, length, batch_size, seed, num_workers, bos=bos)
        if documents is not None and documents < 1:
            raise ValueError(f"data.documents={documents} is out of range; choose 1 or more, or null for blocks")
        if separator == "" or (separator is not None and (hub is not None or documents is None)):
            raise ValueError(
                f"data.separator={separator!r} cuts files into documents; choose null with data.hub or without "
                "data.documents"
            )
        self.documents = documents
        self.texts = {
            split: Texts(path, hub, subset, revision, column, separator)
            for split, path in (("train", train), ("holdout", holdout))
        }
        # Two different splits of the hub may be parts of one, whose rows are compared when they are read.
        in_train, in_holdout = ({} if hub and train != holdout else texts.identities() for texts in self.texts.values())
        if shared := in_train.keys() & in_holdout.keys():
            key = min(shared, key=in_train.__getitem__)
            copy = "" if in_holdout[key] == in_train[key] else f" (the same as {in_holdout[key]})"
            raise ValueError(
                f"data.train={train} and data.holdout={holdout} share {in_train[key]}{copy}: choose other texts"
            )

    def make_source(self, split: str) -> Source:
        """Return the blocks or documents of a split."""
        texts, name = self.texts[split], f"data.{split}"
        if texts.hub is not None:
            self.check_rows(texts.rows.table.info.splits)
        beginning = self.get_beginning()
        if self.documents is not None:
            return Documents(texts.read(), self.tokenizer, self.length - len(beginning), self.documents, name)
        return Text("\n\n".join(texts.read()), self.tokenizer, self.length, name, beginning)

    def get_beginning(self) -> list[int]:
        """Return the ids that are put before each sample."""
        return self.tokenizer.get_beginning(self.bos, self.tokenizer.needs_bos)

    def check_rows(self, splits: Mapping[str, Any]) -> None:
        """Raise ValueError where two parts of splits, such as train[:1%] and train[1%:], have rows in common."""
        from datasets import ReadInstruction  # noqa: PLC0415  an optional extra, there as the rows were read with it

        sizes = {name: split.num_examples for name, split in splits.items()}
        train, holdout = (texts.path for texts in self.texts.values())
        parts = [ReadInstruction.from_spec(part).to_absolute(sizes) for part in (train, holdout)]
        for one, other in itertools.product(*parts):
            if one.splitname == other.splitname and max(one.from_, other.from_) < min(one.to, other.to):
                raise ValueError(
                    f"data.train={train} and data.holdout={holdout} share rows of {one.splitname}; choose parts that "
                    "have none in common"
                )

    def trained_on(self) -> set[str]:
        return set(self.texts["train"].identities())

    def fingerprint(self) -> str | None:
        """Return a hash of rows of both splits; None of files, which are a part of a run's id, and of missing rows."""
        try:
            return "-".join(fingerprint_rows(texts.rows.table) for texts in self.texts.values() if texts.hub) or None
        except MissingData:
            return None

    def dataset(self, split: str, seed: int = 0) -> Samples:
        source: Any = self.source(split)
        return (
            Samples(source, seed)
            if self.documents is None
            else Windows(source, self.length, seed, self.get_beginning())
        )
