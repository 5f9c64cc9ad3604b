"""Checkpoints that are complete or absent, and the newest one that can be read."""

import contextlib
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch.utils._pytree import tree_leaves

from lightning_modules.disk import explain_full_disk


class CorruptCheckpoint(RuntimeError):
    """A run has checkpoints, and none of them can be read."""


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file in the same folder, syncs and renames it: it is complete or absent.

    Tensors are written directly to that file. Lightning's own atomic save copies the whole checkpoint in memory and
    then to the system's temporary folder.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; raise DiskFull, which names path and size, if the disk fills.

        No temporary file is left then.
        """
        if storage_options is not None:
            raise TypeError("checkpoints are local files, which have no storage_options")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(path)
        try:
            with explain_full_disk(path, checkpoint_bytes(checkpoint)), open(partial, "wb") as file:
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
    """Remove incomplete checkpoints of processes that were killed while they wrote."""
    for path in folder.glob("*.partial"):
        path.unlink()


def sync_folder(folder: Path) -> None:
    """Write a folder's file names to the disk, so that a renamed file keeps its new name after a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)


def checkpoint_bytes(checkpoint: dict[str, Any]) -> int:
    """Return the size in bytes of all tensors of a checkpoint; storage that tensors share counts once."""
    storages = [leaf.untyped_storage() for leaf in tree_leaves(checkpoint) if isinstance(leaf, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def read_step(path: Path) -> int:
    """Return the optimiser step of a checkpoint; raise an error if the file cannot be read or has changed."""
    with zipfile.ZipFile(path) as archive:  # torch writes a checksum of every tensor, and does not compare it
        if (changed := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {changed} does not match")
    return int(torch.load(path, map_location="cpu", weights_only=True)["global_step"])


def find_newest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """Return the path of the newest readable checkpoint and its optimiser step; None if there is no checkpoint.

    Unreadable checkpoints (truncated, empty, with a changed bit) are skipped with a warning. Raises CorruptCheckpoint
    if there are checkpoints and none can be read.
    """
    paths = sorted(folder.glob("step=*.ckpt"), reverse=True)
    for path in paths:
        try:
            return path, read_step(path)
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
