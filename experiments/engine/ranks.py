"""The processes of one job: which one writes, and how they wait for each other."""

import os
import time
from pathlib import Path

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import ParallelStrategy
from pytorch_lightning.utilities import rank_zero_only

PARENT = os.getppid()
"""The process that has started this one, which may be gone by the time that one asks."""


def is_rank_zero() -> bool:
    """Is this the process that writes? Lightning reads the rank from torchrun, Slurm or its own launcher."""
    return getattr(rank_zero_only, "rank", 0) == 0


def barrier() -> None:
    """Wait for the other ranks, where there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def meet(trainer: Trainer) -> None:
    """Wait for the other ranks where torchrun or Slurm has started them, so that all of them agree from here on.

    Those that Lightning itself starts come with its first Trainer, when all that is made before it is there; in later
    jobs of a sweep they meet here, too.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ParallelStrategy) and not isinstance(strategy.cluster_environment, LightningEnvironment):
        assert strategy.launcher is not None
        strategy.launcher.launch(strategy.setup_environment)
    barrier()


def wait_for(path: Path) -> None:
    """Wait until rank 0 has written a file or a folder; raises RuntimeError where what has started this rank is gone.

    That is rank 0 itself, where Lightning has started the ranks; torchrun and Slurm end those that are left.
    """
    while not path.exists():
        if os.getppid() != PARENT:
            raise RuntimeError(f"the process that was to write {path} has ended; what it printed says why")
        time.sleep(0.2)


def agreed(value: bool) -> bool:
    """What rank 0 says, on all ranks."""
    said = [value]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(said)
    return said[0]
