"""Results that all runs share: computed once, also by processes that ask at the same time, and checked when read."""

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.engine.artefacts import (
    CACHE_SETTING,
    digest,
    find_changed_files,
    hash_files,
    list_partials,
    make_folder,
    remove,
    write_folder,
    write_json,
)
from experiments.engine.locks import hold_lock
from experiments.engine.ranks import ask_rank_zero, is_rank_zero
from lightning_modules.disk import explain_full_disk

log = logging.getLogger(__name__)


@contextlib.contextmanager
def lock_entry(path: Path) -> Iterator[None]:
    """Let one process at a time make what is shared at `path`. The ranks of one job enter together with rank 0."""
    if not is_rank_zero():
        yield
        return
    make_folder(path.parent, CACHE_SETTING)
    with hold_lock(path.with_suffix(".lock"), f"computes the {path.parent.name}"):
        for partial in list_partials(path):  # of a process that was killed, as nobody else writes here now
            remove(partial)
        yield


def cached(folder: Path, key: Any, compute: Callable[[], Any]) -> Any:
    """Return a JSON result that is kept under the hash of `key`, computed where it is not there or damaged."""
    path = folder / f"{digest(key)}.json"
    with lock_entry(path):
        result = read_result(path, key)
        if ask_rank_zero(result is not None):  # another rank may have looked before rank 0 had the lock
            return read_result(path, key) if result is None else result
        result = compute()
        if is_rank_zero():
            write_result(path, key, result)
        return result


def write_result(path: Path, key: Any, result: Any) -> None:
    """Write a result with its key, by which a file can be told from a stranger's, and with its hash."""
    make_folder(path.parent, CACHE_SETTING)
    write_json(path, {"key": key, "sha256": digest(result), "result": result})


def read_result(path: Path, key: Any) -> Any:
    """Return what write_result wrote; None where nothing did, or, with a warning, where the file has changed since.

    Results of earlier versions have no hash and are taken as they are.
    """
    try:
        stored = json.loads(path.read_text())
        if stored["key"] == json.loads(json.dumps(key)) and stored.keys() <= {"key", "sha256", "result"}:
            sha256 = digest(stored["result"])
            if stored.get("sha256", sha256) == sha256:
                return stored["result"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    log.warning("%s is not what was written there: it is made again", path)
    return None


def locate_hashes(path: Path) -> Path:
    """Return the file with the hashes of a shared file or folder, which lies beside it."""
    return path.with_name(f"{path.name}.sha256")


@contextlib.contextmanager
def write_shared_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` at the end of the block; its hashes are kept beside it."""
    with write_folder(path) as partial:
        yield partial
        write_json(locate_hashes(path), hash_files(partial))


def write_shared_file(path: Path, save: Callable[[Path], None]) -> None:
    """Write a file by `save`, complete or absent; its hash is kept beside it. Raises DiskFull."""
    make_folder(path.parent, CACHE_SETTING)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    partial = Path(name)
    os.chmod(partial, 0o644)
    try:
        with explain_full_disk(path):
            save(partial)
            write_json(locate_hashes(path), hash_files(partial))
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def is_intact(path: Path) -> bool:
    """Tell whether a shared file or folder is there and has not changed since; False, with a warning, where it has.

    What an earlier version made has no hashes and is taken as it is.
    """
    if not path.exists():
        return False
    try:
        hashes = json.loads(locate_hashes(path).read_text())
        changed = find_changed_files(path, hashes)
    except FileNotFoundError:
        return True
    except (ValueError, AttributeError):
        changed = [locate_hashes(path).name]
    if changed:
        names = ", ".join(name or path.name for name in changed)
        log.warning("%s is not what was written there (%s): it is made again", path, names)
    return not changed
