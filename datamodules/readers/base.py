"""Where images come from: each source is a sized collection that gives a batch of uint8 (N,H,W,C) arrays and labels.

A data set is one YAML file that names one of these as `_target_`; see conf/data/ for examples.
"""

import io
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SMALLEST = 4
"""pixels of the shorter edge: a smaller picture is a placeholder, and a BadSample"""


class MissingData(FileNotFoundError):
    """Data or weights that are not on this machine; the message says what to get and how."""


class BadSample(ValueError):
    """One sample that cannot be used; the message names it and says why."""


Record = dict[str, Any]
"""uint8 "image" (N,H,W,C) and int64 "label" (N,), -1 where there is none; where known also "caption" (a list), and
"original_size" (height, width) and "crop" (top, left, in pixels of the resized picture), int64 (N,2)."""


class Source(Protocol):
    @property
    def captions(self) -> Sequence[str] | None:
        """Of all samples, where the source has captions; read when asked for, where they are many."""
        ...

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> Record:
        """Some samples, in this order. Raises BadSample where one of them cannot be used."""
        ...


class ListedSource:
    """What the readers of this project tell of their samples without decoding any: for fingerprints and for the log."""

    class_names: Sequence[str] | None = None
    """the name of each label from 0 on, where classes have names"""
    passed_over: Mapping[str, int] = {}
    """{ending: number of files that were found among the samples and have an ending that is not read}"""

    def name(self, index: int) -> str:
        """Return the name of a sample, as messages have it."""
        raise NotImplementedError

    def raw(self, index: int) -> bytes:
        """Return the content of a sample as it is stored. Raises BadSample where it cannot be read."""
        raise NotImplementedError

    def sizes(self, indices: np.ndarray) -> np.ndarray | None:
        """Return the bytes of `raw` of some samples; None where that is not known before they are read."""
        return None

    def listing(self) -> bytes:
        """Return what is known of all samples without reading them (names, labels, sizes), wherever they lie."""
        return b""


def data_root() -> Path:
    """$SECATEUR_DATA, by default ~/.cache/secateur: where local copies of public data and weights are looked for."""
    return Path(os.environ.get("SECATEUR_DATA", "~/.cache/secateur")).expanduser()


def located(path: str, get: str | None = None) -> Path:
    """A file or folder as given or, where it is relative and not there, below $SECATEUR_DATA.

    Raises MissingData where it is in neither place; `get` says how to get it.
    """
    given = Path(path).expanduser()
    for place in (given, data_root() / given):
        if place.exists():
            return place
    raise MissingData(
        f"{data_root() / given} does not exist: {get or 'put it there'}, or set $SECATEUR_DATA to the folder it is in"
    )


class Lazily(Sequence[str]):
    """A sequence whose items are made when they are asked for."""

    def __init__(self, count: int, item: Callable[[int], str]) -> None:
        self.length, self.item = count, item

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        places = range(self.length)[index]
        return self.item(places) if isinstance(places, int) else [self.item(place) for place in places]


def content_of(cell: Any) -> Path | bytes | None:
    """The encoded picture in a cell of a table: binary, or a struct of "bytes" and "path" as `datasets` writes it."""
    if isinstance(cell, dict):
        return cell.get("bytes") or (Path(cell["path"]) if cell.get("path") else None)
    return cell


def decoded(
    pictures: Iterable[tuple[str, Path | bytes | None]],
    size: int,
    mode: str = "RGB",
    box: Sequence[int] | None = None,
) -> Record:
    """Encoded pictures, each after its name, as "image", "original_size" and "crop": see `square` and Record.

    Only what is inside of `box` (left, top, right, bottom) counts, where it is given. Raises BadSample, with the name,
    for one that cannot be decoded or is too small.
    """
    records = []
    for name, content in pictures:
        try:
            if not content:
                raise BadSample("it has no content")
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as opened:
                records.append(square(plain(opened, mode, box), size))
        except UnidentifiedImageError as error:  # whose message holds an address in memory
            raise BadSample(f"{name} cannot be used: no known format of pictures") from error
        except Exception as error:  # decoders raise almost anything for damaged files
            kind = "" if isinstance(error, BadSample) else f"{type(error).__name__}: "
            raise BadSample(f"{name} cannot be used: {kind}{error}") from error
    return merged(records)


def whole_labels(labels: Any, name: str) -> np.ndarray:
    """Return labels as int64. Raises ValueError, with the name of their array, unless they are whole numbers."""
    array = np.asarray(labels)
    if array.size and array.dtype.kind not in "iub":
        raise ValueError(
            f"{name}: the labels are {array.dtype}, such as {array.flat[0]}; labels are whole numbers from 0 on, and "
            "null where there are none"
        )
    return array.astype(np.int64)


def merged(records: Sequence[Record]) -> Record:
    """Several records as one."""
    found: Record = {}
    for key, value in records[0].items():
        parts = [record[key] for record in records]
        found[key] = np.concatenate(parts) if isinstance(value, np.ndarray) else list(itertools.chain(*parts))
    return found


def plain(image: Image.Image, mode: str, box: Sequence[int] | None = None) -> Image.Image:
    """A picture in `mode` (RGB or L) as it is meant to be seen: upright, in 8 bits, on white where transparent."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise BadSample("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # PIL would clip 16 bits to 8 instead of scaling them
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(mode)
    if box is not None:
        if image.width < box[2] or image.height < box[3]:
            raise BadSample(f"its {image.width}x{image.height} pixels do not hold the box {tuple(box)}")
        image = image.crop((box[0], box[1], box[2], box[3]))
    if min(image.size) < SMALLEST:
        raise BadSample(f"it has {image.width}x{image.height} pixels; the least is {SMALLEST}x{SMALLEST}")
    return image


def square(image: Image.Image, size: int) -> Record:
    """The record of one picture: cropped to a square at its centre, resized with an antialiasing filter."""
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
    """The first of several places that has the data (`_partial_: true` on each); else one error naming them all."""
    tried = []
    for name, make in sources.items():
        try:
            return make()  # type: ignore[operator]
        except MissingData as error:
            tried.append(f"  {name}: {error}")
    raise MissingData("the data are in none of these places:\n" + "\n".join(tried))
