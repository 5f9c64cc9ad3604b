"""Locks between processes: who holds one, and whether that process is still there."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from experiments.engine.artefacts import read_json, write_json

log = logging.getLogger(__name__)

PATIENCE = 2.0
"""seconds that a process waits for a lock before it says so, and between two looks at the holder"""


def describe_this_process() -> dict[str, Any]:
    """Return the content of a holder file: the process that holds a lock."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "system": identify_system()}


def identify_system() -> str:
    """Return an id of the numbering of processes that this process belongs to: of this start, and of this container.

    Containers may have one host name and number their processes apart. The id is "" where the system has none.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def read_holder(path: Path) -> dict[str, Any]:
    """Return who holds a lock, from its holder file; "?" where that is not written yet."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {"pid": "?", "host": "?"}


def has_ended(holder: dict[str, Any]) -> bool:
    """Tell whether the holder was a process of this system that is gone; False for other machines and containers."""
    if holder["host"] != socket.gethostname() or holder.get("system", identify_system()) != identify_system():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is there, and somebody else's
        return False
    return False


@contextlib.contextmanager
def hold_lock(path: Path, task: str) -> Iterator[None]:
    """Hold the lock file `path` during the block; log for whom this process waits, who has "to `task`".

    A lock whose holder has ended is taken over: its worker processes can outlive it and keep the file locked. The
    holder is looked at twice before, as another process may have taken the lock and not yet written its name.
    """
    holder_file, lock = path.with_suffix(".holder"), FileLock(path)
    announced = suspect = None
    while True:
        try:
            lock.acquire(timeout=PATIENCE)
            break
        except Timeout:
            holder = read_holder(holder_file)
        if has_ended(holder):
            if holder == suspect:
                discard_lock(path, holder_file, holder)
            suspect = holder
        elif holder != announced:
            log.warning("waiting for process %s on %s, which %s (%s)", holder["pid"], holder["host"], task, path)
            announced = holder
    try:
        write_json(holder_file, describe_this_process())
        yield
    finally:
        holder_file.unlink(missing_ok=True)
        lock.release()


def discard_lock(path: Path, holder_file: Path, holder: dict[str, Any]) -> None:
    """Remove the lock file of a process that has ended, unless another process that waits has done so before."""
    with FileLock(path.with_suffix(".takeover")):
        if read_holder(holder_file) == holder:
            log.warning(
                "process %s on %s, which held %s, has ended: its lock is taken over",
                holder["pid"],
                holder["host"],
                path,
            )
            holder_file.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
