"""The stage `train`: trains a network from random weights (conf/experiment/pretrain_*.yaml)."""

from typing import Any

from omegaconf import DictConfig

from conf.schema import ConfigError
from experiments.engine.job import Job
from experiments.engine.stage import Stage
from experiments.engine.stages.distil import list_training_artefacts
from experiments.engine.training import train
from experiments.tools.precompute import check_latents, load_backbone
from lightning_modules.modules.contract import check_module


class Train(Stage):
    """Trains the module that `cfg.pretrain` names."""

    usual_name = "train"
    needs_teacher = False

    def prepare(self, cfg: DictConfig) -> None:
        if not isinstance(cfg.pretrain, DictConfig):
            raise ConfigError(f"pretrain={cfg.pretrain}: there is nothing to train; choose an experiment=pretrain_...")
        check_module(cfg.pretrain, "pretrain")

    def artefacts(self) -> list[str]:
        return list_training_artefacts(self)

    def check(self, job: Job) -> None:
        if (every := job.cfg.evaluation.every_n_steps) is not None:
            raise ConfigError(
                f"evaluation.every_n_steps={every}: a training from random weights has no teacher to compare with; "
                "choose null"
            )
        if job.cfg.latents is not None:
            check_latents(job.cfg, job.data, load_backbone(job.cfg))

    def run(self, job: Job) -> None:
        with job.clock(self.name):
            self.module: Any = train(job, job.cfg.pretrain, self, job.data)
