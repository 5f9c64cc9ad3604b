"""Checkpoints that are complete or absent, and the newest one that can be read."""

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch.utils._pytree import tree_leaves

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a write for which there is no room: on the disk, in the user's quota, in a file of the largest size."""


class CorruptCheckpoint(RuntimeError):
    """A run has checkpoints, and none of them can be read."""


class NoRoomForCheckpoint(OSError):
    """The disk has too little room for a checkpoint."""


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place, syncs and renames it, so that it is complete or absent.

    Tensors go straight to that file. Lightning's own atomic save holds the whole checkpoint in memory a second time and
    passes it through the system's temporary folder.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises NoRoomForCheckpoint, naming the path and the bytes needed, where the disk fills; nothing is left."""
        if storage_options is not None:
            raise TypeError("checkpoints are local files, which have no storage_options")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(path)
        try:
            with no_room_named(path, checkpoint), open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(path.parent)


def partial_path(path: Path) -> Path:
    """Return the path of a checkpoint while it is being written."""
    return path.with_name(f".{path.name}.partial")


def remove_partial_checkpoints(folder: Path) -> None:
    """Remove what processes were writing when they were killed."""
    for path in folder.glob("*.partial"):
        path.unlink()


def sync_folder(folder: Path) -> None:
    """Write a folder's names to the disk, so that a renamed file has its new name after a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def no_room_named(path: Path, checkpoint: dict[str, Any]) -> Iterator[None]:
    """Raise NoRoomForCheckpoint in the place of the error of a write that the disk has no room for."""
    try:
        yield
    except Exception as error:
        if not any(getattr(cause, "errno", None) in DISK_IS_FULL for cause in causes(error)):
            raise
        needed, free = checkpoint_bytes(checkpoint), shutil.disk_usage(path.parent).free
        raise NoRoomForCheckpoint(
            f"there is no room for the checkpoint {path}: it needs {needed / 2**20:.1f} MiB, and {free / 2**20:.1f} "
            "MiB are free there. Free some space, or choose another disk with paths.runs=...; the same command goes "
            "on from the checkpoint before"
        ) from error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it came from: torch's writer raises its own behind the system's."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def checkpoint_bytes(checkpoint: dict[str, Any]) -> int:
    """Return the bytes of all tensors of a checkpoint; storage that several of them share counts once."""
    storages = [leaf.untyped_storage() for leaf in tree_leaves(checkpoint) if isinstance(leaf, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def newest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """Return the newest checkpoint that can be read, and its step; None where the folder has no checkpoint.

    One that cannot be read (truncated, empty) is skipped with a warning. Raises CorruptCheckpoint where there are
    checkpoints and none can be read.
    """
    paths = sorted(folder.glob("step=*.ckpt"), reverse=True)
    for path in paths:
        try:
            return path, int(torch.load(path, map_location="cpu", weights_only=True)["global_step"])
        except Exception as error:
            warnings.warn(
                f"checkpoint {path} cannot be read ({type(error).__name__}: {error}); trying the one before",
                stacklevel=2,
            )
    if paths:
        raise CorruptCheckpoint(
            f"none of the checkpoints in {folder} can be read ({', '.join(path.name for path in paths)}); "
            "delete them to start the training again"
        )
    return None
