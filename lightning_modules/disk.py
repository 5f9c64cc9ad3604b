"""A full disk is reported with the file that has no room and the space that is free."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a write without room for it: the disk is full, the user's quota is, or the file has its largest size."""


class DiskFull(OSError):
    """No space is left for a file; the message names the file and says how much is free."""


@contextlib.contextmanager
def explain_full_disk(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Raise DiskFull in place of an error that says that the disk has no room for `path`.

    The message has the free space and, if it is known, the space that the file needs.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFull) or not is_disk_full(error):
            raise
        existing = next(folder for folder in path.parents if folder.exists())
        free = shutil.disk_usage(existing).free
        needed = "" if needed_bytes is None else f"{needed_bytes:,} bytes are needed, "
        raise DiskFull(
            f"no space is left on the disk for {path} ({needed}{free:,} bytes are free): {error}. Make room, or choose "
            "other folders with paths.runs=... and paths.cache=...; the same command then goes on"
        ) from error


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error, or one that caused it, says that a disk or a quota is full.

    torch's writer raises an error of its own on top of the system's; errors of safetensors have it in their text alone.
    """
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None) in NO_ROOM or f"(os error {errno.ENOSPC})" in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
