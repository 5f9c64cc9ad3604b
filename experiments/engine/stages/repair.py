"""The stage `repair`: refits layers of the pruned network to the network it was pruned from, without training."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from conf.schema import ConfigError, build
from experiments.engine.job import Job
from experiments.engine.stage import Stage, find_latest
from experiments.engine.stages.build import Build
from lightning_modules.training.trainer import make_trainer


class Repair(Stage):
    """Repairs a copy of the last pruned network as `cfg.repair` says; does nothing where that has no `_target_`.

    Args:
        makes: name of the repaired network.
        settings: see Stage.
    """

    usual_name = "repair"

    def __init__(self, makes: str = "repaired", settings: dict[str, Any] | None = None) -> None:
        super().__init__(settings)
        self.name_of_result = makes

    def prepare(self, cfg: DictConfig) -> None:
        self.makes = self.name_of_result if "_target_" in cfg.repair else None
        self.method = build(cfg.repair) if self.makes else None

    def link(self, before: Sequence[Stage]) -> None:
        build_stage = find_latest(before, Build)
        if build_stage is None:
            raise ConfigError(f"pipeline.stages.{self.name}: there is no stage before it that prunes (Build)")
        self.source, self.score = build_stage.makes, build_stage.select.score

    def artefacts(self) -> list[str]:
        return [f"networks/{self.makes}", self.artefact("repair.json")] if self.makes else []

    def check(self, job: Job) -> None:
        if self.method is not None:
            self.batches(job)

    def batches(self, job: Job) -> Any:
        """Return the calibration batches; each has samples of all timesteps."""
        calibration = job.cfg.calibration
        assert self.method is not None
        return self.score.data(job).subset(
            "train",
            self.method.samples,
            calibration.seed,
            calibration.batch_size,
            spread=True,
            augment=calibration.augment,
            field="repair.samples",
        )

    def run(self, job: Job) -> None:
        if self.method is None or self.makes is None:
            return
        base, changes = job.origins[self.source]
        path = job.run / self.artefact("repair.json")
        if not (job.folder_of(self.makes).exists() and path.exists()):
            student = job.load(self.source, base, changes)
            calibration = job.cfg.calibration
            with job.clock(self.name):
                trainer = make_trainer(job.cfg.trainer, "repair", calibration.precision)
                record = self.method.repair(
                    student, job.networks[base], changes, self.batches(job), trainer, calibration.seed
                )
            job.run.write(path.name, record)
            job.save(self.makes, student)
        job.networks[self.makes], job.origins[self.makes] = job.load(self.makes, base, changes), (base, changes)
