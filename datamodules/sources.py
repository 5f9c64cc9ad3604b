"""Where images come from: each source is a sized collection that gives a batch of uint8 (N,H,W,C) arrays and labels.

A data set is one YAML file that names one of these as `_target_`; see conf/data/ for examples.
"""

import io
import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence
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


class Arrays:
    """Images held in memory: the common end of every source small enough for it.

    With `names` of the classes each image has the caption that its class makes of `caption`, in which {} stands for
    the name; "a {}" becomes "an {}" before a vowel. Raises ValueError for a label without a name.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        names: list[str] | None = None,
        caption: str = "a photo of a {}",
    ) -> None:
        self.images = images
        self.labels = np.full(len(images), -1, np.int64) if labels is None else labels.astype(np.int64)
        self.captions: Sequence[str] | None = None
        if names is not None:
            for label in np.unique(self.labels):
                if not 0 <= label < len(names):
                    raise ValueError(f"label {label} has no name; data.names has {len(names)}, for labels from 0 on")
            self.phrases = [worded(caption, name) for name in names]
            self.captions = Lazily(len(images), self.phrase)

    def __len__(self) -> int:
        return len(self.images)

    def phrase(self, index: int) -> str:
        return self.phrases[self.labels[index]]

    def take(self, indices: np.ndarray) -> Record:
        record = {"image": self.images[indices], "label": self.labels[indices]}
        return record if self.captions is None else record | {"caption": [self.captions[int(i)] for i in indices]}


def worded(caption: str, name: str) -> str:
    """A caption with a name in it, after the fitting article."""
    if name[:1].lower() in "aeiou":
        caption = re.sub(r"\b([Aa]) \{\}", r"\1n {}", caption)
    return caption.replace("{}", name)


class Npz(Arrays):
    """An .npz file with one uint8 array (N,H,W,C) of images and, optionally, one of labels.

    A relative `path` is looked up in $SECATEUR_DATA, too. `names` and `caption` are those of Arrays. Raises
    MissingData where the file is not, ValueError where a key is not in it.
    """

    def __init__(
        self,
        path: str,
        images: str,
        labels: str | None = None,
        names: list[str] | None = None,
        caption: str = "a photo of a {}",
        get: str | None = None,
    ) -> None:
        file = located(path, get)
        with np.load(file, allow_pickle=False) as archive:
            for key in filter(None, (images, labels)):
                if key not in archive:
                    raise ValueError(f"{file} has no array {key!r}; it has: {', '.join(archive.files)}")
            pixels = archive[images]
            if pixels.dtype != np.uint8 or pixels.ndim != 4:
                raise ValueError(
                    f"{file}: array {images!r} is {pixels.dtype} of shape {pixels.shape}; "
                    "images are uint8 of (N, H, W, C)"
                )
            super().__init__(pixels, archive[labels] if labels else None, names, caption)


class Tiles(Arrays):
    """One lossless picture cut into square tiles, row by row; where there are labels, in a text file of digits beside.

    The embedded sample of CIFAR-10 is kept like this: a few megabytes, and a person can open it. `mode` is RGB or L
    (mel pictures are grey); `names` and `caption` are those of Arrays.
    """

    def __init__(
        self,
        path: str,
        tile: int,
        start: int = 0,
        stop: int | None = None,
        mode: str = "RGB",
        names: list[str] | None = None,
        caption: str = "a photo of a {}",
    ) -> None:
        if not Path(path).exists():
            raise MissingData(f"{path} does not exist; it comes with the repository (assets/)")
        sheet = np.asarray(Image.open(path).convert(mode))
        rows, columns = sheet.shape[0] // tile, sheet.shape[1] // tile
        tiles = sheet.reshape(rows, tile, columns, tile, -1).swapaxes(1, 2).reshape(rows * columns, tile, tile, -1)
        beside, labels = Path(path).with_suffix(".labels.txt"), None
        if beside.exists():
            labels = np.array([int(digit) for digit in beside.read_text().strip()], np.int64)[start:stop]
        super().__init__(tiles[start:stop], labels, names, caption)


def hub_table(
    path: str,
    split: str,
    columns: Sequence[str],
    subset: str | None = None,
    data_files: str | list[str] | None = None,
    revision: str | None = None,
) -> Any:
    """Some columns of a split of a data set on the Hugging Face hub (or of a local copy), as a table of `datasets`.

    `path` is an id, a folder, or a builder such as `parquet` with `data_files`; `subset` is the configuration of a
    data set that has several, `revision` a branch or commit of it. Needs the extra `secateur[hf]`. Raises ValueError
    for an unknown column, listing those there are, and MissingData where neither a network nor a cached copy is there.
    """
    try:
        import datasets  # noqa: PLC0415  an optional extra
    except ImportError as error:
        raise MissingData(f"data set {path!r} needs the Hugging Face reader: pip install -e '.[hf]'") from error
    try:
        table = datasets.load_dataset(path, subset, data_files=data_files, split=split, revision=revision)
    except Exception as error:
        if isinstance(error, ValueError) and "split" in str(error).lower():
            raise
        raise MissingData(
            f"data set {path!r} ({split}) could be read neither from the hub nor from a cache "
            f"({type(error).__name__}: {error}); download it where there is a network, or give a local copy"
        ) from error
    for column in columns:
        if column not in table.column_names:
            raise ValueError(f"{path} has no column {column!r}; it has: {', '.join(table.column_names)}")
    return table.select_columns(list(dict.fromkeys(columns)))


class HuggingFace:
    """A split of a data set on the Hugging Face hub (or of a local copy), decoded when asked for.

    `path`, `subset`, `data_files` and `revision` are those of hub_table. The image column holds images (or encoded ones
    as binary). Raises what hub_table does, and ValueError for a column of the wrong type.
    """

    def __init__(
        self,
        path: str,
        split: str,
        image: str,
        label: str | None,
        size: int,
        mode: str = "RGB",
        caption: str | None = None,
        subset: str | None = None,
        data_files: str | list[str] | None = None,
        revision: str | None = None,
    ) -> None:
        wanted = [column for column in (image, label, caption) if column is not None]
        table = hub_table(path, split, wanted, subset, data_files, revision)
        if caption is not None and getattr(table.features[caption], "dtype", "") not in ("string", "large_string"):
            raise ValueError(f"{path}: column {caption!r} has {table.features[caption]} where a caption is text")
        feature = table.features[image]
        if hasattr(feature, "decode"):  # decoded here, so that a damaged one can be told
            table = table.cast_column(image, type(feature)(decode=False))
        self.table = table
        self.path, self.split, self.image, self.label, self.caption = path, split, image, label, caption
        self.size, self.mode = size, mode
        self.texts = table.select_columns([caption]) if caption is not None else None
        self.captions = None if caption is None else Lazily(len(table), self.text)

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        return f"{self.path} ({self.split}), row {index}"

    def text(self, index: int) -> str:
        assert self.texts is not None
        return said(self.texts[index][self.caption], self.name(index))

    def encoded(self, rows: dict[str, list[Any]], indices: np.ndarray) -> list[tuple[str, Path | bytes | None]]:
        """The encoded pictures (or sounds) of some rows, each with a name to speak of it by."""
        return [(self.name(int(i)), content_of(cell)) for i, cell in zip(indices, rows[self.image], strict=True)]

    def decode(self, encoded: list[tuple[str, Path | bytes | None]]) -> Record:
        return decoded(encoded, self.size, self.mode)

    def take(self, indices: np.ndarray) -> Record:
        rows = self.table[[int(index) for index in indices]]
        record = self.decode(self.encoded(rows, indices))
        record["label"] = np.array(rows[self.label], np.int64) if self.label else np.full(len(indices), -1, np.int64)
        if self.caption is None:
            return record
        names = [self.name(int(index)) for index in indices]
        return record | {"caption": [said(*pair) for pair in zip(rows[self.caption], names, strict=True)]}


def said(text: Any, name: str) -> str:
    """A caption. Raises BadSample where it is none."""
    if not isinstance(text, str):
        raise BadSample(f"{name}: the caption is missing")
    return text


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
