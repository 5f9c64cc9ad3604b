"""The stage `distil`: trains the student on its task and on the teacher's outputs and features."""

from collections.abc import Sequence
from typing import Any

import hydra.utils
from omegaconf import DictConfig

from datamodules.teacher_outputs import read_outputs_manifest
from experiments.engine.inputs import load_distilling_teacher
from experiments.engine.job import TEACHER, Job
from experiments.engine.stage import Stage, find_latest, find_latest_network
from experiments.engine.stages.score import check_data
from experiments.engine.stages.select import Select
from experiments.engine.training import get_section, train
from experiments.engine.training_evaluation import EvaluateWhileTraining, TrainingEvaluation
from experiments.tools.teacher_outputs import check_outputs
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.modules.contract import check_module
from lightning_modules.training.parts import check_recomputation


class Distil(Stage):
    """Trains a copy of the last network as `cfg.distillation` says; does nothing where that has no `_target_`.

    The result has the weights of the moving average where that is on.

    Args:
        makes: name of the trained network.
        settings: see Stage.
    """

    usual_name = "distil"

    def __init__(self, makes: str = "distilled", settings: dict[str, Any] | None = None) -> None:
        super().__init__(settings)
        self.name_of_result = makes

    def prepare(self, cfg: DictConfig) -> None:
        self.makes = self.name_of_result if "_target_" in cfg.distillation else None
        self.training = (str(cfg.distillation.name), cfg.trainer.steps if self.makes else 0)
        """name of the distillation, and its number of optimiser steps"""
        if self.makes:
            check_module(cfg.distillation, "distillation")

    def link(self, before: Sequence[Stage]) -> None:
        self.source, self.select = find_latest_network(before), find_latest(before, Select)

    def artefacts(self) -> list[str]:
        return [f"networks/{self.makes}", *list_training_artefacts(self)] if self.makes else []

    def check(self, job: Job) -> None:
        self.evaluation: TrainingEvaluation | None = None
        if self.makes is None:
            return
        cfg, teacher = job.cfg, job.teacher
        self.teacher = load_distilling_teacher(cfg, teacher)
        if self.select is None:  # the score stage checks it otherwise
            check_data(teacher, "data", cfg.data.get("name"), job.data)
        narrower = self.select is not None and "slice" in self.select.kinds(job) and teacher.width_changes_stages
        module: Any = hydra.utils.get_object(cfg.distillation._target_)
        if hasattr(module, "check_settings"):  # a module from outside the repository may have none
            module.check_settings(cfg.distillation, self.teacher, narrower)
        check_recomputation(teacher, cfg.trainer.checkpoint_activations)
        self.data = job.data
        if cfg.distillation.get("teacher_outputs") == "stored":
            self.data = job.data.with_teacher_outputs()
            check_outputs(cfg.latents, read_outputs_manifest(cfg.latents), self.teacher)
        self.data.train_dataloader()
        if cfg.evaluation.every_n_steps is not None:
            self.evaluation = TrainingEvaluation(job)

    def run(self, job: Job) -> None:
        if self.makes is None:
            return
        base, changes = job.origins.get(self.source, (TEACHER, ()))
        if not job.folder_of(self.makes).exists():
            with job.clock(self.name):
                networks = {"student": job.load(self.source, base, changes), "teacher": self.teacher}
                watchers = [] if self.evaluation is None else [self.watch(self.evaluation, networks["student"])]
                module = train(job, job.cfg.distillation, self, self.data, watchers, **networks)
                job.save(self.makes, module.result())
        job.networks[self.makes], job.origins[self.makes] = job.load(self.makes, base, changes), (base, changes)

    def watch(self, evaluation: TrainingEvaluation, student: NetworkBackbone) -> EvaluateWhileTraining:
        """Return the callback that evaluates the student while it is trained."""
        return EvaluateWhileTraining(evaluation, student, self.name, get_section(self))


def list_training_artefacts(stage: Stage) -> list[str]:
    """Return the paths that the training of a stage writes, beside its result."""
    folders = [f"{folder}/{stage.name}" for folder in ("checkpoints", "failure", "previews")]
    return [*folders, f"history/{stage.name}.csv"]
