"""What diffusion networks draw for an evaluation, from the same seeds for all of them, and the measures of that."""

import contextlib
import functools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conf.schema import build
from experiments.engine.artefacts import digest, staged
from experiments.engine.cache import is_intact, locked, shared_folder
from experiments.engine.identity import RESULT_VERSION, effective
from experiments.engine.job import TEACHER, Job
from experiments.engine.measures import TrainingImages, check_measures, measured
from experiments.engine.ranks import agreed, barrier, is_rank_zero
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.metrics.protocol import Labels, Measure, Samples
from lightning_modules.modules.sampling import Generation, seed_batches
from lightning_modules.training.trainer import make_trainer, precision_of


class Drawn:
    """Samples of networks as `cfg.evaluation` says; raises ValueError naming a measure that cannot be taken of them."""

    def __init__(self, job: Job, measures: dict[str, Measure]) -> None:
        self.job, self.cfg, self.data, self.measures = job, job.cfg, job.data, measures
        self.teacher: Any = job.teacher
        evaluation = self.cfg.evaluation
        self.reference = TrainingImages(
            job.data, job.run.cache, job.device, evaluation.reference_images, evaluation.resize
        )
        check_measures(measures, self.shape(), self.asked_captions(), self.labels())

    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the samples, as they are kept."""
        shape, size = self.teacher.image_shape(), self.cfg.evaluation.resize
        return shape if size is None else (shape[0], size, size)

    @functools.cached_property
    def prompts(self) -> list[str] | None:
        """The captions that samples are asked for by, one after another, for networks that take text."""
        if not self.teacher.takes_text:
            return None
        evaluation = self.cfg.evaluation
        if evaluation.prompts is not None:
            return build(evaluation.prompts)[: evaluation.samples]
        return self.data.captions("holdout", evaluation.samples)

    def asked_captions(self) -> list[str] | None:
        """The caption of each sample: where there are fewer, they go round, as in `seed_batches`."""
        if self.prompts is None:
            return None
        return [self.prompts[k % len(self.prompts)] for k in range(self.cfg.evaluation.samples)]

    def labels(self) -> Labels:
        """The class of each sample, for class-conditional networks: that which they take for its seed."""
        if self.teacher.takes_text:
            return None
        evaluation = self.cfg.evaluation
        numbers = next(iter(seed_batches(evaluation.seed, evaluation.samples, evaluation.samples, None)))
        found = self.teacher.conditions(numbers, torch.device("cpu")).get("class_labels")
        return None if found is None else found.numpy()

    def samples(self, name: str, network: DiffusionBackbone) -> np.ndarray:
        """Images of one network from the evaluation's seeds, uint8 (N,H,W,C); the teacher's are shared by all runs."""
        cfg, evaluation = self.cfg, self.cfg.evaluation
        protocol = {key: effective(cfg)[key] for key in ("sampler", "noise_scheduler")}
        precision = precision_of(evaluation.precision, self.job.device.type)
        protocol |= {"samples": evaluation.samples, "seed": evaluation.seed, "precision": precision}
        protocol["batch_size"] = evaluation.batch_size  # can move the last bit
        protocol["prompts"] = digest(self.prompts)
        protocol["size"] = [self.teacher.data_shape(), self.shape()]
        shown = self.job.run / "samples" / name
        if name == TEACHER:  # shared by all runs, so made once, under a lock
            key = digest({"teacher": self.job.teacher_id, "version": RESULT_VERSION, **protocol})[:16]
            folder = self.job.run.cache / "samples" / key
            with locked(folder):
                self.generate(name, network, folder)
        else:
            folder = shown
            self.generate(name, network, folder)
        if is_rank_zero() and not shown.exists():
            with staged(shown) as partial:
                link(folder / "images.npy", partial / "images.npy")
        return np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)

    def generate(self, name: str, network: DiffusionBackbone, folder: Path) -> None:
        """Write images.npy into `folder`, unless it is there."""
        cfg, evaluation = self.cfg, self.cfg.evaluation
        if agreed((folder / "images.npy").exists() and is_intact(folder)):
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.job.clock("generate"))
            partial = None
            if is_rank_zero():
                staged = shared_folder(folder) if name == TEACHER else self.job.run.staged(f"samples/{name}")
                partial = stack.enter_context(staged)
            batches = seed_batches(evaluation.seed, evaluation.samples, evaluation.batch_size, self.prompts)
            module = Generation(
                network,
                build(cfg.sampler.scheduler),
                cfg.sampler.steps,
                cfg.sampler.guidance,
                size=evaluation.resize,
                file=None if partial is None else partial / "images.npy",
            )
            trainer = make_trainer(cfg.trainer, f"samples of {name}", evaluation.precision)
            trainer.test(module, batches, verbose=False)
        barrier()

    def values(self, networks: Mapping[str, Any]) -> dict[str, float]:
        """Every measure of each network's samples, {network/measure: value}."""
        images = {name: self.samples(name, network) for name, network in networks.items()}
        found: dict[str, float] = {}
        with self.job.clock("measure samples"):
            for name, each in images.items():
                samples = Samples(each, name, self.asked_captions(), self.labels(), self.job.device)
                found |= measured(self.measures, samples, self.reference)
        return found

    def protocol(self) -> dict[str, Any]:
        """How samples are drawn: what has to agree for values of any measure to be comparable."""
        sampler = self.cfg.sampler
        return {
            "samples": self.cfg.evaluation.samples,
            "size": list(self.shape()),
            "resized": self.cfg.evaluation.resize is not None,
            "sampler": sampler.name,
            "steps": sampler.steps,
            "guidance": sampler.guidance,
            "prompts": None if self.prompts is None else f"{len(self.prompts)} ({digest(self.prompts)[:8]})",
        }


def link(path: Path, other: Path) -> None:
    """One file under two names, or a copy where the file system has no such thing."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)
