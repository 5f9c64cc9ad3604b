"""The beginning of a job, before torch is imported: its record, its devices, and mistakes in its configuration."""

import os
import sys

from omegaconf import DictConfig

from conf import checks, devices, search_path
from conf.environment import RANK_VARIABLES
from conf.schema import ConfigError
from experiments.engine.artefacts import read_json
from experiments.engine.repeats import drop_repeats
from experiments.engine.sweep import JobRecord, open_record


def start_job(cfg: DictConfig) -> float | None:
    """Run one job and return its first measure; a job of a sweep that fails is recorded, and returns None.

    Optuna takes None for a failed trial and goes on, while NaN would end its search. A Slurm job of several tasks
    raises its error instead, which ends the sweep's process once the jobs before it have ended.

    The first line on the terminal, and the answer to a wrong value, come before torch is imported.
    """
    processes = cfg.trainer.devices * cfg.trainer.num_nodes
    is_first = processes == 1 or is_first_process()
    record = open_record() if is_first else JobRecord()
    if record.folder is not None and not record.is_sweeps_process():
        # submitit's executor on this machine gives each process GPUs 0, 1, ..., whichever the sweep may use.
        renumbered = os.environ.get("SUBMITIT_EXECUTOR") == "local"
        gpus = read_json(record.folder / "sweep.json")["gpus"] if renumbered else devices.list_gpus()
        devices.claim_gpus(record.folder, gpus, cfg.trainer.devices)
    if record.in_sweep:
        drop_repeats()
    # Slurm ends the other tasks of a job, which wait for this one, where this one ends with an exit code.
    with record.follow(raises=processes > 1 and "SLURM_PROCID" in os.environ):
        check_early(cfg, record)
        if is_first and not record.in_sweep:
            print(f"job {cfg.name}/{cfg.label}", flush=True)
        from experiments.engine.jobs import run_job  # noqa: PLC0415 - it imports torch

        return run_job(cfg, record)
    return None


def check_early(cfg: DictConfig, record: JobRecord) -> None:
    """Check what needs no torch; ends the process of a single job with the message alone, and raises in a sweep."""
    try:
        search_path.check_shadowed_files()
        checks.check_values(cfg)
    except ConfigError as error:
        if record.in_sweep:
            raise
        sys.exit(str(error))


def is_first_process() -> bool:
    """Tell whether the environment makes this process the first of several that run one job."""
    return next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0") == "0"
