"""Texts as samples of token ids, for language models: blocks of a corpus, or windows of random documents."""

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

from datamodules.base import DataModule, Samples
from datamodules.readers.base import BadSample, MissingData, Source
from datamodules.readers.hub import HuggingFace
from datamodules.seeding import numpy_rng, torch_rng
from datamodules.texts.tokens import BOS_CHOICES, Tokenizer, file_sha256, found, read


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
        if len(tokens) < length_of_text:
            raise ValueError(f"{name} has {len(tokens)} tokens; choose data.length of that or less, not {length}")
        blocks = tokens[: len(tokens) // length_of_text * length_of_text].reshape(-1, length_of_text)
        self.blocks = prepend(beginning, blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """{"tokens": int64 (N, length)}"""
        return {"tokens": self.blocks[indices]}


class Documents:
    """`count` random ones of some texts that have at least `length` tokens each: the same ones for every seed of a run.

    Texts are tokenised in a random order until there are enough; one that is missing counts as too short. Raises
    ValueError where there are fewer; `name` is what the texts are called there.
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
        """{"tokens": a list of N whole documents, int64}"""
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
    """Texts in their order: files in UTF-8, or the rows of a split of the Hugging Face hub.

    `path` is a file, or a folder of .txt files in alphabetical order, looked up in $SECATEUR_DATA and its shared/text,
    too. With `hub`, a data set's id or a copy of one, it is a split, of which `column` is the text; `subset` and
    `revision` are those of hub_table. With `separator` each file is cut there into several texts.
    """

    path: str
    hub: str | None = None
    subset: str | None = None
    revision: str | None = None
    column: str = "text"
    separator: str | None = None

    @functools.cached_property
    def files(self) -> list[Path]:
        """MissingData where there is none."""
        place = found(self.path).resolve()
        files = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
        if not files:
            raise MissingData(f"{place} holds no .txt file")
        return files

    @functools.cached_property
    def rows(self) -> HuggingFace:
        assert self.hub is not None
        return HuggingFace(
            self.hub, self.path, self.column, None, 0, caption=self.column, subset=self.subset, revision=self.revision
        )

    def read(self) -> Sequence[str]:
        """ValueError for a file that is not UTF-8. Rows are read when asked for; BadSample for one without a text."""
        if self.hub is not None:
            assert self.rows.captions is not None
            return self.rows.captions
        texts = [read(file) for file in self.files]
        return texts if self.separator is None else [part for text in texts for part in text.split(self.separator)]

    def identities(self) -> dict[str, str]:
        """What tells these texts from others, {sha256: name}: of each file's content, or of the names of the splits.

        Parts of a split, such as train[:1%], are not told from the whole of it.
        """
        if self.hub is not None:
            splits = [part.partition("[")[0] for part in self.path.split("+")]
            names = [f"{self.hub.rstrip('/')}/{self.subset}/{split}" for split in splits]
            return {hashlib.sha256(name.encode()).hexdigest(): self.path for name in names}
        return {file_sha256(file): str(file) for file in self.files if file.stat().st_size}


class Tokens(DataModule):
    """What all data of token ids share; batches have "tokens", int64 (N, length), and what else their source has.

    Raises ValueError for a length of less than two tokens, in which there is nothing to predict.
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
        """Kinds of tokens: every id is below."""
        return self.tokenizer.vocabulary

    def trained_on(self) -> set[str]:
        """Identities of the training texts (see Texts), to tell whether another text is one of them."""
        raise NotImplementedError

    def sample_shape(self) -> tuple[int]:
        """(length,), after reading both splits, which raises whatever is wrong with them."""
        for split in self.make:
            self.source(split)
        return (self.length,)

    def captions(self, split: str, count: int) -> None:
        """Tokens have no captions."""

    def use_latents(self, folder: str) -> None:
        raise ValueError(f"latents={folder!r}: texts have no latents; choose latents=null")

    def dataset(self, split: str, seed: int = 0) -> Samples:
        return Samples(self.source(split), seed)

    def training(self, seed: int) -> Samples:
        return self.dataset("train", seed)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"length": self.length}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["length"] != self.length:
            raise ValueError(
                f"the run that is to be resumed had data.length={state_dict['length']}, now it is {self.length}: the "
                "samples would be others. Restore it, or begin anew with force=true"
            )
        super().load_state_dict(state_dict)


class Corpus(Tokens):
    """Texts to train on, and others that training never sees; for the places they are in see Texts.

    They are joined by an empty line, as is usual for perplexities on WikiText-2, and come in blocks. Or, with
    `documents`, a sample is a window of `length` tokens at a random place of one of so many random texts (of each
    split) that are long enough: a row, a file, or a part of one between two `separator`. In a fixed subset it is always
    the same place, in training another in each pass. This is the calibration of Shortened LLaMA (arXiv 2402.02834).

    Texts are read when they are first needed. Raises ValueError where training and held-out texts share a file, the
    content of one, a split or rows of one.
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
        make = {split: functools.partial(self.made, split) for split in ("train", "holdout")}
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
            split: Texts(part, hub, subset, revision, column, separator)
            for split, part in (("train", train), ("holdout", holdout))
        }
        trained, held = ({} if hub and train != holdout else texts.identities() for texts in self.texts.values())
        if shared := trained.keys() & held.keys():
            key = min(shared, key=trained.__getitem__)
            twin = "" if held[key] == trained[key] else f" (the same as {held[key]})"
            raise ValueError(
                f"data.train={train} and data.holdout={holdout} share {trained[key]}{twin}: choose other texts"
            )

    def made(self, split: str) -> Source:
        texts, name = self.texts[split], f"data.{split}"
        if texts.hub is not None:
            self.check_rows(texts.rows.table.info.splits)
        beginning = self.beginning()
        if self.documents is not None:
            return Documents(texts.read(), self.tokenizer, self.length - len(beginning), self.documents, name)
        return Text("\n\n".join(texts.read()), self.tokenizer, self.length, name, beginning)

    def beginning(self) -> list[int]:
        """Return the ids that are put before each sample."""
        return self.tokenizer.beginning(self.bos, self.tokenizer.needs_bos)

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

    def dataset(self, split: str, seed: int = 0) -> Samples:
        source: Any = self.source(split)
        return Samples(source, seed) if self.documents is None else Windows(source, self.length, seed, self.beginning())
