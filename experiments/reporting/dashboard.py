"""Weights & Biases: one run per job, offline where there is no key, always finished."""

import inspect
import netrc
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import hydra.utils
import wandb
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger, WandbLogger

from conf.nested import flatten_dict
from conf.schema import ConfigError, build
from experiments.engine.identity import displayed
from experiments.engine.ranks import is_rank_zero
from experiments.engine.run import Run
from experiments.reporting.sounds import load_wandb_sounds

HOST = "api.wandb.ai"
"""The host under which ~/.netrc has the key of W&B."""


class Dashboard:
    """A context that opens the W&B run of a job, and finishes it whatever happens inside.

    The id of the W&B run is the name of the configuration and the run's id, so that a resumed job continues it.
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
            self.wandb = wandb.init(
                project=logger.project,
                entity=logger.entity,
                id=f"{self.cfg.name}-{self.run.id}",
                name=self.run.folder.name,
                group=self.cfg.name,
                dir=self.run.folder,
                config=flatten_dict(displayed(self.cfg)),
                mode=mode,
                resume="allow" if mode == "online" else None,
                settings=wandb.Settings(console="off", silent=mode == "offline"),
                reinit="finish_previous",
            )
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

    def finish(self, metrics: dict[str, Any], measured: dict[str, Any]) -> None:
        """Upload metrics.json and measured.json as the summary, and the figures and sounds of the run."""
        if self.wandb is None:
            return
        self.wandb.summary.update(flatten_dict({**metrics, **measured}))
        figures = {picture.stem: wandb.Image(str(picture)) for picture in sorted((self.run / "figures").glob("*.png"))}
        self.wandb.log(figures | load_wandb_sounds(self.run.folder))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.wandb is not None:
            self.wandb.finish(exit_code=1 if kind else 0)


def has_wandb_key() -> bool:
    """Tell whether there is a W&B key in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(Path("~/.netrc").expanduser()).authenticators(HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False
