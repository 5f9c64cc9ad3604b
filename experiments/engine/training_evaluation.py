"""Evaluation while training: the first measure, samples and texts of the student every `evaluation.every_n_steps`."""

import contextlib
import functools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.seed import isolate_rng

from experiments.engine.artefacts import write_json
from experiments.engine.clock import explain_out_of_memory, take_first_line
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
from lightning_modules.training.sharding import FullySharded
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

        A value or a sample that is not finite is logged as a warning and left out: it does not end the training. Raises
        what measures, samplers and the device raise.
        """
        device, outcome = self.job.device, Outcome()
        with (
            isolate_generators(),
            as_before(network),
            placed_on(network, device),
            autocast(self.cfg.evaluation.precision, device),
        ):
            network.eval()
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
    """Evaluates the student every `evaluation.every_n_steps` optimiser steps and before the first, beside the teacher.

    Values are logged as `<section>/eval/<measure>`, and the teacher's as `<section>/eval/teacher_<measure>`. Samples of
    both are drawn side by side into previews/<stage>/, texts are written there as JSON; both are logged to W&B. Where
    the moving average of the weights is on, its weights are evaluated, as they are after training.

    An error before the first step ends the training, as nothing is lost yet. A later one is logged as a warning, and
    the training goes on. With several ranks every error ends it, as the others would wait for the rank that has failed.

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
        if self.step == 0:
            self.evaluate_student(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:  # gradients are still being accumulated
            return
        self.step = trainer.global_step
        if self.step % self.every == 0:
            self.evaluate_student(trainer, pl_module)

    def evaluate_student(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Evaluate the student as it is now, log the values, and write the preview."""
        start = time.perf_counter()
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averages = [callback for callback in callbacks if isinstance(callback, WarmedUpEMA)]
        outcome: Outcome | None = None
        for average in averages:
            average.exchange_weights(module)
        if isinstance(trainer.strategy, FullySharded):  # it trains a copy of the student
            trainer.strategy.copy_weights_back()
        try:
            with self.warn_of_errors(trainer.world_size), explain_out_of_memory(self.explain):
                outcome = self.evaluation.evaluate(self.stage, self.student)
        finally:
            for average in averages:
                average.exchange_weights(module)
        if outcome is not None:
            with self.warn_of_errors(trainer.world_size), explain_out_of_memory(self.explain):
                self.log_values(trainer, outcome.values, self.evaluation.teacher.values)
                if is_rank_zero():
                    self.write_preview(outcome)
        for callback in callbacks:
            if isinstance(callback, TrainingMonitor):
                callback.exclude(time.perf_counter() - start)

    def explain(self, error: BaseException) -> str:
        """Return the message for an evaluation that ran out of memory, as the training beside it may fit alone."""
        evaluation, reason = self.evaluation.cfg.evaluation, take_first_line(error)
        return (
            f"out of memory in the evaluation after step {self.step} of stage {self.stage!r} ({reason}). "
            f"Lower evaluation.batch_size={evaluation.batch_size}, or choose evaluation.every_n_steps=null"
        )

    @contextlib.contextmanager
    def warn_of_errors(self, ranks: int) -> Iterator[None]:
        """Log an error as a warning, unless it comes before the first step or there are several ranks."""
        try:
            yield
        except Exception as error:
            if self.step == 0 or ranks > 1:
                raise
            log.warning(
                "evaluation.every_n_steps=%d: the evaluation after step %d of the stage %s has failed, and the "
                "training goes on: %s: %s",
                *(self.every, self.step, self.stage, type(error).__name__, error),
            )

    def log_values(self, trainer: pl.Trainer, student: dict[str, float], teacher: dict[str, float]) -> None:
        """Write the values of both networks to all loggers, in a row of their own at the step of the newest losses."""
        if self.step == 0 and self.every == 1:  # the row belongs to the evaluation after the first step
            return
        values = student | {f"teacher_{name}": value for name, value in teacher.items()}
        row = {f"{self.section}/eval/{name}": value for name, value in values.items()}
        for logger in trainer.loggers if row else ():
            logger.log_metrics(row, step=get_logged_step(self.step))
            logger.save()

    def write_preview(self, outcome: Outcome) -> None:
        """Write samples and texts of teacher and student into the run's folder, and log them to W&B."""
        job, teacher = self.evaluation.job, self.evaluation.teacher
        path = job.run / "previews" / self.stage / f"step={self.step:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        student = f"step {self.step}"
        if outcome.images is not None and teacher.images is not None:
            draw_sample_grids({TEACHER: teacher.images, student: outcome.images}, path)
            job.dashboard.log_samples(f"{self.section}/samples", path, get_logged_step(self.step))
        if outcome.texts is not None and teacher.texts is not None:
            assert self.evaluation.texts is not None
            columns = {"prompt": self.evaluation.texts.prompts, TEACHER: teacher.texts, student: outcome.texts}
            write_json(path.with_suffix(".json"), columns)
            job.dashboard.log_texts(f"{self.section}/texts", columns, get_logged_step(self.step))


def get_logged_step(steps_taken: int) -> int:
    """Return the step at which an evaluation is logged: that of the newest losses, or 0 before the first step."""
    return max(steps_taken - 1, 0)


@contextlib.contextmanager
def placed_on(network: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Move a network to a device, and afterwards back to where it was."""
    before = next(network.parameters()).device
    network.to(device)
    try:
        yield
    finally:
        network.to(before)


@contextlib.contextmanager
def isolate_generators() -> Iterator[None]:
    """Restore the global random generators afterwards; Lightning's `isolate_rng` does not after an error."""
    error: Exception | None = None
    with isolate_rng():
        try:
            yield
        except Exception as caught:
            error = caught
    if error is not None:
        raise error
