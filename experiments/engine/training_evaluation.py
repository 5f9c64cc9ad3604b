"""Evaluation while training: the first measure, samples and texts of the student every `evaluation.every_n_steps`."""

import functools
import logging
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.seed import isolate_rng

from experiments.engine.artefacts import write_json
from experiments.engine.evaluation import Evaluator
from experiments.engine.job import TEACHER, Job
from experiments.engine.measures import measure_network, measure_samples, select_network_measures
from experiments.engine.ranks import is_rank_zero
from experiments.engine.samples import SampleEvaluation
from experiments.reporting.figures import draw_sample_grids
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.metrics.protocol import Samples
from lightning_modules.modules.scoring import as_before
from lightning_modules.training.ema import WarmedUpEMA
from lightning_modules.training.monitor import TrainingMonitor
from lightning_modules.training.trainer import autocast

log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What an evaluation while training gives for one network."""

    values: dict[str, float] = field(default_factory=dict)
    """{measure: value}"""
    images: np.ndarray | None = None
    """samples, uint8 (N,H,W,C); None for networks that generate none"""
    texts: list[str] | None = None
    """continuations of the prompts; None for networks that write none"""


class TrainingEvaluation:
    """Evaluates networks by the first of `evaluation.metrics` on `evaluation.training_samples` samples.

    The code and the seeds are those of the evaluation after training, but nothing is cached or written. Raises
    ValueError for a configuration in which there is nothing to evaluate, and what Evaluator raises.
    """

    def __init__(self, job: Job) -> None:
        cfg = job.cfg.copy()
        evaluation, first = cfg.evaluation, next(iter(cfg.evaluation.metrics), None)
        evaluation.metrics = {name: node for name, node in evaluation.metrics.items() if name == first}
        evaluation.samples = min(evaluation.samples, evaluation.training_samples)
        if job.teacher.classifies:
            available = len(job.data.source("holdout")) if evaluation.images is None else evaluation.images
            evaluation.images = min(available, evaluation.training_samples)
        self.job, self.cfg = replace(job, cfg=cfg), cfg
        evaluator = Evaluator(self.job)
        self.network_measures, self.texts = select_network_measures(evaluator.measures), evaluator.texts
        self.samples = evaluator.samples
        if self.samples is None and job.teacher.generates:
            self.samples = SampleEvaluation(self.job, {})
        if not (self.samples or self.network_measures or self.texts):
            raise ValueError(
                f"evaluation.every_n_steps={evaluation.every_n_steps}: there is nothing to evaluate, as this network "
                "generates nothing and evaluation.metrics is empty; choose a measure, or evaluation.every_n_steps=null"
            )

    @functools.cached_property
    def teacher(self) -> Outcome:
        """The teacher's outcome, for comparison."""
        return self.evaluate(TEACHER, self.job.teacher)

    @torch.no_grad()
    def evaluate(self, name: str, network: Any) -> Outcome:
        """Return the outcome of a network, whose modes and gradients stay; the global generators are left as they were.

        A value or a sample that is not finite is logged as a warning and left out: it does not end the training.
        """
        device, outcome = self.job.device, Outcome()
        with isolate_rng(), as_before(network), autocast(self.cfg.evaluation.precision, device):
            network.to(device).eval()
            try:
                if self.samples is not None:
                    outcome.images = self.samples.generate_without_files(network)
                    outcome.values |= self.measure_images(name, outcome.images)
                for measure_name, measure in self.network_measures.items():
                    outcome.values |= measure_network(measure, measure_name, network, device)
            except FloatingPointError as error:
                log.warning("evaluation of %s while training: %s", name, error)
            if self.texts is not None:
                outcome.texts = network.write(self.texts.prompts, self.cfg.evaluation.tokens, device)
        return outcome

    def measure_images(self, name: str, images_NHWC: np.ndarray) -> dict[str, float]:
        """Return {measure: value} of the samples that a network generated."""
        assert self.samples is not None
        captions, labels = self.samples.list_captions(), self.samples.list_labels()
        samples = Samples(images_NHWC, name, captions, labels, self.job.device)
        values = measure_samples(self.samples.measures, samples, self.samples.reference)
        return {key.removeprefix(f"{name}/"): value for key, value in values.items()}


class EvaluateWhileTraining(Callback):
    """Evaluates the student every `evaluation.every_n_steps` optimiser steps, beside the teacher.

    Values are logged as `<section>/eval/<measure>`, and the teacher's as `<section>/eval/teacher_<measure>`. Samples of
    both are drawn side by side into previews/<stage>/, texts are written there as JSON; both are logged to W&B. Where
    the moving average of the weights is on, its weights are evaluated, as they are after training.

    Args:
        evaluation: evaluates a network.
        student: the network that is trained.
        stage: name of the stage.
        section: the first part of the names of logged values.
    """

    def __init__(self, evaluation: TrainingEvaluation, student: NetworkBackbone, stage: str, section: str) -> None:
        self.evaluation, self.student, self.stage, self.section = evaluation, student, stage, section
        self.every, self.step = int(evaluation.cfg.evaluation.every_n_steps), 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:  # gradients are still being accumulated
            return
        self.step = trainer.global_step
        if self.step % self.every:
            return
        start = time.perf_counter()
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averages = [callback for callback in callbacks if isinstance(callback, WarmedUpEMA)]
        for average in averages:
            average.exchange_weights(pl_module)
        try:
            outcome = self.evaluation.evaluate(self.stage, self.student)
        finally:
            for average in averages:
                average.exchange_weights(pl_module)
        self.log_values(trainer, outcome.values)
        if is_rank_zero():
            self.write_preview(outcome)
        for callback in callbacks:
            if isinstance(callback, TrainingMonitor):
                callback.exclude(time.perf_counter() - start)

    def log_values(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        """Write the values to all loggers, in a row of their own at the step of the newest losses."""
        teacher = {f"teacher_{name}": value for name, value in self.evaluation.teacher.values.items()}
        row = {f"{self.section}/eval/{name}": value for name, value in {**values, **teacher}.items()}
        for logger in trainer.loggers if row else ():
            logger.log_metrics(row, step=self.step - 1)
            logger.save()

    def write_preview(self, outcome: Outcome) -> None:
        """Write samples and texts of teacher and student into the run's folder, and log them to W&B."""
        job, teacher = self.evaluation.job, self.evaluation.teacher
        path = job.run / "previews" / self.stage / f"step={self.step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        student = f"step {self.step}"
        if outcome.images is not None and teacher.images is not None:
            draw_sample_grids({TEACHER: teacher.images, student: outcome.images}, path)
            job.dashboard.log_samples(f"{self.section}/samples", path, self.step - 1)
        if outcome.texts is not None and teacher.texts is not None:
            assert self.evaluation.texts is not None
            columns = {"prompt": self.evaluation.texts.prompts, TEACHER: teacher.texts, student: outcome.texts}
            write_json(path.with_suffix(".json"), columns)
            job.dashboard.log_texts(f"{self.section}/texts", columns, self.step - 1)
