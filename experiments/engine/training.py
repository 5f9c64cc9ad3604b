"""Training in a stage: the module is built from the configuration, trained, and resumed where it was interrupted."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback

from conf.schema import build
from datamodules.base import DataModule
from experiments.engine.job import Job
from experiments.engine.memory import guard_memory
from experiments.engine.stage import Stage
from lightning_modules.modules.base import TrainedModule
from lightning_modules.training.ema import WarmedUpEMA
from lightning_modules.training.trainer import fit, make_callbacks


def train(
    job: Job, node: DictConfig, stage: Stage, data: DataModule, watchers: Sequence[Callback] = (), **networks: Any
) -> Any:
    """Build a module, train it, and return it.

    The names of logged values begin with `train/`, or with the stage's name where it is not the usual one, so that two
    trainings of a job are two curves in every dashboard.

    Args:
        job: the job.
        node: the configuration of the module, with a `_target_`.
        stage: the stage, under whose name checkpoints and history are stored.
        data: the data module whose training batches the module is trained on.
        watchers: callbacks that the stage adds; they come after the moving average of the weights.
        networks: the networks that the module takes, by the names of its parameters.
    """
    cfg, run = job.cfg, job.run
    optimizer, schedule = build(cfg.optimizer), build(cfg.lr_scheduler)
    dump = run / "failure" / stage.name
    module = build(node, optimizer=optimizer, lr_scheduler=schedule, seed=cfg.seed, dump=dump, **networks)()
    section = get_section(stage)
    if isinstance(module, TrainedModule):
        module.section = section
    callbacks: list[Callback] = [WarmedUpEMA(cfg.ema_decay)] if cfg.ema_decay is not None else []
    callbacks += [*make_callbacks(cfg.callbacks), *watchers]
    note = (
        f"\nThe settings of the stage, pipeline.stages.{stage.name}.settings, win over these" if stage.settings else ""
    )
    with guard_memory(cfg, module, stage.name, job.device, data, note):
        fit(module, data, cfg.trainer, run.folder, stage.name, job.dashboard.loggers, callbacks, section)
    return module


def get_section(stage: Stage) -> str:
    """Return the first part of the names of the values that the training of a stage logs."""
    return "train" if stage.name == stage.usual_name else stage.name
