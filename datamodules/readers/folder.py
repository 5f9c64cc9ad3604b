"""Folders of pictures, with their captions in text files beside them or in one table."""

import csv
import itertools
import json
import operator
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from datamodules.readers.base import BadSample, LazyTexts, ListedSource, MissingData, Record, located
from datamodules.readers.pictures import PictureForm
from datamodules.seeding import numpy_rng

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Endings of pictures, in lower case."""
LISTED_ENDINGS = 5
"""Endings that a message lists."""


class PackedBytes(Sequence[bytes]):
    """Many short pieces of bytes in two arrays.

    A piece costs a few bytes of memory where an object would cost fifty, and forked workers share it without a copy.
    """

    def __init__(self, pieces: Iterable[bytes]) -> None:
        content, ends = bytearray(), array("q", [0])
        for piece in pieces:
            content += piece
            ends.append(len(content))
        self.content, self.ends = bytes(content), np.array(ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        number = range(len(self))[operator.index(index)]
        return self.content[self.ends[number] : self.ends[number + 1]]


class Folder(ListedSource):
    """Every picture in a folder and its subfolders, decoded when it is taken.

    Pictures are made squares of one size, see PictureForm. They are shuffled once, as a function of their number
    alone, so that [start, stop) has its share of every subfolder. The class of a picture is its own folder; labels
    number the classes in alphabetical order.

    Args:
        path: the folder; a relative one is looked up in $SECATEUR_DATA, too.
        size: edge of the images in pixels.
        mode: RGB, or L for grey.
        start: number of the first picture that is used, in the shuffled order.
        stop: number after the last picture that is used; None for all.
        captions: `txt` for a text file of the same name beside each picture, or the name of a .jsonl or .csv file in
            the folder; None for no captions.
        file_column: column of the table with the path of a picture, relative to the folder.
        caption_column: column of the table with its caption.
        box: (left, top, right, bottom) in pixels, to which each picture is cropped first.
        classes: folder whose subfolders are the classes to number, instead of those that hold pictures here.
        get: how to get the data, for the message where they are missing.
        fit: see PictureForm, as `pixel_range`.

    Raises:
        MissingData: the folder or the table does not exist, or the folder has no pictures.
        ValueError: the table has no such column, or is of other pictures; or a folder is not in `classes`.
        BadSample: (from `take`) a picture cannot be used or has no caption.
    """

    def __init__(
        self,
        path: str,
        size: int,
        mode: str = "RGB",
        start: int = 0,
        stop: int | None = None,
        captions: str | None = None,
        file_column: str = "file_name",
        caption_column: str = "text",
        box: list[int] | None = None,
        classes: str | None = None,
        get: str | None = None,
        fit: str = "crop",
        pixel_range: list[float] | None = None,
    ) -> None:
        self.form = PictureForm(size, mode, fit, pixel_range, box)
        self.root = located(path, get)
        if not self.root.is_dir():
            raise MissingData(f"{self.root} is not a folder: `path` names the folder that holds the pictures")
        files = list(files_below(self.root))
        names = sorted((name for name in files if is_picture(name)), key=lambda name: name.split("/"))
        texts = ".txt" if captions == "txt" else PurePath(captions or "").suffix.lower() or None
        others = (name for name in files if not is_picture(name) and PurePath(name).suffix.lower() != texts)
        self.passed_over, self.dangling_links = sort_others(self.root, others)
        if not names:
            raise MissingData(describe_no_samples(self, self.root, "pictures", EXTENSIONS))
        parents = [name.rpartition("/")[0] for name in names]
        numbers = number_classes(set(parents), None if classes is None else located(classes, get))
        self.class_names = [name or "(no folder)" for name in sorted(numbers, key=lambda name: numbers[name])]
        order = numpy_rng("folder", len(names)).permutation(len(names))[start:stop]
        self.names = PackedBytes(os.fsencode(names[i]) for i in order)
        self.labels = np.array([numbers[parents[i]] for i in order], np.int64)
        self.table = None if captions in (None, "txt") else self.root / captions
        self.captions: Sequence[str] | None = None
        if captions is not None:
            self.captions = open_captions(self, captions, file_column, caption_column)

    def __len__(self) -> int:
        return len(self.names)

    def file(self, index: int) -> Path:
        """Return the path of a picture."""
        return self.root / os.fsdecode(self.names[index])

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def raw(self, index: int) -> bytes:
        return read_file(self.file(index))

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        return np.array([file_size(self.file(int(index))) for index in indices], np.int64)

    def listing(self) -> bytes:
        table = b"" if self.table is None else self.table.read_bytes()
        return b"".join((self.names.ends.tobytes(), self.names.content, self.labels.tobytes(), table))

    def take(self, indices: np.ndarray) -> Record:
        files = [self.file(int(index)) for index in indices]
        record = self.form.decode([(str(file), file) for file in files])
        record["label"] = self.labels[indices]
        return record if self.captions is None else record | {"caption": [self.captions[int(i)] for i in indices]}


# Files


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is no data, but something that a program keeps beside them.

    These are names that begin with a dot (.ipynb_checkpoints, .DS_Store, ._a.png) and the folder that macOS adds to
    archives.
    """
    return name.startswith(".") or name == "__MACOSX"


def is_picture(name: str) -> bool:
    """Tell whether a file has the ending of a picture."""
    return name.lower().endswith(EXTENSIONS)


def files_below(root: Path) -> Iterator[str]:
    """Yield the path of each file in a folder and its subfolders, relative to the folder.

    Links to folders are followed, unless they lead to a folder that they are in. Hidden files and folders are left out.
    """
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        subfolders[:] = [
            name
            for name in subfolders
            if not is_hidden(name) and not f"{real}/".startswith(f"{os.path.realpath(os.path.join(folder, name))}/")
        ]
        inside = PurePath(folder).relative_to(root).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        yield from (prefix + name for name in files if not is_hidden(name))


def count_endings(names: Iterable[str]) -> Counter[str]:
    """Return how many of some files have each ending, in lower case, such as ".heic"."""
    return Counter(PurePath(name).suffix.lower() or "no ending" for name in names)


def sort_others(root: Path, names: Iterable[str]) -> tuple[Counter[str], list[str]]:
    """Return (the count of each ending, names of links that lead nowhere) of the files in a folder that are no samples.

    A link that leads nowhere counts for no ending.
    """
    others = list(names)
    paths = ((name, os.path.join(root, name)) for name in others)
    dangling = sorted(name for name, path in paths if os.path.islink(path) and not os.path.exists(path))
    return count_endings(others) - count_endings(dangling), dangling


def list_endings(endings: Mapping[str, int]) -> str:
    """Return the most frequent endings with their numbers as text: ".heic (12), .gif (3)"."""
    return ", ".join(f"{ending} ({count})" for ending, count in Counter(endings).most_common(LISTED_ENDINGS))


def describe_others(source: Any) -> str:
    """Return what lies beside the samples of a source and is not read, as text; empty where there is nothing."""
    parts = []
    if endings := getattr(source, "passed_over", None):
        parts.append(f"other files: {list_endings(endings)}")
    if links := getattr(source, "dangling_links", None):
        parts.append(f"links that lead nowhere: {len(links)}, such as {links[0]}")
    return "; ".join(parts)


def describe_no_samples(source: ListedSource, root: Path, kind: str, extensions: Sequence[str]) -> str:
    """Return the message for a folder without samples of a kind, which lists what it has."""
    others = describe_others(source)
    return f"{root} has no {kind} ({', '.join(extensions)}) in it or in its folders{others and f'; it has {others}'}"


def read_file(file: Path) -> bytes:
    """Return the content of a sample's file. Raises BadSample where it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadSample(f"{file} cannot be read: {error.strerror}") from error


def file_size(file: Path) -> int:
    """Return the size of a file in bytes, 0 where it does not exist (a link that leads nowhere)."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def number_classes(parents: set[str], classes: Path | None) -> dict[str, int]:
    """Return {folder of pictures: its label}: its number in alphabetical order among `parents`.

    Where `classes` is given, the numbers are those of the folders in it, and ValueError is raised for a folder of
    pictures that is not among them.
    """
    if classes is None:
        # Pictures beside the folders of classes come last, so that they shift no label.
        names = sorted(parents, key=lambda name: (not name, name.split("/")))
    else:
        names = sorted(entry.name for entry in os.scandir(classes) if entry.is_dir() and not is_hidden(entry.name))
    numbers = {name: number for number, name in enumerate(names)}
    for name in sorted(parents):
        if name not in numbers:
            raise ValueError(
                f"{name or 'the folder itself'} holds pictures, but is not a class: {classes} has "
                f"{len(names)} folders, such as {', '.join(names[:3])}"
            )
    return numbers


# Captions


def open_captions(folder: Folder, captions: str, file_column: str, caption_column: str) -> Sequence[str]:
    """Return the captions of a folder's pictures, each read when it is asked for; see Folder.

    Args:
        folder: the folder.
        captions: `txt`, or the name of a table in the folder.
        file_column: column of the table with the path of a picture.
        caption_column: column of the table with its caption.

    Raises:
        MissingData: the table does not exist.
        ValueError: `captions` is neither `txt` nor a .jsonl or .csv file, or the table has no such column.
    """
    if captions == "txt":
        return LazyTexts(len(folder), CaptionFiles(folder).read)
    table = folder.root / captions
    readers = {".jsonl": read_jsonl, ".csv": read_csv}
    if table.suffix not in readers:
        raise ValueError(f"data.captions={captions!r} is unknown; choose txt, or a .jsonl or .csv file")
    if not table.exists():
        raise MissingData(
            f"data.captions={captions!r}: {table} does not exist; choose txt, or a .jsonl or .csv file in the folder"
        )
    rows = readers[table.suffix](table, file_column, caption_column)
    return LazyTexts(len(folder), CaptionTable(folder, table, rows).read)


class CaptionFiles:
    """Captions in text files, each with the name of its picture."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def read(self, index: int) -> str:
        """Return the caption of a picture. Raises BadSample where its file is missing or not UTF-8."""
        file = self.folder.file(index).with_suffix(".txt")
        try:
            return file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = "there is none" if isinstance(error, FileNotFoundError) else str(error)
            raise BadSample(f"{file}: the caption cannot be read: {reason}") from error


class CaptionTable:
    """Captions from the rows of a table, (path of a picture, caption or None); the last caption of a picture counts.

    Raises ValueError where no row is about a picture of the folder.
    """

    def __init__(self, folder: Folder, file: Path, rows: Iterable[tuple[str, str | None]]) -> None:
        row_of_picture: dict[bytes, int] = {}

        def encode_texts() -> Iterator[bytes]:
            for number, (name, text) in enumerate(row for row in rows if row[1] is not None):
                row_of_picture[os.fsencode(os.path.relpath(folder.root / name, folder.root))] = number
                yield str(text).strip().encode("utf-8", "surrogatepass")

        self.folder, self.file, self.texts = folder, file, PackedBytes(encode_texts())
        self.rows = np.array([row_of_picture.get(name, -1) for name in folder.names], np.int64)
        if len(self.rows) and (self.rows < 0).all():
            examples = ", ".join(map(os.fsdecode, itertools.islice(row_of_picture, 3)))
            raise ValueError(
                f"{file} has captions for other pictures than those in {folder.root}: it names {examples or 'none'}; "
                f"the folder has {', '.join(map(os.fsdecode, itertools.islice(folder.names, 3)))}"
            )

    def read(self, index: int) -> str:
        """Return the caption of a picture. Raises BadSample where the table has none, or one that is not UTF-8."""
        if self.rows[index] < 0:
            raise BadSample(f"{self.folder.file(index)} has no caption in {self.file.name}")
        try:
            return self.texts[self.rows[index]].decode()
        except UnicodeDecodeError as error:
            raise BadSample(f"{self.folder.file(index)}: its caption in {self.file.name}: {error}") from error


def read_jsonl(file: Path, file_column: str, caption_column: str) -> Iterator[tuple[str, str | None]]:
    """Yield (path of a picture, caption) of each line. What is not UTF-8 stays in the text as surrogates."""
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield parse_json_line(f"{file}, line {number}", line.rstrip("\n"), file_column, caption_column)


def parse_json_line(name: str, line: str, file_column: str, caption_column: str) -> tuple[str, str | None]:
    """Return (path of a picture, caption) of a line. Raises ValueError, with the line's `name`, for a wrong one."""
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict):
            raise TypeError
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} is not a line of JSON with named values: {line[:80]}") from error
    for column, kinds in ((file_column, str), (caption_column, str | None)):
        if column not in entry:
            raise ValueError(f"{name} has no column {column!r}; it has: {', '.join(entry)}")
        if not isinstance(entry[column], kinds):
            kind = type(entry[column]).__name__
            raise ValueError(f"{name}: column {column!r} has a {kind} where a text is needed")
    return entry[file_column], entry[caption_column]


def read_csv(file: Path, file_column: str, caption_column: str) -> Iterator[tuple[str, str | None]]:
    """Yield (path of a picture, caption) of each line after the header. What is not UTF-8 stays as surrogates."""
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        rows = csv.DictReader(lines, strict=True)
        columns = rows.fieldnames or []
        for column in (file_column, caption_column):
            if column not in columns:
                raise ValueError(f"{file} has no column {column!r}; it has: {', '.join(columns)}")
        last_line = rows.line_num
        try:
            for row in rows:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{file}, line {rows.line_num}: its number of values is not {len(columns)}, as in the line of "
                        'names; put texts that contain commas between quotes (")'
                    )
                if row[file_column]:
                    yield row[file_column], row[caption_column] or None
                last_line = rows.line_num
        except csv.Error as error:
            raise ValueError(
                f"{file}, line {last_line + 1}: the quotes in it, or after it, do not close as they should ({error})"
            ) from error
