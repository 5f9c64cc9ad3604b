"""Checkpoints that are complete or absent."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO


class CorruptCheckpoint(RuntimeError):
    """No checkpoint of a run that has some can be read."""


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there, so that it is complete or absent after a kill."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        partial = Path(path).with_suffix(".partial")
        super().save_checkpoint(checkpoint, partial, storage_options)
        os.replace(partial, path)


def newest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest checkpoint that can be read, and its step; None where there is none at all.

    One that cannot be read (cut off, empty) is named in a warning and passed over. Raises CorruptCheckpoint when
    there are some and none can be read.
    """
    found = sorted(folder.glob("step=*.ckpt"), reverse=True)
    for path in found:
        try:
            return path, int(torch.load(path, map_location="cpu", weights_only=True)["global_step"])
        except Exception as error:
            warnings.warn(
                f"checkpoint {path} cannot be read ({type(error).__name__}: {error}); trying the one before",
                stacklevel=2,
            )
    if found:
        raise CorruptCheckpoint(
            f"none of the checkpoints in {folder} can be read ({', '.join(path.name for path in found)}); "
            "delete them to start the training again"
        )
    return None
