"""Tokenizers as data modules see them, and files of texts."""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

from datamodules.readers.base import MissingData, located


class Tokenizer:
    """Token ids of a text, by `encode`, without special tokens.

    `vocabulary` is the number of kinds of tokens: every id is below. `bos` is the token that a text begins with, for
    models that are trained with one, and `eos` the one that it ends with; None where there is none.
    """

    def __init__(
        self, encode: Callable[[str], list[int]], vocabulary: int, bos: int | None = None, eos: int | None = None
    ) -> None:
        self.encode, self.vocabulary, self.bos, self.eos = encode, vocabulary, bos, eos

    def __call__(self, text: str) -> list[int]:
        return self.encode(text)


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


def file_sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
