"""Training in a stage: the module is built from the configuration, trained, and resumed where it was interrupted."""

from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback

from conf.schema import build
from experiments.engine.job import Job
from lightning_modules.training.ema import WarmedUpEMA
from lightning_modules.training.trainer import fit, make_callbacks


def train(job: Job, node: DictConfig, stage: str, **networks: Any) -> Any:
    """Build a module, train it, and return it.

    Args:
        job: the job.
        node: the configuration of the module, with a `_target_`.
        stage: name of the stage, under which checkpoints and history are stored.
        networks: the networks that the module takes, by the names of its parameters.
    """
    cfg, run = job.cfg, job.run
    optimizer, schedule = build(cfg.optimizer), build(cfg.lr_scheduler)
    dump = run / "failure" / stage
    module = build(node, optimizer=optimizer, lr_scheduler=schedule, seed=cfg.seed, dump=dump, **networks)()
    callbacks: list[Callback] = [WarmedUpEMA(cfg.ema_decay)] if cfg.ema_decay is not None else []
    callbacks += make_callbacks(cfg.callbacks)
    fit(module, job.data, cfg.trainer, run.folder, stage, job.dashboard.loggers, callbacks)
    return module
