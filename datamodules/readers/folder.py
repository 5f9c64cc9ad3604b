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

from datamodules.readers.base import BadSample, Lazily, ListedSource, MissingData, Record, decoded, located
from datamodules.seeding import numpy_rng

LISTED_ENDINGS = 5
"""endings that are not read, in a message"""
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class Packed(Sequence[bytes]):
    """Many small pieces in two arrays: a few bytes each, not an object, and nothing is copied where workers fork."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        content, ends = bytearray(), array("q", [0])
        for piece in pieces:
            content += piece
            ends.append(len(content))
        self.content, self.ends = bytes(content), np.array(ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        place = range(len(self))[operator.index(index)]
        return self.content[self.ends[place] : self.ends[place + 1]]


class Folder(ListedSource):
    """Every picture below a folder, decoded when asked for, centre-cropped and resized to `size`.

    They are shuffled once, as a function of their number alone, so that [start, stop) holds of every subfolder its
    share. The label is the place of a picture's own folder among all such folders, in alphabetical order, or among the
    folders in `classes`. `captions` is `txt` (a file of the same name beside each picture) or the name of a .jsonl or
    .csv file in the folder, in which `file_column` is the path of a picture and `caption_column` its caption. Only what
    is inside of `box` (left, top, right, bottom, in pixels) counts, where it is given. A relative `path` is looked up
    in $SECATEUR_DATA, too.

    Raises MissingData, with what `get` says, where the folder or the table is not; ValueError for a column that is not
    there; and, when it is taken, BadSample for a picture without a caption.
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
    ) -> None:
        self.root = located(path, get)
        if not self.root.is_dir():
            raise MissingData(f"{self.root} is not a folder: `path` names the folder that holds the pictures")
        every = list(files_below(self.root))
        names = sorted((name for name in every if is_picture(name)), key=lambda name: name.split("/"))
        wanted = ".txt" if captions == "txt" else PurePath(captions or "").suffix.lower()
        self.passed_over = endings_of(name for name in every if not is_picture(name))
        self.passed_over.pop(wanted, None)
        if not names:
            rest = f"; it has other files: {counted_endings(self.passed_over)}" if self.passed_over else ""
            raise MissingData(f"{self.root} has no pictures ({', '.join(EXTENSIONS)}) in it or in its folders{rest}")
        parents = [name.rpartition("/")[0] for name in names]
        numbers = class_numbers(set(parents), None if classes is None else located(classes, get))
        self.class_names = [name or "(no folder)" for name in sorted(numbers, key=lambda name: numbers[name])]
        order = numpy_rng("folder", len(names)).permutation(len(names))[start:stop]
        self.names = Packed(os.fsencode(names[i]) for i in order)
        self.labels = np.array([numbers[parents[i]] for i in order], np.int64)
        self.size, self.mode, self.box = size, mode, box
        self.table = None if captions in (None, "txt") else self.root / captions
        self.captions: Sequence[str] | None = None
        if captions is not None:
            self.captions = captions_of(self.root, self, captions, file_column, caption_column)

    def __len__(self) -> int:
        return len(self.names)

    def file(self, index: int) -> Path:
        """One of the pictures."""
        return self.root / os.fsdecode(self.names[index])

    def name(self, index: int) -> str:
        return os.fsdecode(self.names[index])

    def raw(self, index: int) -> bytes:
        return read_file(self.file(index))

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        return np.array([size_of(self.file(int(index))) for index in indices], np.int64)

    def listing(self) -> bytes:
        table = b"" if self.table is None else self.table.read_bytes()
        return b"".join((self.names.ends.tobytes(), self.names.content, self.labels.tobytes(), table))

    def take(self, indices: np.ndarray) -> Record:
        files = [self.file(int(index)) for index in indices]
        record = decoded([(str(file), file) for file in files], self.size, self.mode, self.box)
        record["label"] = self.labels[indices]
        return record if self.captions is None else record | {"caption": [self.captions[int(i)] for i in indices]}


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is no data, but something that a program keeps beside them.

    Names that begin with a dot (.ipynb_checkpoints, .DS_Store, ._a.png), and the folder that macOS adds to archives.
    """
    return name.startswith(".") or name == "__MACOSX"


def is_picture(name: str) -> bool:
    """Tell whether a file has the ending of a picture."""
    return name.lower().endswith(EXTENSIONS)


def files_below(root: Path) -> Iterator[str]:
    """Yield the files below a folder, by their paths in it.

    Links to folders are followed, but not to a folder that the link lies in. Hidden files and folders are left out.
    """
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [
            name
            for name in folders
            if not is_hidden(name) and not f"{real}/".startswith(f"{os.path.realpath(os.path.join(folder, name))}/")
        ]
        inside = PurePath(folder).relative_to(root).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        yield from (prefix + name for name in files if not is_hidden(name))


def endings_of(names: Iterable[str]) -> Counter[str]:
    """Return how many of some files have each ending, in lower case, such as ".heic"."""
    return Counter(PurePath(name).suffix.lower() or "no ending" for name in names)


def counted_endings(endings: Mapping[str, int]) -> str:
    """Return the most frequent of some endings with their numbers, as text: ".heic (12), .gif (3)"."""
    return ", ".join(f"{ending} ({count})" for ending, count in Counter(endings).most_common(LISTED_ENDINGS))


def read_file(file: Path) -> bytes:
    """Return the content of a sample's file. Raises BadSample where it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadSample(f"{file} cannot be read: {error.strerror}") from error


def size_of(file: Path) -> int:
    """Return the bytes of a file, 0 where it is not there (a link to nothing)."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def class_numbers(parents: set[str], classes: Path | None) -> dict[str, int]:
    """Return the label of each folder of pictures: its place among `parents`, or among the folders in `classes`.

    Raises ValueError for one that is not among them.
    """
    if classes is None:
        # Pictures beside the folders of classes come last, so that they shift no label.
        names = sorted(parents, key=lambda name: (not name, name.split("/")))
    else:
        names = sorted(entry.name for entry in os.scandir(classes) if entry.is_dir() and not is_hidden(entry.name))
    numbers = {name: place for place, name in enumerate(names)}
    for name in sorted(parents):
        if name not in numbers:
            raise ValueError(
                f"{name or 'the folder itself'} holds pictures, but is not a class: {classes} has "
                f"{len(names)} folders, such as {', '.join(names[:3])}"
            )
    return numbers


def captions_of(root: Path, folder: Folder, captions: str, file_column: str, caption_column: str) -> Sequence[str]:
    """The captions of a folder's pictures, read when asked for; see Folder."""
    if captions == "txt":
        return Lazily(len(folder), TextFiles(folder).read)
    table = root / captions
    kinds = {".jsonl": lines_of_jsonl, ".csv": lines_of_csv}
    if table.suffix not in kinds:
        raise ValueError(f"data.captions={captions!r} is unknown; choose txt, or a .jsonl or .csv file")
    if not table.exists():
        raise MissingData(
            f"data.captions={captions!r}: {table} does not exist; choose txt, or a .jsonl or .csv file in the folder"
        )
    found = Table(folder, table, kinds[table.suffix](table, file_column, caption_column))
    return Lazily(len(folder), found.read)


class TextFiles:
    """Captions in files of the same names as the pictures."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def read(self, index: int) -> str:
        file = self.folder.file(index).with_suffix(".txt")
        try:
            return file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            kind = "there is none" if isinstance(error, FileNotFoundError) else str(error)
            raise BadSample(f"{file}: the caption cannot be read: {kind}") from error


class Table:
    """Captions from a table: of each picture the last one."""

    def __init__(self, folder: Folder, file: Path, lines: Iterable[tuple[str, str | None]]) -> None:
        rows: dict[bytes, int] = {}

        def texts() -> Iterator[bytes]:
            for row, (name, text) in enumerate(line for line in lines if line[1] is not None):
                rows[os.fsencode(os.path.relpath(folder.root / name, folder.root))] = row
                yield str(text).strip().encode("utf-8", "surrogatepass")

        self.folder, self.file, self.texts = folder, file, Packed(texts())
        self.rows = np.array([rows.get(name, -1) for name in folder.names], np.int64)
        if len(self.rows) and (self.rows < 0).all():
            some = ", ".join(map(os.fsdecode, itertools.islice(rows, 3)))
            raise ValueError(
                f"{file} has captions for other pictures than those in {folder.root}: it names {some or 'none'}; "
                f"the folder has {', '.join(map(os.fsdecode, itertools.islice(folder.names, 3)))}"
            )

    def read(self, index: int) -> str:
        if self.rows[index] < 0:
            raise BadSample(f"{self.folder.file(index)} has no caption in {self.file.name}")
        try:
            return self.texts[self.rows[index]].decode()
        except UnicodeDecodeError as error:
            raise BadSample(f"{self.folder.file(index)}: its caption in {self.file.name}: {error}") from error


def lines_of_jsonl(file: Path, file_column: str, caption_column: str) -> Iterator[tuple[str, str | None]]:
    """(picture, caption) of each line. What is not UTF-8 stays in the text as surrogates."""
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield entry_of(file, number, line.rstrip("\n"), file_column, caption_column)


def entry_of(file: Path, number: int, line: str, file_column: str, caption_column: str) -> tuple[str, str | None]:
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict):
            raise TypeError
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}, line {number} is not a line of JSON with named values: {line[:80]}") from error
    for column, kinds in ((file_column, str), (caption_column, str | None)):
        if column not in entry:
            raise ValueError(f"{file}, line {number} has no column {column!r}; it has: {', '.join(entry)}")
        if not isinstance(entry[column], kinds):
            kind = type(entry[column]).__name__
            raise ValueError(f"{file}, line {number}: column {column!r} has a {kind} where a text is needed")
    return entry[file_column], entry[caption_column]


def lines_of_csv(file: Path, file_column: str, caption_column: str) -> Iterator[tuple[str, str | None]]:
    """(picture, caption) of each line below the line of names. What is not UTF-8 stays in the text as surrogates."""
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        rows = csv.DictReader(lines, strict=True)
        names = rows.fieldnames or []
        for column in (file_column, caption_column):
            if column not in names:
                raise ValueError(f"{file} has no column {column!r}; it has: {', '.join(names)}")
        before = rows.line_num
        try:
            for row in rows:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{file}, line {rows.line_num}: its number of values is not {len(names)}, as in the line of "
                        'names; put texts that contain commas between quotes (")'
                    )
                if row[file_column]:
                    yield row[file_column], row[caption_column] or None
                before = rows.line_num
        except csv.Error as error:
            raise ValueError(
                f"{file}, line {before + 1}: the quotes in it, or behind it, do not close as they should ({error})"
            ) from error
