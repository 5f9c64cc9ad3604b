"""Pictures in data sets of the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.readers.base import (
    BadSample,
    LazyTexts,
    ListedSource,
    MissingData,
    Record,
    find_content,
)
from datamodules.readers.folder import read_file
from datamodules.readers.pictures import PictureForm
from datamodules.seeding import numpy_rng


def hub_table(
    path: str,
    split: str,
    columns: Sequence[str],
    subset: str | None = None,
    data_files: str | list[str] | None = None,
    revision: str | None = None,
) -> Any:
    """Load some columns of a split of a data set on the Hugging Face hub, as a table of the library `datasets`.

    Needs the extra `secateur[hf]`.

    Args:
        path: id of a data set, the folder of a local copy, or a builder such as `parquet` with `data_files`.
        split: name of the split, or part of one (`train[:100]`).
        columns: names of the columns.
        subset: configuration of a data set that has several.
        data_files: files that a builder reads.
        revision: branch or commit of the data set.

    Raises:
        ValueError: there is no such column or split; the message lists those there are.
        MissingData: the data set can neither be downloaded nor read from the cache.
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


class HuggingFace(ListedSource):
    """A split of a data set on the Hugging Face hub, or of a local copy, decoded when it is taken.

    Args:
        path: see hub_table, as `split`, `subset`, `data_files` and `revision`.
        image: column of pictures, as Image or as binary with an encoded picture in each row.
        label: column of labels, whole numbers; None for none.
        size: edge of the images in pixels.
        mode: RGB, or L for grey.
        caption: column of captions; None for none.
        start: number of the first row that is used, of the rows in a random order that depends on their number alone.
        stop: number after the last row that is used. The used rows stay in the order of the table.
        fit: see PictureForm, as `pixel_range`.

    Raises:
        MissingData, ValueError: see hub_table; ValueError also for a column of the wrong type.
        BadSample: (from `take`) a picture cannot be used, or a label or caption is missing.
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
        start: int = 0,
        stop: int | None = None,
        fit: str = "crop",
        pixel_range: list[float] | None = None,
    ) -> None:
        self.form = PictureForm(size or None, mode, fit, pixel_range)
        wanted = [column for column in (image, label, caption) if column is not None]
        table = hub_table(path, split, wanted, subset, data_files, revision)
        if caption is not None and getattr(table.features[caption], "dtype", "") not in ("string", "large_string"):
            raise ValueError(f"{path}: column {caption!r} has {table.features[caption]} where a caption is text")
        if label is not None:
            kind = str(getattr(table.features[label], "dtype", table.features[label]))
            if not kind.startswith(("int", "uint", "bool")):
                raise ValueError(
                    f"{path}: column {label!r} has {kind} where labels are whole numbers; choose another column, or "
                    "null for none"
                )
            self.class_names = getattr(table.features[label], "names", None)
        if start or stop is not None:
            total = len(table)
            table = table.select(np.sort(numpy_rng("hub", total).permutation(total)[start:stop]))
        feature = table.features[image]
        if hasattr(feature, "decode"):  # it is decoded in `take`, where a damaged one can be named
            table = table.cast_column(image, type(feature)(decode=False))
        self.table = table
        self.path, self.split, self.image, self.label, self.caption = path, split, image, label, caption
        self.texts = table.select_columns([caption]) if caption is not None else None
        self.captions = None if caption is None else LazyTexts(len(table), self.text)

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        return f"{self.path} ({self.split}), row {index}"

    def raw(self, index: int) -> bytes:
        return stored_bytes(self.table[index][self.image])

    def text(self, index: int) -> str:
        """Return the caption of a row. Raises BadSample where it is missing."""
        assert self.texts is not None
        return check_caption(self.texts[index][self.caption], self.name(index))

    def encoded(self, rows: dict[str, list[Any]], indices: np.ndarray) -> list[tuple[str, Path | bytes | None]]:
        """Return (name, content or file) of the picture (or sound) of each of some rows."""
        return [(self.name(int(i)), find_content(cell)) for i, cell in zip(indices, rows[self.image], strict=True)]

    def decode(self, encoded: list[tuple[str, Path | bytes | None]]) -> Record:
        return self.form.decode(encoded)

    def take(self, indices: np.ndarray) -> Record:
        rows = self.table[[int(index) for index in indices]]
        record = self.decode(self.encoded(rows, indices))
        names = [self.name(int(index)) for index in indices]
        labels = [check_label(*pair) for pair in zip(rows[self.label], names, strict=True)] if self.label else -1
        record["label"] = np.full(len(indices), labels, np.int64)
        if self.caption is None:
            return record
        return record | {"caption": [check_caption(*pair) for pair in zip(rows[self.caption], names, strict=True)]}


def check_label(label: Any, name: str) -> int:
    """Return the label of a row. Raises BadSample where it has none."""
    if label is None:
        raise BadSample(f"{name}: the label is missing (null)")
    return int(label)


def stored_bytes(cell: Any) -> bytes:
    """Return the encoded content in a cell of a table, empty where it has none; BadSample where its file is not."""
    content = find_content(cell)
    return read_file(content) if isinstance(content, Path) else content or b""


def check_caption(text: Any, name: str) -> str:
    """Return a caption. Raises BadSample where it is no text, such as null."""
    if not isinstance(text, str):
        raise BadSample(f"{name}: the caption is missing")
    return text
