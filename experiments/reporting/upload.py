"""Finished runs that were made with `logger=csv` or `logger=tensorboard`, logged to Weights & Biases afterwards."""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import wandb
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import schema
from experiments.engine.artefacts import read_json, write_text
from experiments.engine.identity import read_config
from experiments.engine.training_evaluation import get_logged_step
from experiments.reporting.dashboard import STEP, Dashboard
from experiments.reporting.run_files import list_histories

STEP_OF_FILE = re.compile(r"step=(\d+)")

LOGGED = "wandb/logged.txt"
"""The file in a run's folder that says that an upload is complete. It lies beside what W&B writes, and goes with it."""


@dataclass
class FinishedRun:
    """The folder and the id of a finished run."""

    folder: Path
    id: str


def upload_run(folder: Path, logger: DictConfig) -> None:
    """Log a finished run to W&B as it would have been logged by `logger=wandb`: its history, summary and artifacts.

    `logger` is the group of that name; the run's own is not used. Raises ValueError for a folder that is no finished
    run and for a run that was logged to W&B before, and OSError where a file of the run is missing.
    """
    if not (folder / "finished.json").exists():
        raise ValueError("this is no folder of a finished run (it has no finished.json)")
    cfg = read_literal_config(folder)
    if (folder / LOGGED).exists() or (cfg.logger.wandb and (folder / "wandb").exists()):
        raise ValueError(f"it was logged to W&B already: wandb sync {folder}/wandb/offline-run-*")
    cfg.logger = logger
    run: Any = FinishedRun(folder, read_json(folder / "finished.json")["run_id"])
    with Dashboard(cfg, run) as dashboard:
        for stage, path in list_histories(folder).items():
            upload_history(dashboard.wandb, path)
            upload_previews(dashboard, folder / "previews" / stage, get_section(path))
        dashboard.finish(read_json(folder / "metrics.json"), read_json(folder / "measured.json"))
    write_text(folder / LOGGED, "python -m experiments.upload has logged this run to W&B\n")


def read_literal_config(folder: Path) -> DictConfig:
    """Return the configuration of a run in which nothing is resolved: `${oc.env:HF_TOKEN}` is a text like any other."""

    def escape(content: Any) -> Any:
        if isinstance(content, dict):
            return {key: escape(value) for key, value in content.items()}
        if isinstance(content, list):
            return [escape(value) for value in content]
        # OmegaConf halves the backslashes before "${", and an odd number of them makes it a text.
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", content) if isinstance(content, str) else content

    return OmegaConf.create(escape(read_config(folder)))


def make_logger_group(overrides: list[str]) -> DictConfig:
    """Return the group `logger` with W&B on and some of its fields changed: ["project=mine"]."""
    group = OmegaConf.merge(OmegaConf.structured(schema.Logger), {"wandb": True}, OmegaConf.from_dotlist(overrides))
    assert isinstance(group, DictConfig)
    return group


def upload_history(run: Any, path: Path) -> None:
    """Log the rows of a CSV file with the columns step, name and value, one row of W&B per step."""
    for step, rows in pd.read_csv(path).groupby("step"):
        run.log(dict(zip(rows["name"], rows["value"], strict=True)) | {STEP: step})


def upload_previews(dashboard: Dashboard, folder: Path, section: str) -> None:
    """Log the pictures of samples and the texts that evaluations while training have written."""
    for path in sorted(folder.glob("step=*")):
        step = get_logged_step(int(STEP_OF_FILE.match(path.stem)[1]))  # type: ignore[index]
        if path.suffix == ".png":
            dashboard.log_samples(f"{section}/samples", path, step)
        elif path.suffix == ".json":
            dashboard.log_texts(f"{section}/texts", read_json(path), step)


def get_section(history: Path) -> str:
    """Return the first part of the names of the values in a history."""
    names = pd.read_csv(history)["name"]
    return str(next((name.partition("/")[0] for name in names if "/" in name), "train"))


def main() -> None:
    """Log finished runs to Weights & Biases that were made without it, offline where there is no key."""
    parser = argparse.ArgumentParser(prog="python -m experiments.upload", description=main.__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="folder of a run, such as runs/prune/*")
    parser.add_argument("--logger", action="append", default=[], metavar="FIELD=VALUE", help="such as project=mine")
    arguments = parser.parse_args()
    try:
        logger = make_logger_group(arguments.logger)
    except OmegaConfBaseException as error:
        parser.error(f"--logger: {str(error).splitlines()[0]}; fields are {', '.join(schema.Logger.__annotations__)}")
    failed = False
    for folder in arguments.folders:
        if folder.exists() and not (folder / "config.yaml").exists():
            print(f"{folder}: skipped, as it is no run (it has no config.yaml)")
            continue
        try:
            upload_run(folder, logger)
            print(f"{folder}: logged")
        except (OSError, ValueError, wandb.Error) as error:
            print(f"{folder}: {error}", file=sys.stderr)
            failed = True
    sys.exit(int(failed))
