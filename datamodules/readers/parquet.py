"""Tables of encoded pictures in Parquet files, read by row group."""

import glob
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.readers.base import (
    BadSample,
    LazyTexts,
    ListedSource,
    MissingData,
    Record,
    data_root,
    find_content,
)
from datamodules.readers.hub import check_caption, check_label, stored_bytes
from datamodules.readers.pictures import PictureForm
from datamodules.seeding import numpy_rng


class Parquet(ListedSource):
    """The rows of Parquet files with a column of encoded pictures, decoded when they are taken.

    Memory holds one row group at a time, and a row costs the reading of its group. Files of small row groups (those of
    the Hugging Face hub have 100 rows) are read well in any order; others are better copied into memory-mapped Arrow
    by the HuggingFace source with `path: parquet`. Needs the extra `secateur[hf]`.

    Args:
        path: a file, a folder or a pattern (`/data/train-*.parquet`); a relative one is also looked up in
            $SECATEUR_DATA.
        image: column of pictures, binary or a struct with "bytes".
        size: edge of the images in pixels.
        label: column of labels, whole numbers; None for none.
        caption: column of captions; None for none.
        mode: RGB, or L for grey.
        start: number of the first row that is used, of the rows in a random order that depends on their number alone.
        stop: number after the last row that is used. The used rows stay in the order of the files.
        get: how to get the data, for the message where they are missing.
        fit: see PictureForm, as `pixel_range`.

    Raises:
        MissingData: there are no files.
        ValueError: a file cannot be read, or lacks a column, or has one of the wrong type.
        BadSample: (from `take`) a picture cannot be used, or a label or caption is missing.
    """

    def __init__(
        self,
        path: str,
        image: str,
        size: int,
        label: str | None = None,
        caption: str | None = None,
        mode: str = "RGB",
        start: int = 0,
        stop: int | None = None,
        get: str | None = None,
        fit: str = "crop",
        pixel_range: list[float] | None = None,
    ) -> None:
        self.form = PictureForm(size, mode, fit, pixel_range)
        try:
            from pyarrow import parquet  # noqa: PLC0415  an optional extra
        except ImportError as error:
            raise MissingData(f"{path} needs the reader of Parquet: pip install -e '.[hf]'") from error
        self.files = find_files(path, get)
        self.image, self.label, self.caption = image, label, caption
        self.columns = list(dict.fromkeys(column for column in (image, label, caption) if column is not None))
        groups, counts = [], []
        for number, file in enumerate(self.files):
            try:
                meta = parquet.read_metadata(file)
            except (OSError, ValueError) as error:
                raise ValueError(f"{file} cannot be read as Parquet: {error}") from error
            self.check(file, meta.schema.to_arrow_schema())
            groups += [(number, group) for group in range(meta.num_row_groups)]
            counts += [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        self.groups = np.array(groups, np.int64).reshape(-1, 2)
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        total = int(self.starts[-1])
        self.rows = np.sort(numpy_rng("parquet", total).permutation(total)[start:stop])
        self.captions = None if caption is None else LazyTexts(len(self.rows), self.text)
        self.held: tuple[int, Any] = (-1, None)
        """the row group that was read last: its number and its table"""

    def check(self, file: Path, schema: Any) -> None:
        """Raise ValueError for a column that is not in a file, or of the wrong type."""
        import pyarrow  # noqa: PLC0415

        kinds = pyarrow.types
        wanted = {
            self.caption: ("texts", (kinds.is_string, kinds.is_large_string)),
            self.label: ("whole numbers", (kinds.is_integer,)),
            self.image: ("encoded pictures", (kinds.is_binary, kinds.is_large_binary, kinds.is_struct)),
        }
        for column in self.columns:
            if column not in schema.names:
                raise ValueError(f"{file} has no column {column!r}; it has: {', '.join(schema.names)}")
            kind, (what, tests) = schema.field(column).type, wanted[column]
            if not any(test(kind) for test in tests):
                raise ValueError(f"{file}: column {column!r} has {kind} where {what} are needed")

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"held": (-1, None)}

    def name(self, index: int) -> str:
        file, row = self.locate(index)[:2]
        return f"{file}, row {row}"

    def raw(self, index: int) -> bytes:
        return stored_bytes(self.row(index)[1][self.image])

    def listing(self) -> bytes:
        return self.starts.tobytes() + self.rows.tobytes()

    def locate(self, index: int) -> tuple[Path, int, int, int]:
        """Return of a sample: its file, its row there, its row group, its row in that."""
        row = int(self.rows[index])
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        number = self.groups[group, 0]
        first = int(self.starts[np.searchsorted(self.groups[:, 0], number)])
        return self.files[number], row - first, group, row - int(self.starts[group])

    def row(self, index: int) -> tuple[str, dict[str, Any]]:
        """Return the name of a sample and its cells by column. Raises BadSample where they cannot be read."""
        name, (_, _, group, offset) = self.name(index), self.locate(index)
        try:
            table = self.group(group)
            return name, {column: table[column][offset].as_py() for column in self.columns}
        except (OSError, ValueError) as error:
            raise BadSample(f"{name} cannot be read: {error}") from error

    def group(self, number: int) -> Any:
        """Return a row group as a table, read unless it was the last one that was read."""
        from pyarrow import parquet  # noqa: PLC0415

        if self.held[0] != number:
            file, group = self.groups[number]
            with parquet.ParquetFile(self.files[file]) as reader:
                self.held = (number, reader.read_row_group(int(group), columns=self.columns))
        return self.held[1]

    def text(self, index: int) -> str:
        """Return the caption of a sample. Raises BadSample where it is missing."""
        name, cells = self.row(index)
        return check_caption(cells[self.caption or ""], name)

    def take(self, indices: np.ndarray) -> Record:
        order = np.argsort(self.rows[indices], kind="stable")  # so that each group is read once
        rows: list[Any] = [None] * len(indices)
        for number in order:
            rows[number] = self.row(int(indices[number]))
        record = self.form.decode([(name, find_content(cells[self.image])) for name, cells in rows])
        labels = [check_label(cells[self.label], name) for name, cells in rows] if self.label else -1
        record["label"] = np.full(len(rows), labels, np.int64)
        return (
            record
            if self.caption is None
            else record | {"caption": [check_caption(c[self.caption], n) for n, c in rows]}
        )


def find_files(path: str, get: str | None) -> list[Path]:
    """Return the Parquet files of a file, folder or pattern. Raises MissingData where there are none."""
    given = Path(path).expanduser()
    for candidate in (given, data_root() / given):
        files = (
            sorted(candidate.rglob("*.parquet")) if candidate.is_dir() else sorted(map(Path, glob.glob(str(candidate))))
        )
        if files:
            return files
    raise MissingData(
        f"no Parquet files at {data_root() / given}: {get or 'put them there'}, or set $SECATEUR_DATA to the folder "
        "they are in"
    )
