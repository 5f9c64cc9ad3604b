"""The processes (ranks) of one job: which of them writes, and how they wait for each other."""

import logging
import os
import time
from pathlib import Path

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import ParallelStrategy
from pytorch_lightning.utilities import rank_zero_only

from conf.environment import RANK_VARIABLES

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""seconds that a rank waits for another one before it says so"""

PARENT_PID = os.getppid()
"""id of the process that has started this one, taken at the start as that process may end meanwhile"""


def is_rank_zero() -> bool:
    """Tell whether this is the process that writes; Lightning reads its rank from torchrun, Slurm or its launcher."""
    return getattr(rank_zero_only, "rank", 0) == 0


LEFTOVERS = (*RANK_VARIABLES, "SLURM_LOCALID", "SLURM_NTASKS")
"""Environment variables from which Lightning takes a process for one of several."""


def ignore_ranks_of_the_shell(processes: int) -> None:
    """Make this process the one that writes where its job has no other, whatever rank the environment gives it.

    Such a rank is left in a shell after a job on several devices, or numbers the tasks of a Slurm job each of which
    runs a job of its own. The variables are removed, so that no library takes them for ranks.
    """
    if processes == 1 and not is_rank_zero():
        names = [name for name in LEFTOVERS if os.environ.pop(name, None) is not None]
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
        log.warning(
            "%s of the environment is ignored, as trainer.devices=1 and trainer.num_nodes=1: this process is the whole "
            "job. For a job on several devices choose trainer=ddp trainer.devices=...",
            ", ".join(names),
        )


def barrier() -> None:
    """Wait for the other ranks, where there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def join_ranks(trainer: Trainer) -> None:
    """Wait until all ranks that torchrun or Slurm has started are here.

    Ranks that Lightning itself starts begin with its first training or test, when the files made before are there; in
    later jobs of a sweep they wait here as well.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ParallelStrategy) and not isinstance(strategy.cluster_environment, LightningEnvironment):
        assert strategy.launcher is not None
        strategy.launcher.launch(strategy.setup_environment)
    barrier()


def wait_for(path: Path) -> None:
    """Wait until rank 0 has written a file or a folder.

    Raises RuntimeError where the process that has started this rank is gone: that is rank 0, where Lightning has
    started the ranks. torchrun and Slurm end the remaining ranks themselves.
    """
    started, announced = time.monotonic(), False
    while not path.exists():
        if os.getppid() != PARENT_PID:
            raise RuntimeError(f"the process that was to write {path} has ended; what it printed says why")
        if not announced and time.monotonic() - started > PATIENCE:
            log.warning("this rank waits for rank 0, which is to write %s", path)
            announced = True
        time.sleep(0.2)


def ask_rank_zero(value: bool) -> bool:
    """Return rank 0's `value` on every rank. A collective: all ranks have to call it."""
    values = [value]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values)
    return values[0]
