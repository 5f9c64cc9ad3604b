"""The processes of one job: which one writes, and how they wait for each other."""

import logging
import os
import time
from pathlib import Path

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import ParallelStrategy
from pytorch_lightning.utilities import rank_zero_only

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""seconds that a rank waits for another one before it says so"""

PARENT = os.getppid()
"""The process that has started this one, which may be gone by the time that one asks."""


def is_rank_zero() -> bool:
    """Is this the process that writes? Lightning reads the rank from torchrun, Slurm or its own launcher."""
    return getattr(rank_zero_only, "rank", 0) == 0


LEFTOVERS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "JSM_NAMESPACE_RANK")
"""Environment variables from which Lightning takes a process for one of several."""


def ignore_ranks_of_the_shell(processes: int) -> None:
    """Make this process the one that writes where its job has no other, whatever rank the environment gives it.

    Such a rank is left in a shell after a job on several devices, or numbers the tasks of a Slurm job each of which
    runs a job of its own. The variables are removed, so that no library takes them for ranks.
    """
    if processes == 1 and not is_rank_zero():
        names = [name for name in LEFTOVERS if os.environ.pop(name, None) is not None]
        rank_zero_only.rank = 0
        log.warning(
            "%s of the environment is ignored, as trainer.devices=1 and trainer.num_nodes=1: this process is the whole "
            "job. For a job on several devices choose trainer=ddp trainer.devices=...",
            ", ".join(names),
        )


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
    started, said = time.monotonic(), False
    while not path.exists():
        if os.getppid() != PARENT:
            raise RuntimeError(f"the process that was to write {path} has ended; what it printed says why")
        if not said and time.monotonic() - started > PATIENCE:
            log.warning("this rank waits for rank 0, which is to write %s", path)
            said = True
        time.sleep(0.2)


def agreed(value: bool) -> bool:
    """What rank 0 says, on all ranks."""
    said = [value]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(said)
    return said[0]
