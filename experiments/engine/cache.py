"""Results that all runs share: computed once, also by processes that ask at the same time."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from experiments.engine.artefacts import digest, read_json, write_json
from experiments.engine.ranks import agreed, is_rank_zero


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time makes what is shared at `path`. The ranks of one job enter together with rank 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")) if is_rank_zero() else contextlib.nullcontext():
        yield


def cached(folder: Path, key: Any, compute: Callable[[], Any]) -> Any:
    """A JSON result under the hash of `key`: computed once, also by processes that ask at the same time.

    What is stored carries its key, so that a file can be told from a stranger's.
    """
    path = folder / f"{digest(key)}.json"
    with locked(path):
        if agreed(path.exists()):
            return read_json(path)["result"]
        result = compute()
        if is_rank_zero():
            write_json(path, {"key": key, "result": result})
        return result
