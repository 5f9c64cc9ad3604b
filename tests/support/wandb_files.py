"""What an offline run of Weights & Biases has recorded."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7
"""Bytes of a block of the log, and of what stands before each piece of a record: checksum, length and kind."""
WHOLE, LAST = 1, 4
"""Kinds of a piece that ends a record."""


class OfflineRun:
    """The records of an offline run, decoded by the message classes of the installed wandb.

    wandb itself has no Python reader of this file any more; the log is that of LevelDB.
    """

    def __init__(self, run: Path) -> None:
        (self.folder,) = (path for path in (run / "wandb").glob("offline-run-*") if path.is_dir())
        (file,) = self.folder.glob("run-*.wandb")
        self.records = list(read_records(file))

    def select(self, kind: str) -> list[Any]:
        """Return the records of a kind, such as history or artifact."""
        return [getattr(record, kind) for record in self.records if record.HasField(kind)]  # type: ignore[arg-type]

    @property
    def start(self) -> Any:
        (start,) = self.select("run")
        return start

    @property
    def config(self) -> dict[str, Any]:
        return {item.key: json.loads(item.value_json) for item in self.start.config.update}

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of the history, {key: value}, without what wandb adds."""
        rows = [{name_of(item): json.loads(item.value_json) for item in part.item} for part in self.select("history")]
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]

    @property
    def history_keys(self) -> set[str]:
        return {key for row in self.history for key in row}

    @property
    def summary(self) -> dict[str, Any]:
        return {name_of(item): json.loads(item.value_json) for part in self.select("summary") for item in part.update}

    @property
    def exit_code(self) -> int:
        (code,) = (record.exit_code for record in self.select("exit"))
        return code


def name_of(item: Any) -> str:
    return ".".join(item.nested_key) or item.key


def read_records(file: Path) -> Iterator[Any]:
    """The records of a log in blocks, each piece of a record with a header."""
    content, place, record = file.read_bytes(), HEADER, b""
    while place + HEADER <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + HEADER])
        record += content[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (WHOLE, LAST):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""
