"""Checkpoints that are complete or absent, and the newest one that can be read."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO


class CorruptCheckpoint(RuntimeError):
    """A run has checkpoints, and none of them can be read."""


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file of the same folder and renames it, so that it is complete or absent.

    Lightning's own atomic save copies from the system's temporary folder, which is not atomic across file systems.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        partial = Path(path).with_suffix(".partial")
        super().save_checkpoint(checkpoint, partial, storage_options)
        os.replace(partial, path)


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
