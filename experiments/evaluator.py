"""The evaluation stage: one protocol for teacher, pruned and distilled network."""

import contextlib
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from conf.schema import build
from experiments.measures import TrainingImages, build_measures, check_measures, measured
from experiments.run import RESULT_VERSION, Run, barrier, digest, effective, is_rank_zero, locked, read_json, staged
from experiments.stages import Stages
from lightning_modules.backbones.diffusion import DiffusionBackbone
from lightning_modules.evaluation import Generation, JointLoss, seeds
from lightning_modules.metrics.cost import device_name, latencies, peak_memory
from lightning_modules.metrics.measures import Labels, Samples
from lightning_modules.training import make_trainer


class Evaluator:
    """Measures networks against the teacher and the training images, as `cfg.evaluation` says."""

    def __init__(
        self, cfg: DictConfig, run: Run, data: Any, teacher: DiffusionBackbone, teacher_id: str, stages: Stages
    ) -> None:
        self.cfg, self.run, self.data, self.stages = cfg, run, data, stages
        self.teacher, self.teacher_id = teacher, teacher_id
        self.measures = build_measures(cfg)
        if self.measures:
            check_measures(self.measures, self.shape(), self.asked_captions(), self.labels())

    def held_out(self) -> DataLoader:
        """The samples on which losses are measured."""
        evaluation = self.cfg.evaluation
        return self.data.subset("holdout", evaluation.loss_samples, evaluation.seed, evaluation.batch_size)

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
        """The caption of each sample: where there are fewer, they go round, as in `seeds`."""
        if self.prompts is None:
            return None
        return [self.prompts[k % len(self.prompts)] for k in range(self.cfg.evaluation.samples)]

    def labels(self) -> Labels:
        """The class of each sample, for class-conditional networks: that which they take for its seed."""
        if self.teacher.takes_text:
            return None
        evaluation = self.cfg.evaluation
        numbers = next(iter(seeds(evaluation.seed, evaluation.samples, evaluation.samples, None)))
        found = self.teacher.conditions(numbers, torch.device("cpu")).get("class_labels")
        return None if found is None else found.numpy()

    def metrics(self, plan: dict[str, Any], networks: dict[str, DiffusionBackbone]) -> dict[str, Any]:
        """Quality of teacher, pruned and distilled network; counts; nothing that depends on time."""
        cfg, path = self.cfg, self.run / "metrics.json"
        if path.exists():
            return read_json(path)
        budget = cfg.selection.get("budget", "params")
        final = "distilled" if "distilled" in networks else "pruned"
        metrics: dict[str, Any] = {
            "run_id": self.run.id,
            "plan/requested_ratio": cfg.selection.get("ratio"),
            "plan/budget": budget,
            "plan/removed_units": sum("unit" in change for change in plan["changes"]),
            "plan/predicted_harm": plan["predicted_harm"],
        }
        for name, network in (("teacher", self.teacher), ("student", networks["pruned"])):
            macs = network.macs()
            metrics |= {
                f"{name}/params": network.params(),
                f"{name}/macs": macs.linear,
                f"{name}/macs_attention": macs.attention,
            }
        if budget != "latency":  # that is measured, and stands in measured.json
            metrics["plan/achieved_ratio"] = 1 - metrics[f"student/{budget}"] / metrics[f"teacher/{budget}"]
        metrics["eval/weights"] = ("ema" if cfg.ema_decay is not None else "last") if final == "distilled" else "pruned"

        for name, network in networks.items():
            if name == "teacher":
                continue
            with self.stages("measure losses"):
                module = JointLoss(network, self.teacher, cfg.evaluation.seed)
                make_trainer(cfg.trainer, f"loss of {name}", cfg.evaluation.precision).test(
                    module, self.held_out(), verbose=False
                )
                metrics |= {
                    f"{name}/{key}": value for key, value in module.metrics.items() if key != "teacher_task_loss"
                }
                metrics["teacher/task_loss"] = module.metrics["teacher_task_loss"]
        if self.measures:
            metrics |= self.quality({name: self.samples(name, network) for name, network in networks.items()})
        # "eval/..." is what the run delivers: one name for dashboards, whether it was distilled or not.
        metrics |= {f"eval/{key.split('/')[1]}": value for key, value in metrics.items() if key.startswith(f"{final}/")}
        self.run.write("metrics.json", metrics)
        return metrics

    def samples(self, name: str, network: DiffusionBackbone) -> np.ndarray:
        """Images of one network from the evaluation's seeds, uint8 (N,H,W,C); the teacher's are shared by all runs."""
        cfg, evaluation = self.cfg, self.cfg.evaluation
        protocol = {key: effective(cfg)[key] for key in ("sampler", "noise_scheduler")}
        protocol |= {"samples": evaluation.samples, "seed": evaluation.seed, "precision": evaluation.precision}
        protocol["batch_size"] = evaluation.batch_size  # can move the last bit
        protocol["prompts"] = digest(self.prompts)
        protocol["size"] = [self.teacher.data_shape(), self.shape()]
        shown = self.run / "samples" / name
        if name == "teacher":  # shared by all runs, so made once, under a lock
            key = digest({"teacher": self.teacher_id, "version": RESULT_VERSION, **protocol})[:16]
            folder = self.run.cache / "samples" / key
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
        if (folder / "images.npy").exists():
            return
        with self.stages("generate"), staged(folder) if is_rank_zero() else contextlib.nullcontext() as partial:
            batches = seeds(evaluation.seed, evaluation.samples, evaluation.batch_size, self.prompts)
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

    def quality(self, images: dict[str, np.ndarray]) -> dict[str, Any]:
        """Every measure of each network's samples, with what has to agree for values to be comparable."""
        cfg, evaluation, device = self.cfg, self.cfg.evaluation, self.stages.device
        reference = TrainingImages(self.data, self.run.cache, device, evaluation.reference_images, evaluation.resize)
        metrics: dict[str, Any] = {}
        with self.stages("measure samples"):
            for name, found in images.items():
                samples = Samples(found, name, self.asked_captions(), self.labels(), device)
                metrics |= measured(self.measures, samples, reference)
        metrics["protocol"] = {
            "samples": evaluation.samples,
            "size": list(self.shape()),
            "resized": evaluation.resize is not None,
            "sampler": cfg.sampler.name,
            "steps": cfg.sampler.steps,
            "guidance": cfg.sampler.guidance,
            "prompts": None if self.prompts is None else f"{len(self.prompts)} ({digest(self.prompts)[:8]})",
            "measures": {
                name: {"better": measure.better, **measure.protocol(reference)}
                for name, measure in self.measures.items()
            },
        }
        return metrics

    def latency_achieved(self, ratio: float) -> dict[str, float]:
        """The built student's own share of a latency budget; says so where it is not what was asked for."""
        selection = self.cfg.selection
        if selection.get("budget") != "latency":
            return {}
        if not selection.ratio <= ratio <= selection.ratio + selection.tolerance:
            print(
                f"the built student saves {ratio:.3f} of the latency, selection.ratio={selection.ratio} (tolerance "
                f"{selection.tolerance}) was asked for: what units save alone did not add up"
            )
        return {"plan/achieved_ratio": ratio}

    def measured(self, student: DiffusionBackbone) -> dict[str, Any]:
        """Latency of teacher and student, taken in turns, and the job's time and peak memory."""
        device = self.stages.device
        batch, repeats = self.cfg.evaluation.latency_batch, self.cfg.evaluation.latency_repeats
        with self.stages("time"):
            calls: dict[str, Callable[[], Any]] = {}
            for name, network in (("teacher", self.teacher), ("student", student)):
                inputs = network.to(device).eval().example_inputs(batch, device)
                calls[name] = functools.partial(network.predict, inputs)
            times = latencies(calls, repeats, device)
        measured: dict[str, Any] = {f"{name}/latency_ms": value for name, value in times.items()}
        measured |= {
            "latency_ratio": times["student"] / times["teacher"],
            **self.latency_achieved(1 - times["student"] / times["teacher"]),
            "latency_batch": batch,
            "latency_precision": "float32",
            "device": device_name(device),
            "torch": str(torch.__version__),
            "peak_memory_bytes": peak_memory(device),
        }
        return measured


def link(path: Path, other: Path) -> None:
    """One file under two names, or a copy where the file system has no such thing."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)
