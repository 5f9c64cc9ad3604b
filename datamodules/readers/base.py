"""The interface of all readers of samples, and the decoding of pictures.

A source is a sized collection that returns a batch of uint8 (N,H,W,C) images with labels. A data set is one YAML file
that names a source as `_target_`; conf/data/ has examples.
"""

import io
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MIN_EDGE = 4
"""Pixels of the shorter edge. A smaller picture is a placeholder, as web servers send them, and a BadSample."""
MAX_16_BIT = 65535
"""The largest value of a 16-bit picture."""


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

    def name(self, index: int) -> str:
        """Return the name of a sample for messages."""
        raise NotImplementedError

    def raw(self, index: int) -> bytes:
        """Return a sample as it is stored, not decoded. Raises BadSample where it cannot be read."""
        raise NotImplementedError

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


def decode_pictures(
    pictures: Iterable[tuple[str, Path | bytes | None]],
    size: int,
    mode: str = "RGB",
    box: Sequence[int] | None = None,
) -> Record:
    """Decode pictures, crop each to a square at its centre and resize it: "image", "original_size" and "crop".

    Args:
        pictures: (name, content or file) of each picture; the name is for messages.
        size: edge of the returned images in pixels.
        mode: RGB, or L for grey.
        box: (left, top, right, bottom) in pixels, to which each picture is cropped first; None for the whole picture.

    Raises:
        BadSample: a picture cannot be decoded, is smaller than `box`, or has an edge below MIN_EDGE.
    """
    records = []
    for name, content in pictures:
        try:
            if not content:
                raise BadSample("it has no content")
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
                records.append(resize_square(convert_picture(image, mode, box), size))
        except UnidentifiedImageError as error:  # its own message holds an address in memory
            raise BadSample(f"{name} cannot be used: no known format of pictures") from error
        except Exception as error:  # decoders raise almost any type for damaged files
            kind = "" if isinstance(error, BadSample) else f"{type(error).__name__}: "
            raise BadSample(f"{name} cannot be used: {kind}{error}") from error
    return merge_records(records)


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


def convert_picture(image: Image.Image, mode: str, box: Sequence[int] | None = None) -> Image.Image:
    """Return a picture in `mode` (RGB or L), upright as its EXIF says, in 8 bits, on white where it is transparent.

    Raises BadSample for pixels without a known range, and for a picture smaller than `box` or MIN_EDGE.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise BadSample("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # PIL would clip 16 bits to 8 instead of scaling them
        values = np.asarray(image).clip(0, MAX_16_BIT) / (MAX_16_BIT / 255)
        image = Image.fromarray(values.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(mode)
    if box is not None:
        if image.width < box[2] or image.height < box[3]:
            raise BadSample(f"its {image.width}x{image.height} pixels do not hold the box {tuple(box)}")
        image = image.crop((box[0], box[1], box[2], box[3]))
    if min(image.size) < MIN_EDGE:
        raise BadSample(f"it has {image.width}x{image.height} pixels; the least is {MIN_EDGE}x{MIN_EDGE}")
    return image


def resize_square(image: Image.Image, size: int) -> Record:
    """Return the record of one picture, cropped to a square at its centre and resized with Lanczos' filter."""
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    pixels = np.asarray(image)
    if image.size != (size, size):
        box = (left, top, left + edge, top + edge)
        pixels = np.asarray(image.crop(box).resize((size, size), Image.Resampling.LANCZOS))
    return {
        "image": pixels.reshape(1, size, size, -1),
        "original_size": np.array([(image.height, image.width)], np.int64),
        "crop": np.array([(top * size // edge, left * size // edge)], np.int64),
    }


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
