"""The interface of all readers of samples.

A source is a sized collection that returns a batch of uint8 (N,H,W,C) images with labels. A data set is one YAML file
that names a source as `_target_`; conf/data/ has examples.
"""

import io
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image


class MissingData(FileNotFoundError):
    """Data or weights that are not on this machine; the message says what to get and how."""


class BadSample(ValueError):
    """One sample that cannot be used; the message names the sample and the reason."""


Record = dict[str, Any]
"""Samples of a source: uint8 "image" (N,H,W,C) and int64 "label" (N,), -1 for samples without a label.

Where they are known also "caption" (a list of N texts), and int64 (N,2) "original_size" (height, width of the picture
as it was stored) and "crop" (top, left in pixels of the resized picture).
"""


class Source(Protocol):
    """A sized collection of samples that can be read in any order."""

    @property
    def captions(self) -> Sequence[str] | None:
        """The captions of all samples, None for a source without captions. Each may be read only when it is indexed."""
        ...

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> Record:
        """Return some samples, in the order of `indices`. Raises BadSample where one of them cannot be used."""
        ...


class ListedSource:
    """A source that describes its samples without decoding them, for fingerprints and the log: every reader here."""

    class_names: Sequence[str] | None = None
    """The name of each class, in the order of labels from 0; None where classes have no names."""
    passed_over: Mapping[str, int] = {}
    """{file ending: number of files beside the samples that are not read because of their ending}."""
    dangling_links: Sequence[str] = ()
    """Links beside the samples that lead nowhere, such as one to a folder of a class that was moved."""

    def name(self, index: int) -> str:
        """Return the name of a sample for messages."""
        raise NotImplementedError

    def raw(self, index: int) -> bytes:
        """Return a sample as it is stored, not decoded. Raises BadSample where it cannot be read."""
        raise NotImplementedError

    def describe_sample(self, index: int) -> str:
        """Return the form in which a sample is stored, such as "PNG, I;16, 512x384". Raises BadSample."""
        try:
            with Image.open(io.BytesIO(self.raw(index))) as image:
                return f"{image.format}, {image.mode}, {image.width}x{image.height}"
        except (OSError, ValueError, SyntaxError) as error:
            raise BadSample(f"{self.name(index)} cannot be used: no known format of pictures") from error

    def find_stored_range(self, index: int) -> tuple[float, float] | None:
        """Return the lowest and highest stored value of a picture of more than 8 bits; None for all others."""
        try:
            with Image.open(io.BytesIO(self.raw(index))) as image:
                if image.mode != "F" and not image.mode.startswith("I"):
                    return None
                values = np.asarray(image)
                return float(values.min()), float(values.max())
        except (OSError, ValueError, SyntaxError):  # no picture, such as a sound, or a damaged one
            return None

    def sizes(self, indices: np.ndarray) -> np.ndarray | None:
        """Return the size of `raw` of some samples in bytes; None where only reading them would tell."""
        return None

    def listing(self) -> bytes:
        """Return names, labels and sizes of all samples, as far as they are known without reading the samples.

        The result does not depend on where the data are stored.
        """
        return b""


def data_root() -> Path:
    """Return $SECATEUR_DATA, by default ~/.cache/secateur: the folder of local copies of public data and weights."""
    return Path(os.environ.get("SECATEUR_DATA", "~/.cache/secateur")).expanduser()


def located(path: str, get: str | None = None) -> Path:
    """Return a file or folder as given or, where it is relative and does not exist, the one below $SECATEUR_DATA.

    Raises MissingData where it exists in neither place; the message includes `get`, which says how to get it.
    """
    given = Path(path).expanduser()
    for candidate in (given, data_root() / given):
        if candidate.exists():
            return candidate
    raise MissingData(
        f"{data_root() / given} does not exist: {get or 'put it there'}, or set $SECATEUR_DATA to the folder it is in"
    )


class LazyTexts(Sequence[str]):
    """A sequence of `count` texts, each made by `item(index)` when it is asked for."""

    def __init__(self, count: int, item: Callable[[int], str]) -> None:
        self.length, self.item = count, item

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        selected = range(self.length)[index]
        return self.item(selected) if isinstance(selected, int) else [self.item(one) for one in selected]


def find_content(cell: Any) -> Path | bytes | None:
    """Return the encoded content of a table's cell, or the file that has it; None for an empty cell.

    A cell is binary, or a struct of "bytes" and "path" as the library `datasets` writes it.
    """
    if isinstance(cell, dict):
        return cell.get("bytes") or (Path(cell["path"]) if cell.get("path") else None)
    return cell


def name_bad_sample(name: str, error: Exception) -> BadSample:
    """Return the error of a sample that cannot be used, with its name and the reason."""
    kind = "" if isinstance(error, BadSample) else f"{type(error).__name__}: "
    return BadSample(f"{name} cannot be used: {kind}{error}")


def check_whole_labels(labels: Any, name: str) -> np.ndarray:
    """Return labels as int64. Raises ValueError, with the name of their array, unless they are whole numbers."""
    array = np.asarray(labels)
    if array.dtype.kind == "f":
        wrong = array[(array != np.floor(array)) | ~np.isfinite(array)]
    else:
        wrong = array[:0] if array.dtype.kind in "iub" else array
    if wrong.size:
        raise ValueError(
            f"{name}: the labels are {array.dtype}, such as {wrong.flat[0]}; labels are whole numbers from 0 on, and "
            "null where there are none"
        )
    return array.astype(np.int64)


def merge_records(records: Sequence[Record]) -> Record:
    """Return several records as one, in their order."""
    merged: Record = {}
    for key, value in records[0].items():
        parts = [record[key] for record in records]
        merged[key] = np.concatenate(parts) if isinstance(value, np.ndarray) else list(itertools.chain(*parts))
    return merged


def first_available(**sources: object) -> Source:
    """Return the first of several sources whose data are on this machine or can be fetched.

    Each is a function that makes the source (`_partial_: true` in a configuration). Raises MissingData, with the
    message of each, where none has its data.
    """
    messages = []
    for name, make in sources.items():
        try:
            return make()  # type: ignore[operator]
        except MissingData as error:
            messages.append(f"  {name}: {error}")
    raise MissingData("the data are in none of these places:\n" + "\n".join(messages))
