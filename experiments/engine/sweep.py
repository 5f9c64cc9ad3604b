"""A job as train.py runs it, alone or as one of a sweep that several processes may share."""

import time

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.engine.pipeline import run_pipeline
from experiments.engine.run import RunBusy

POLL = 5.0
"""seconds between two looks at a run that another process works on"""

_postponed: list[DictConfig] = []
"""jobs of this process's sweep that another process was working on when their turn came"""


def run_job(cfg: DictConfig) -> float | None:
    """Run one job and return its first measure.

    Another process may work on the same run. Of a single job that is an error; a job of a sweep is left to that process
    and looked at again after the other jobs (`run_postponed_jobs`), or waited for where its measure is needed at once
    (sweepers that search) or jobs have processes of their own (other launchers).
    """
    try:
        return run_pipeline(cfg)
    except RunBusy as busy:
        if not is_in_sweep() or cfg.trainer.devices * cfg.trainer.num_nodes > 1:
            raise
        if not runs_jobs_in_turn():
            return run_when_free(cfg)
        print(f"left to another process for now: {busy}")
        _postponed.append(cfg)
        return None


def run_postponed_jobs() -> None:
    """Wait for the jobs that were left to another process, and run those that it did not finish."""
    while _postponed:
        run_when_free(_postponed.pop(0))


def run_when_free(cfg: DictConfig) -> float | None:
    """Run a job as soon as no other process works on it; one that is finished by then is not run again."""
    said = False
    while True:
        try:
            return run_pipeline(cfg)
        except RunBusy as busy:
            if not said:
                print(f"waiting: {busy}", flush=True)
                said = True
            time.sleep(POLL)


def is_in_sweep() -> bool:
    """Tell whether Hydra runs this job as one of several."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def runs_jobs_in_turn() -> bool:
    """Tell whether the jobs of this sweep run in this process, and none of them waits for the measure of another."""
    hydra = HydraConfig.get()
    return hydra.launcher._target_.endswith("BasicLauncher") and hydra.sweeper._target_.endswith("BasicSweeper")
