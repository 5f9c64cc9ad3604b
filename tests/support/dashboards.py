"""What offline runs of Weights & Biases contain."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

SECONDS_TO_FLUSH = 30.0
"""How long the process that writes the file may take for it after `wandb.finish()`."""


class OfflineRun:
    """The records of an offline run, decoded by the message classes of the installed wandb.

    wandb itself has no Python reader of this file any more; the log is that of LevelDB.
    """

    def __init__(self, run: Path, run_id: str = "*") -> None:
        (file,) = run.rglob(f"offline-run-*/run-{run_id}.wandb")
        self.folder = file.parent
        self.records = list(wandb_records(file))
        until = time.monotonic() + SECONDS_TO_FLUSH
        while not self.select("exit") and time.monotonic() < until:
            time.sleep(0.05)
            self.records = list(wandb_records(file))

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


def wandb_records(file: Path) -> Iterator[Any]:
    """Yield the records of an offline run: blocks of 32 KiB, each piece with checksum, length and kind before it."""
    content, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""
