"""Pictures of data sets of the Hugging Face hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.readers.base import BadSample, Lazily, ListedSource, MissingData, Record, content_of, decoded
from datamodules.readers.folder import read_file
from datamodules.seeding import numpy_rng


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


class HuggingFace(ListedSource):
    """A split of a data set on the Hugging Face hub (or of a local copy), decoded when asked for.

    `path`, `subset`, `data_files` and `revision` are those of hub_table. The image column holds images (or encoded ones
    as binary), that of labels whole numbers. Of the rows, drawn as a function of their number alone, those of
    [start, stop) are used, in their order; without the two all are. Raises what hub_table does, ValueError for a column
    of the wrong type, and, when it is taken, BadSample for a row without a label or caption.
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
    ) -> None:
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

    def raw(self, index: int) -> bytes:
        return stored_bytes(self.table[index][self.image])

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
        names = [self.name(int(index)) for index in indices]
        labels = [check_label(*pair) for pair in zip(rows[self.label], names, strict=True)] if self.label else -1
        record["label"] = np.full(len(indices), labels, np.int64)
        if self.caption is None:
            return record
        return record | {"caption": [said(*pair) for pair in zip(rows[self.caption], names, strict=True)]}


def check_label(label: Any, name: str) -> int:
    """Return the label of a row. Raises BadSample where it has none."""
    if label is None:
        raise BadSample(f"{name}: the label is missing (null)")
    return int(label)


def stored_bytes(cell: Any) -> bytes:
    """Return the encoded content in a cell of a table, empty where it has none; BadSample where its file is not."""
    content = content_of(cell)
    return read_file(content) if isinstance(content, Path) else content or b""


def said(text: Any, name: str) -> str:
    """A caption. Raises BadSample where it is none."""
    if not isinstance(text, str):
        raise BadSample(f"{name}: the caption is missing")
    return text
