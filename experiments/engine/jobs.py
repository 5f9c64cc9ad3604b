"""Runs a job whose configuration was looked through: alone, or as one of a sweep that processes may share."""

import time

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from conf import checks
from experiments.engine.pipeline import run_pipeline
from experiments.engine.run import RunBusy
from experiments.engine.sweep import POSTPONED, RUNNING, WAITING, JobRecord
from experiments.reporting.dashboard import is_trial

POLL = 5.0
"""seconds between two looks at a run that another process works on"""


def run_job(cfg: DictConfig, record: JobRecord) -> float | None:
    """Run one job and return its first measure.

    Another process may work on the same run. For a single job that is an error. A job of a sweep is left to that
    process and looked at again after the other jobs, or waited for where its measure is needed at once (sweepers that
    search, trials of W&B) or where each job has a process of its own (other launchers).
    """
    checks.check_targets(cfg)
    try:
        return record.finish(run_pipeline(cfg, record))
    except RunBusy as busy:
        if not (record.in_sweep or is_trial()) or cfg.trainer.devices * cfg.trainer.num_nodes > 1:
            raise
        if is_trial() or not runs_jobs_in_turn():
            return record.finish(run_when_free(cfg, record))
        record.update(state=WAITING, reason=str(busy))
        POSTPONED.append(lambda: run_postponed(cfg, record))
        return None


def run_postponed(cfg: DictConfig, record: JobRecord) -> None:
    """Run a job that was left to another process."""
    with record.follow():
        record.finish(run_when_free(cfg, record))


def run_when_free(cfg: DictConfig, record: JobRecord) -> float | None:
    """Run a job as soon as no other process works on it; one that is finished by then is not run again.

    Raises RunLocked where that process has ended and its lock is still held.
    """
    announced = False
    while True:
        try:
            record.update(state=RUNNING)
            return run_pipeline(cfg, record)
        except RunBusy as busy:
            record.update(state=WAITING, reason=str(busy))
            if not announced:
                print(f"waiting: {busy}", flush=True)
                announced = True
            time.sleep(POLL)


def runs_jobs_in_turn() -> bool:
    """Return whether this process runs all jobs of the sweep in turn, without a sweeper that chooses by measures."""
    hydra = HydraConfig.get()
    return hydra.launcher._target_.endswith("BasicLauncher") and hydra.sweeper._target_.endswith("BasicSweeper")
