"""Weights & Biases: one run per job, offline where there is no key, always finished."""

import inspect
import netrc
import os
import re
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import hydra.utils
import wandb
from omegaconf import DictConfig
from PIL import Image
from pytorch_lightning.loggers import Logger, WandbLogger

from conf.nested import flatten_dict
from conf.schema import ConfigError, build
from experiments.engine.identity import get_displayed_settings
from experiments.engine.ranks import is_rank_zero
from experiments.engine.run import Run
from experiments.engine.sweep import open_record
from experiments.reporting.lineage import log_lineage, make_run_artifact
from experiments.reporting.run_files import (
    Scoring,
    get_gap_closed,
    list_decisions,
    list_networks,
    read_plans,
    read_scorings,
)
from experiments.reporting.run_names import name_run
from experiments.reporting.sounds import load_wandb_sounds
from experiments.reporting.strip import draw_strip

HOST = "api.wandb.ai"
"""The host under which ~/.netrc has the key of W&B."""

STEP = "trainer/global_step"
"""The key under which Lightning logs the optimiser step to W&B."""


class Dashboard:
    """A context that opens the W&B run of a job, and finishes it whatever happens inside.

    The id of the W&B run is the name of the configuration and the run's id, so that a resumed job continues it; as a
    trial of a W&B sweep it is the id that the agent gives it, in the project of the sweep.
    """

    def __init__(self, cfg: DictConfig, run: Run) -> None:
        self.cfg, self.run = cfg, run
        self.loggers: list[Logger] = []
        self.wandb: Any = None

    def open_loggers(self) -> None:
        """Make the loggers of `logger.loggers`; raises ConfigError naming one that cannot be made."""
        self.loggers += [self.build_logger(str(name), node) for name, node in self.cfg.logger.loggers.items()]

    def __enter__(self) -> Self:
        logger = self.cfg.logger
        if logger.wandb and is_rank_zero():
            mode: Any = logger.mode
            if mode == "auto":
                mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
            settings = get_displayed_settings(self.cfg)
            target = {"project": logger.project, "entity": logger.entity, "id": f"{self.cfg.name}-{self.run.id}"}
            self.wandb = wandb.init(
                **({} if is_trial() else target),
                name=name_run(self.run.folder.name, settings),
                group=get_sweep_name() or self.cfg.name,
                job_type=self.cfg.pipeline.name,
                tags=list_tags(settings),
                dir=self.run.folder,
                config=flatten_dict(settings, "_"),
                mode=mode,
                resume="allow" if mode == "online" else None,
                settings=wandb.Settings(console="off", silent=mode == "offline"),
                reinit="finish_previous",
            )
            self.wandb.define_metric(STEP)
            self.wandb.define_metric("*", step_metric=STEP)
            self.loggers.append(WandbLogger(experiment=self.wandb))
        return self

    def build_logger(self, name: str, node: DictConfig) -> Logger:
        """Return the logger of `logger.loggers.<name>`, which writes below the run's folder if it takes a `save_dir`.

        Raises ConfigError, naming the field and the extra to install, where the logger cannot be made.
        """
        takes_folder = "save_dir" in inspect.signature(hydra.utils.get_object(node._target_)).parameters
        folder = {"save_dir": self.run / "logs"} if takes_folder and "save_dir" not in node else {}
        try:
            return build(node, **folder)
        except Exception as error:
            extra = "; pip install -e '.[tensorboard]'" if "TensorBoard" in node._target_ else ""
            raise ConfigError(f"logger.loggers.{name} cannot be made: {error.__cause__ or error}{extra}") from error

    def log_samples(self, key: str, picture: Path, step: int) -> None:
        """Log a picture of samples at an optimiser step."""
        if self.wandb is not None:
            self.wandb.log({key: wandb.Image(str(picture)), STEP: step})

    def log_texts(self, key: str, columns: dict[str, list[str]], step: int) -> None:
        """Log a table of texts, {column: its values}, at an optimiser step."""
        if self.wandb is not None:
            rows = [list(row) for row in zip(*columns.values(), strict=True)]
            self.wandb.log({key: wandb.Table(columns=list(columns), data=rows), STEP: step})

    def finish(self, metrics: dict[str, Any], measured: dict[str, Any]) -> None:
        """Log metrics.json and measured.json, the table and the strip of units, figures, sounds and artifacts.

        Every key consists of words joined by "/" and "_". Numbers are logged as a row of the history as well, so that a
        panel can draw one over another, grouped over runs: quality over ratio with a band over seeds.
        """
        if self.wandb is None:
            return
        folder = self.run.folder
        summary = flatten_dict({**metrics, **measured, "gap_closed": get_gap_closed(metrics)}, "/")
        summary = {re.sub(r"[^\w/]", "_", key): value for key, value in summary.items()}
        self.wandb.summary.update(summary)
        self.wandb.log({key: value for key, value in summary.items() if is_number(value)})
        for scoring in read_scorings(folder, read_plans(folder)):
            self.wandb.log({f"units/{scoring.name}": make_units_table(scoring)})
        self.wandb.log(load_pictures(folder) | load_wandb_sounds(folder))
        if self.cfg.logger.artifacts:
            self.wandb.log_artifact(make_run_artifact(folder, self.cfg.name, self.cfg.pipeline.name, self.run.id))
            teacher = get_displayed_settings(self.cfg).get("teacher") or {}
            log_lineage(self.wandb, folder, self.run.id, teacher.get("path") if has_teacher(metrics) else None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.wandb is not None:
            self.wandb.finish(exit_code=1 if kind else 0)


def is_trial() -> bool:
    """Tell whether an agent of a W&B sweep has started this process, with the id of a W&B run."""
    return "WANDB_SWEEP_ID" in os.environ


def get_sweep_name() -> str | None:
    """Return "sweep-<id>" of the sweep that this job belongs to; None for a single job."""
    record = open_record()
    return None if record.folder is None else f"sweep-{record.folder.name}"


def list_tags(settings: dict[str, Any]) -> list[str]:
    """Return the names of what users filter by: the data set, the teacher, and how it is pruned and distilled.

    `settings` are those of get_displayed_settings. W&B allows tags of up to 64 characters.
    """
    groups = ("data", "teacher", "criterion", "selection", "repair", "distillation")
    names = [str(choice["name"]) for group in groups if (choice := settings.get(group) or {}).get("name")]
    return [name[:64] for name in dict.fromkeys(names) if name != "none"]


def make_units_table(scoring: Scoring) -> wandb.Table:
    """Return a table with a row per unit, in the order of the forward pass: its score, and what became of it."""
    decisions = list_decisions(scoring.scores, scoring.removed, scoring.protected)
    rows = [
        [
            name,
            entry["score"],
            entry.get("standard_error"),
            decisions[name],
        ]
        for name, entry in scoring.scores.items()
    ]
    return wandb.Table(columns=["unit", "score", "standard_error", "decision"], data=rows)


def load_pictures(folder: Path) -> dict[str, Any]:
    """Return a run's pictures as W&B logs them: samples, scores, and a strip of the network for each score stage.

    The losses are left out, because W&B draws their curves itself.
    """
    paths = [path for path in sorted((folder / "figures").glob("*.png")) if not path.stem.startswith("losses")]
    pictures = {path.stem: wandb.Image(str(path)) for path in paths}
    with tempfile.TemporaryDirectory() as temporary:
        for scoring in read_scorings(folder, read_plans(folder)):
            name = scoring.name.replace("scores", "strip").replace("-", "_")
            strip = draw_strip(scoring, Path(temporary) / f"{name}.png")
            pictures[name] = wandb.Image(Image.open(strip))
    return pictures


def is_number(value: Any) -> bool:
    """Tell whether a value is a number, which curves and scatter plots can show."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def has_teacher(metrics: dict[str, Any]) -> bool:
    """Tell whether a run had a pretrained network; a pretraining has none."""
    return bool(list_networks(metrics))


def has_wandb_key() -> bool:
    """Tell whether there is a W&B key in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(Path("~/.netrc").expanduser()).authenticators(HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False
