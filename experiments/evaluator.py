"""The evaluation stage: one protocol for teacher, pruned and distilled network."""

import functools
import hashlib
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
from experiments.run import RESULT_VERSION, Run, barrier, digest, effective, is_rank_zero, locked, read_json, staged
from experiments.stages import Stages
from lightning_modules.backbones.diffusion import DiffusionBackbone
from lightning_modules.evaluation import Generation, JointLoss, seeds
from lightning_modules.metrics.cost import device_name, latencies, peak_memory
from lightning_modules.metrics.frechet import Features, Statistics
from lightning_modules.training import make_trainer


class Evaluator:
    """Measures networks against the teacher and the training images, as `cfg.evaluation` says."""

    def __init__(
        self, cfg: DictConfig, run: Run, data: Any, teacher: DiffusionBackbone, teacher_id: str, stages: Stages
    ) -> None:
        self.cfg, self.run, self.data, self.stages = cfg, run, data, stages
        self.teacher, self.teacher_id = teacher, teacher_id
        self.features: Features | None = build(cfg.evaluation.metric) if cfg.evaluation.metric is not None else None
        if self.features is not None:
            self.features.check(teacher.image_shape())

    def held_out(self) -> DataLoader:
        """The samples on which losses are measured."""
        evaluation = self.cfg.evaluation
        return self.data.subset("holdout", evaluation.loss_samples, evaluation.seed, evaluation.batch_size)

    def prompts(self) -> list[str] | None:
        """The held-out captions, for networks that take text."""
        return self.data.source("holdout").captions if self.teacher.takes_text else None

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
        if self.features is not None:
            metrics |= self.frechet(
                self.features, {name: self.samples(name, network) for name, network in networks.items()}
            )
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
        protocol["prompts"] = digest(self.prompts())
        protocol["size"] = self.teacher.data_shape()
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
                shutil.copyfile(folder / "images.npy", partial / "images.npy")
        return np.load(folder / "images.npy", allow_pickle=False)

    def generate(self, name: str, network: DiffusionBackbone, folder: Path) -> None:
        """Write images.npy into `folder`, unless it is there."""
        cfg, evaluation = self.cfg, self.cfg.evaluation
        if (folder / "images.npy").exists():
            return
        with self.stages("generate"):
            batches = seeds(evaluation.seed, evaluation.samples, evaluation.batch_size, self.prompts())
            module = Generation(network, build(cfg.sampler.scheduler), cfg.sampler.steps, cfg.sampler.guidance)
            trainer = make_trainer(cfg.trainer, f"samples of {name}", evaluation.precision)
            trainer.test(module, batches, verbose=False)
            if is_rank_zero():
                with staged(folder) as partial:
                    np.save(partial / "images.npy", module.images, allow_pickle=False)
            barrier()

    def frechet(self, features: Features, samples: dict[str, np.ndarray]) -> dict[str, Any]:
        """The Frechet distance of each set of samples from the training images, with its protocol."""
        cfg = self.cfg
        with self.stages("compare distributions"):
            reference = self.reference(features)
            metrics: dict[str, Any] = {
                f"{name}/{features.name}": Statistics.of(
                    features(images, self.stages.device), f"samples of {name}"
                ).distance(reference)
                for name, images in samples.items()
            }
        metrics["protocol"] = {
            "metric": features.name,
            "features": features.fingerprint(),
            "transform": features.transform,
            "samples": cfg.evaluation.samples,
            "reference_images": reference.count,
            "sampler": cfg.sampler.name,
            "steps": cfg.sampler.steps,
            "guidance": cfg.sampler.guidance,
        }
        return metrics

    def reference(self, features: Features) -> Statistics:
        """Statistics of the training images: the data set's own file, else computed once and kept."""
        origin = {"features": features.fingerprint(), "transform": features.transform}
        if features.name in self.data.statistics:
            return Statistics.load(self.data.statistics[features.name], **origin)
        source = self.data.source("train")
        some = source.take(np.linspace(0, len(source) - 1, min(len(source), 256)).astype(int))["image"]
        content = hashlib.sha256(some.tobytes()).hexdigest()  # tells data apart that stand under the same name
        key = {"content": content, "size": len(source), "version": RESULT_VERSION, **origin}
        path = self.run.cache / "statistics" / f"{digest(key)[:16]}.safetensors"
        if not path.exists():
            print(f"statistics of {len(source)} training images for {features.name} ...", flush=True)
            parts = np.array_split(np.arange(len(source)), max(1, len(source) // 500))
            found = Statistics.of(
                np.concatenate([features(source.take(part)["image"], self.stages.device) for part in parts]),
                "reference images",
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{os.getpid()}.{path.name}")
            found.save(partial, **origin)
            os.replace(partial, path)
        return Statistics.load(path, **origin)

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
