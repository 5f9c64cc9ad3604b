"""Finished runs that were made with `logger=csv` or `logger=tensorboard`, logged to Weights & Biases afterwards."""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import wandb
from omegaconf import OmegaConf

from conf import schema
from experiments.engine.artefacts import read_json
from experiments.reporting.dashboard import STEP, Dashboard
from experiments.reporting.run_files import list_histories

STEP_OF_FILE = re.compile(r"step=(\d+)")


@dataclass
class FinishedRun:
    """The folder and the id of a finished run."""

    folder: Path
    id: str


def upload_run(folder: Path, overrides: list[str]) -> None:
    """Log a finished run to W&B as it would have been logged by `logger=wandb`: its history, summary and artifacts.

    `overrides` change the group `logger`: ["project=mine"]. Raises ValueError for a folder that is no finished run, and
    for a run that was logged to W&B when it was made.
    """
    if not (folder / "finished.json").exists():
        raise ValueError(f"{folder} is no folder of a finished run (it has no finished.json)")
    if (folder / "wandb").exists():
        raise ValueError(f"{folder} was logged to W&B already: wandb sync {folder}/wandb/offline-run-*")
    cfg: Any = OmegaConf.load(folder / "config.yaml")
    cfg.logger = OmegaConf.merge(cfg.logger, {"wandb": True}, OmegaConf.from_dotlist(overrides))
    run: Any = FinishedRun(folder, read_json(folder / "finished.json")["run_id"])
    with Dashboard(cfg, run) as dashboard:
        for stage, path in list_histories(folder).items():
            upload_history(dashboard.wandb, path)
            upload_pictures(dashboard.wandb, folder / "previews" / stage, get_section(path))
        dashboard.finish(read_json(folder / "metrics.json"), read_json(folder / "measured.json"))


def upload_history(run: Any, path: Path) -> None:
    """Log the rows of a CSV file with the columns step, name and value, one row of W&B per step."""
    for step, rows in pd.read_csv(path).groupby("step"):
        run.log(dict(zip(rows["name"], rows["value"], strict=True)) | {STEP: step})


def upload_pictures(run: Any, folder: Path, section: str) -> None:
    """Log the pictures of samples that an evaluation while training has drawn."""
    for path in sorted(folder.glob("step=*.png")):
        step = int(STEP_OF_FILE.match(path.stem)[1]) - 1  # type: ignore[index]
        run.log({f"{section}/samples": wandb.Image(str(path)), STEP: step})


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
    schema.register()
    failed = False
    for folder in arguments.folders:
        try:
            upload_run(folder, arguments.logger)
            print(f"{folder}: logged")
        except ValueError as error:
            print(error, file=sys.stderr)
            failed = True
    sys.exit(int(failed))
