"""The stage `train`: a network is trained from nothing (conf/experiment/pretrain_*.yaml)."""

from typing import Any

from omegaconf import DictConfig

from conf.schema import ConfigError
from experiments.engine.artefacts import staged
from experiments.engine.job import Job
from experiments.engine.ranks import is_rank_zero
from experiments.engine.stage import Stage
from experiments.engine.stages.distil import training_artefacts
from experiments.engine.training import train
from experiments.tools.precompute import backbone_of, check_latents
from lightning_modules.modules.base import check_module


class Train(Stage):
    """Trains the module that `cfg.pretrain` names, and writes its weights in half precision."""

    usual_name = "train"
    needs_teacher = False

    def prepare(self, cfg: DictConfig) -> None:
        if not isinstance(cfg.pretrain, DictConfig):
            raise ConfigError(f"pretrain={cfg.pretrain}: there is nothing to train; choose an experiment=pretrain_...")
        check_module(cfg.pretrain, "pretrain")

    def artefacts(self) -> list[str]:
        return [self.artefact("weights"), *training_artefacts(self)]

    def check(self, job: Job) -> None:
        if job.cfg.latents is not None:
            check_latents(job.cfg, job.data, backbone_of(job.cfg))

    def run(self, job: Job) -> None:
        with job.clock(self.name):
            self.module: Any = train(job, job.cfg.pretrain, self.name)
        if is_rank_zero() and not (job.run / self.artefact("weights")).exists():
            with staged(job.run / self.artefact("weights")) as folder:
                self.module.save(folder)
