"""Text corpora as blocks of token ids, for language models."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.sources import HuggingFace, MissingData, located

Tokenizer = Callable[[str], list[int]]


class Text:
    """A text in blocks of `length` tokens, one after the other without overlap; what does not fill a block is left out.

    Raises ValueError where it does not fill one; `name` is what the text is called there.
    """

    captions = None

    def __init__(self, text: str, tokenizer: Tokenizer, length: int, name: str = "text") -> None:
        if length < 1:
            raise ValueError(f"data.length={length} is out of range; choose a whole number of 1 or more")
        tokens = np.asarray(tokenizer(text), np.int64)
        if len(tokens) < length:
            raise ValueError(f"{name} has {len(tokens)} tokens; choose data.length of that or less, not {length}")
        self.blocks = tokens[: len(tokens) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """{"tokens": int64 (N, length)}"""
        return {"tokens": self.blocks[indices]}


class Corpus:
    """A text to train on, and one that training never sees.

    `train` and `holdout` are text files or folders of them, in UTF-8, looked up in $SECATEUR_DATA and its shared/text,
    too; or, with `hub`, two splits of a data set of the Hugging Face hub (or a copy of one), of which `column` is the
    text. Files and rows are joined by an empty line, as is usual for perplexities on WikiText-2. Texts are read when
    they are first needed. Raises ValueError where both are, or share, the same file or split.
    """

    def __init__(
        self,
        train: str,
        holdout: str,
        tokenizer: Tokenizer,
        length: int,
        hub: str | None = None,
        subset: str | None = None,
        column: str = "text",
    ) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.hub, self.subset, self.column = hub, subset, column
        self.parts = {
            name: [part] if hub else files_of(part) for name, part in (("train", train), ("holdout", holdout))
        }
        if shared := set(self.parts["train"]) & set(self.parts["holdout"]):
            raise ValueError(f"data.train={train} and data.holdout={holdout} share {min(shared)}: choose other texts")
        self.sources: dict[str, Text] = {}

    def source(self, split: str) -> Text:
        if split not in self.sources:
            text = "\n\n".join(self.texts(split))
            self.sources[split] = Text(text, self.tokenizer, self.length, f"data.{split}")
        return self.sources[split]

    def texts(self, split: str) -> list[str]:
        """Files, or rows of the hub's split."""
        if self.hub is None:
            return [read(Path(file)) for file in self.parts[split]]
        rows = HuggingFace(
            self.hub, self.parts[split][0], self.column, None, 0, caption=self.column, subset=self.subset
        ).captions
        assert rows is not None
        return list(rows)


def files_of(path: str) -> list[str]:
    """A text file, or all .txt files below a folder in alphabetical order; MissingData where there is none."""
    place = found(path).resolve()
    files = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
    if not files:
        raise MissingData(f"{place} holds no .txt file")
    return [str(file) for file in files]


def found(path: str) -> Path:
    """A file or folder as given, or in $SECATEUR_DATA, or in its shared/text."""
    with contextlib.suppress(MissingData):
        return located(path)
    with contextlib.suppress(MissingData):
        return located(f"shared/text/{path}")
    return located(path)


def read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}") from error


def tokenizer(path: str) -> Tokenizer:
    """Token ids of a text without special tokens: by a SentencePiece .model file, or a tokenizer of transformers.

    A file is looked up as those of Corpus; anything else is a folder, or an id on the Hugging Face hub.
    """
    if path.endswith(".model"):
        from sentencepiece import SentencePieceProcessor  # noqa: PLC0415  not needed for pictures

        return SentencePieceProcessor(model_file=str(found(path))).encode
    from transformers import AutoTokenizer  # noqa: PLC0415  slow to import

    encode: Any = AutoTokenizer.from_pretrained(path).encode
    return functools.partial(encode, add_special_tokens=False)
