"""Training as every stage does it: a module is made from the configuration, fitted, and resumed."""

from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback

from conf.schema import build
from experiments.engine.job import Job
from lightning_modules.training.ema import WarmedUpEMA
from lightning_modules.training.trainer import fit, make_callbacks


def train(job: Job, node: DictConfig, stage: str, **networks: Any) -> Any:
    """Build the module that `node` names around `networks`, train it under the name of a stage, and return it."""
    cfg, run = job.cfg, job.run
    optimizer, schedule = build(cfg.optimizer), build(cfg.lr_scheduler)
    dump = run / "failure" / stage
    module = build(node, optimizer=optimizer, lr_scheduler=schedule, seed=cfg.seed, dump=dump, **networks)()
    callbacks: list[Callback] = [WarmedUpEMA(cfg.ema_decay)] if cfg.ema_decay is not None else []
    callbacks += make_callbacks(cfg.callbacks)
    fit(module, job.data, cfg.trainer, run.folder, stage, job.dashboard.loggers, callbacks)
    return module
