"""The training stage of every pipeline: one way to make a trained module from the configuration and to fit it."""

from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig

from conf.schema import build
from experiments.engine.run import Run
from experiments.reporting.dashboard import Dashboard
from lightning_modules.training.ema import WarmedUpEMA
from lightning_modules.training.trainer import fit


def train(
    cfg: DictConfig,
    node: DictConfig,
    run: Run,
    data: pl.LightningDataModule,
    stage: str,
    dashboard: Dashboard,
    **networks: Any,
) -> Any:
    """Build the module that `node` names around `networks`, train it in `run`, and return it."""
    optimizer, schedule = build(cfg.optimizer), build(cfg.lr_scheduler)
    module = build(node, optimizer=optimizer, lr_scheduler=schedule, seed=cfg.seed, dump=run / "failure", **networks)()
    callbacks = [WarmedUpEMA(cfg.ema_decay)] if cfg.ema_decay is not None else []
    fit(module, data, cfg.trainer, run.folder, stage, dashboard.loggers, callbacks)
    return module
