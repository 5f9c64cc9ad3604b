"""Tokenizers as data modules use them, and files of texts."""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

from datamodules.readers.base import MissingData, located

BOS_CHOICES = ("auto", True, False)
"""Values of data.bos: whether the token for the beginning of a text is put before every sample."""


class Tokenizer:
    """Encodes a text as token ids, without special tokens.

    Args:
        encode: returns the ids of a text.
        vocabulary: number of different tokens; every id is below it.
        bos: id of the token for the beginning of a text; None where there is none.
        eos: id of the token for the end of a text; None where there is none.
        adds_bos: the original tokenizer puts `bos` before a text by itself.
        needs_bos: networks with this tokenizer predict badly without `bos` before every sample.
        decode: returns the text of ids; None where they cannot be shown as text.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        vocabulary: int,
        bos: int | None = None,
        eos: int | None = None,
        adds_bos: bool = True,
        needs_bos: bool = False,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.decode = decode
        self.encode, self.vocabulary, self.bos, self.eos = encode, vocabulary, bos, eos
        self.adds_bos, self.needs_bos = adds_bos, needs_bos

    def __call__(self, text: str) -> list[int]:
        return self.encode(text)

    def get_beginning(self, bos: bool | str, automatic: bool) -> list[int]:
        """Return the ids that are put before a sample: the token for the beginning of a text, or none.

        `bos` is one of BOS_CHOICES, and `automatic` is what "auto" stands for. Raises ValueError for true where there
        is no such token.
        """
        if bos is True and self.bos is None:
            raise ValueError("data.bos=true: the tokenizer has no token for a beginning; choose auto or false")
        wanted = automatic if bos == "auto" else bos
        return [self.bos] if wanted and self.bos is not None else []


def find_text(path: str) -> Path:
    """Return a file or folder that lies at `path`, in $SECATEUR_DATA or in its shared/text.

    Raises MissingData where there is none.
    """
    with contextlib.suppress(MissingData):
        return located(path)
    with contextlib.suppress(MissingData):
        return located(f"shared/text/{path}")
    return located(path)


def read_text(file: Path) -> str:
    """Return the content of a file; raises ValueError where it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text in UTF-8: {error}") from error


def hash_file(file: Path) -> str:
    """Return the sha256 of a file's content."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
