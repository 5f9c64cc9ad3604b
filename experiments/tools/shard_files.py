"""What precomputations share: several processes may fill a folder of shards, and one that was stopped goes on."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from experiments.engine.artefacts import read_json, write_json


def begin(path: Path, description: Mapping[str, Any], names: Mapping[str, str], remedy: str) -> None:
    """Write what shards are made from, before the first of them.

    Raises ValueError, naming the differences, where they were begun from something else.

    Args:
        path: the file that is written.
        description: what shards are made from.
        names: {key of the description: how messages call another value of it}.
        remedy: what messages advise to do.
    """
    if path.exists() and (begun := read_json(path)) != description:
        differences = [
            f"{names.get(key, f'another {key}')} ({key}: {str(begun.get(key))[:16]}, this job's "
            f"{str(description.get(key))[:16]})"
            for key in {**begun, **description}
            if begun.get(key) != description.get(key)
        ]
        raise ValueError(f"{path} was begun with {', '.join(differences)}; {remedy}")
    write_json(path, description)


def write_missing(note: Path, write: Callable[[], None]) -> dict[str, Any] | None:
    """Return a shard's note, a JSON file that stands for a complete shard; None where another process works on it.

    Args:
        note: path of the note.
        write: writes the shard and its note; it is called where there is no note yet.
    """
    if not note.exists():
        try:
            with FileLock(note.with_name(f".{note.stem}.lock"), timeout=0):
                if not note.exists():
                    write()
        except Timeout:
            return None
    content: dict[str, Any] = read_json(note)
    return content
