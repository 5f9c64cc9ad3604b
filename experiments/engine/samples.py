"""Samples of diffusion networks for an evaluation, from the same seeds for all of them, and the measures of samples."""

import contextlib
import filecmp
import functools
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from conf.schema import ROOT, build
from experiments.engine.artefacts import digest, read_array, write_folder
from experiments.engine.cache import is_intact, lock_entry, write_shared_folder
from experiments.engine.identity import RESULT_VERSION, get_effective_settings
from experiments.engine.job import Job
from experiments.engine.measures import TrainingImages, check_measures, measure_samples
from experiments.engine.ranks import ask_rank_zero, barrier, is_rank_zero
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.metrics.protocol import Labels, Measure, Samples
from lightning_modules.modules.sampling import Generation, seed_batches
from lightning_modules.training.trainer import make_trainer, resolve_precision

log = logging.getLogger(__name__)

SHIPPED = ROOT / "assets" / "samples"
"""Samples of embedded teachers that come with this repository, in a folder per protocol, named as in the cache."""


class SampleEvaluation:
    """Generates the samples of networks as `cfg.evaluation` says, and measures them.

    Raises ValueError naming a measure that cannot be taken of such samples.
    """

    def __init__(self, job: Job, measures: dict[str, Measure]) -> None:
        self.job, self.cfg, self.data, self.measures = job, job.cfg, job.data, measures
        self.teacher: Any = job.teacher
        evaluation = self.cfg.evaluation
        self.reference = TrainingImages(
            job.data, job.run.cache, job.device, evaluation.reference_images, evaluation.resize
        )
        check_measures(measures, self.get_shape(), self.list_captions(), self.list_labels())

    def get_shape(self) -> tuple[int, int, int]:
        """Return (channels, height, width) of the samples as they are stored."""
        shape, size = self.teacher.image_shape(), self.cfg.evaluation.resize
        return shape if size is None else (shape[0], size, size)

    @functools.cached_property
    def prompts(self) -> list[str] | None:
        """The different captions that samples are generated from; None for networks that take no text."""
        if not self.teacher.takes_text:
            return None
        evaluation = self.cfg.evaluation
        if evaluation.prompts is not None:
            return build(evaluation.prompts)[: evaluation.samples]
        return self.data.captions("holdout", evaluation.samples)

    def list_captions(self) -> list[str] | None:
        """Return the caption of each sample; prompts repeat where there are fewer, as in `seed_batches`."""
        if self.prompts is None:
            return None
        return [self.prompts[k % len(self.prompts)] for k in range(self.cfg.evaluation.samples)]

    def list_labels(self) -> Labels:
        """Return the class that a class-conditional network gives each sample, by its seed; None for other networks."""
        if self.teacher.takes_text:
            return None
        evaluation = self.cfg.evaluation
        batch = next(iter(seed_batches(evaluation.seed, evaluation.samples, evaluation.samples, None)))
        labels = self.teacher.conditions(batch, torch.device("cpu")).get("class_labels")
        return None if labels is None else labels.numpy()

    def list_samplings(self, networks: Mapping[str, Any]) -> dict[str, tuple[Any, DictConfig]]:
        """Return {name: (network, group `sampler`)} of all samples to generate.

        The name is the network's, or `<network>-<steps>-step` for each of `sampler.also_steps`. A network of a stage
        with a sampler of its own is sampled by that.
        """
        samplings = {}
        for name, network in networks.items():
            sampler = self.job.samplers.get(name, self.cfg.sampler)
            samplings[name] = (network, sampler)
            for steps in sampler.also_steps:
                samplings[f"{name}-{steps}-step"] = (network, OmegaConf.merge(sampler, {"steps": steps}))
        return samplings

    def load_samples(self, name: str, network: DiffusionBackbone, sampler: DictConfig) -> np.ndarray:
        """Return samples of one network, uint8 (N,H,W,C), generated if need be; all runs share the teacher's.

        `name` is that of the samples in the run's folder.
        """
        run_folder = folder = self.job.run / "samples" / name
        if network is self.teacher:  # one job at a time generates them
            folder = self.job.run.cache / "samples" / self.hash_protocol(sampler.steps)
            with lock_entry(folder):
                if self.job.device.type == "cpu":  # a GPU makes the teacher's samples as it makes the others
                    copy_shipped_samples(folder)
                self.generate(name, network, sampler, folder)
        else:
            self.generate(name, network, sampler, folder)
        images = folder / "images.npy"
        if is_rank_zero() and not is_same_file(images, run_folder / images.name):
            with write_folder(run_folder) as partial:
                link_or_copy(images, partial / images.name)
        return read_array(images)

    def hash_protocol(self, steps: int) -> str:
        """Return a hash of all that the teacher's samples in some steps depend on, the name of their shared folder."""
        cfg, evaluation = self.cfg, self.cfg.evaluation
        settings = get_effective_settings(cfg)
        key = {
            "teacher": self.job.teacher_id,
            "version": RESULT_VERSION,
            "sampler": {key: value for key, value in settings["sampler"].items() if key != "also_steps"}
            | {"steps": steps},
            "noise_scheduler": settings["noise_scheduler"],
            "samples": evaluation.samples,
            "seed": evaluation.seed,
            "precision": resolve_precision(evaluation.precision, self.job.device.type),
            "batch_size": evaluation.batch_size,  # can change the last bit
            "prompts": digest(self.prompts),
            "size": [self.teacher.data_shape(), self.get_shape()],
        }
        return digest(key)[:16]

    def generate(self, name: str, network: DiffusionBackbone, sampler: DictConfig, folder: Path) -> None:
        """Write images.npy into `folder`, unless it is there."""
        cfg, evaluation = self.cfg, self.cfg.evaluation
        if ask_rank_zero((folder / "images.npy").exists() and is_intact(folder)):
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.job.clock("generate"))
            partial = None
            if is_rank_zero():
                shared = network is self.teacher
                partial = stack.enter_context(
                    write_shared_folder(folder) if shared else self.job.run.write_folder(f"samples/{name}")
                )
            module = self.make_generation(network, sampler, None if partial is None else partial / "images.npy")
            trainer = make_trainer(cfg.trainer, f"samples of {name}", evaluation.precision)
            trainer.test(module, self.make_batches(), verbose=False)
        barrier()

    def generate_without_files(self, network: DiffusionBackbone) -> np.ndarray:
        """Return the samples of a network, uint8 (N,H,W,C), all generated on this rank and without a Trainer."""
        module = self.make_generation(network, self.cfg.sampler)
        return np.concatenate([module.generate_images(batch) for batch in self.make_batches()])

    def make_generation(self, network: DiffusionBackbone, sampler: DictConfig, file: Path | None = None) -> Generation:
        """Return the module that generates samples as `sampler` says, and writes them to `file`."""
        size = self.cfg.evaluation.resize
        return Generation(network, build(sampler.scheduler), sampler.steps, sampler.guidance, size=size, file=file)

    def make_batches(self) -> DataLoader:
        """Return the batches of seeds, and of captions where there are any."""
        evaluation = self.cfg.evaluation
        return seed_batches(evaluation.seed, evaluation.samples, evaluation.batch_size, self.prompts)

    def measure(self, networks: Mapping[str, Any]) -> dict[str, float]:
        """Return {name/measure: value} of the samples of each network; the names are those of `list_samplings`."""
        samplings = self.list_samplings(networks)
        images = {name: self.load_samples(name, *sampling) for name, sampling in samplings.items()}
        values: dict[str, float] = {}
        with self.job.clock("measure samples"):
            for name, images_NHWC in images.items():
                samples = Samples(images_NHWC, name, self.list_captions(), self.list_labels(), self.job.device)
                values |= measure_samples(self.measures, samples, self.reference)
        return values

    def describe(self, networks: Mapping[str, Any]) -> dict[str, Any]:
        """Return how samples are generated, the part of the protocol that all measures of samples share.

        Values of any measure can only be compared where it agrees. Samples that are generated in another way than most
        are in "samplers", by the names of `list_samplings`.
        """
        sampler = self.cfg.sampler
        others = {
            name: {"sampler": other.name, "steps": other.steps, "guidance": other.guidance}
            for name, (_, other) in self.list_samplings(networks).items()
            if name not in networks or name in self.job.samplers
        }
        return {
            "samples": self.cfg.evaluation.samples,
            "size": list(self.get_shape()),
            "resized": self.cfg.evaluation.resize is not None,
            "sampler": sampler.name,
            "steps": sampler.steps,
            "guidance": sampler.guidance,
            "prompts": None if self.prompts is None else f"{len(self.prompts)} ({digest(self.prompts)[:8]})",
            **({"samplers": others} if others else {}),
        }


def copy_shipped_samples(folder: Path) -> None:
    """Copy samples that come with this repository into the cache, if there are any for this protocol and none yet."""
    shipped = SHIPPED / folder.name
    if is_rank_zero() and shipped.exists() and not folder.exists():
        log.info("the teacher's samples are those in %s", shipped)
        with write_shared_folder(folder) as partial:
            shutil.copyfile(shipped / "images.npy", partial / "images.npy")


def is_same_file(path: Path, other: Path) -> bool:
    """Return whether two paths lead to one file, or to files of one content."""
    return other.exists() and (os.path.samefile(path, other) or filecmp.cmp(path, other, shallow=False))


def link_or_copy(path: Path, new_path: Path) -> None:
    """Give a file a second name by a hard link, or copy it where the file system has none."""
    try:
        os.link(path, new_path)
    except OSError:
        shutil.copyfile(path, new_path)
