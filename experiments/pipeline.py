"""The pipeline: teacher -> scores -> plan -> student -> distilled -> metrics and samples -> export.

Each stage writes one artefact, complete or absent, and is passed over where its artefact is already there: that is
all there is to resuming, but for the training itself, which resumes from its checkpoints.
"""

import contextlib
import hashlib
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from conf.schema import build
from criteria.base import SCORING_VERSION, check_scores
from criteria.selection import known
from experiments.dashboard import Dashboard
from experiments.report import report_run
from experiments.run import Run, cached, digest, effective, fingerprint, is_rank_zero, read_json, staged, write_json
from lightning_modules.backbones.unet import UNetBackbone, load_unet, weight_files
from lightning_modules.evaluation import Generation, JointLoss
from lightning_modules.export import export, verify
from lightning_modules.metrics.cost import latencies, peak_memory
from lightning_modules.metrics.frechet import Features, Statistics
from lightning_modules.scoring import score
from lightning_modules.training import WarmedUpEMA, accelerator_of, fit, make_trainer

NETWORKS = ("teacher", "pruned", "distilled")


class StaleArtefact(ValueError):
    """A stage's artefact belongs to another teacher, or to other scores."""


class OutOfMemory(RuntimeError):
    """The machine has too little memory for a stage; the message says what lowers it."""


def prune(cfg: DictConfig) -> None:
    """Run every stage of one job that is not there yet, and print its summary."""
    build(cfg.selection)  # what a user can get wrong fails here, before anything is read
    device = torch.device(accelerator_of(cfg.trainer.accelerator))
    teacher_id = fingerprint(weight_files(cfg.teacher.path), Path(cfg.paths.cache))
    run = Run(cfg, teacher_id)
    if run.finished and not cfg.force:
        print(f"finished already: {run.folder} (force=true runs it again)\n")
        print(read_json(run / "finished.json")["summary"])
        return
    with run.opened(), Dashboard(cfg, run) as dashboard:
        Job(cfg, run, teacher_id, device, dashboard).go()


class Job:
    """The stages of one run, and what they share."""

    def __init__(self, cfg: DictConfig, run: Run, teacher_id: str, device: torch.device, dashboard: Dashboard) -> None:
        self.cfg, self.run, self.teacher_id, self.device, self.dashboard = cfg, run, teacher_id, device, dashboard
        self.seconds: dict[str, float] = {}
        self.data = build(cfg.data)
        self.noise_scheduler = build(cfg.noise_scheduler)
        with self.stage("load the teacher"):
            self.teacher: UNetBackbone = build(cfg.teacher, noise_scheduler=self.noise_scheduler)
            self.units = self.teacher.units()
        self.check_data()
        self.distils = "_target_" in cfg.distillation

    def go(self) -> None:
        scores = self.scores()
        plan = self.plan(scores)
        pruned = self.student(plan)
        distilled = self.distil(pruned) if self.distils else pruned
        metrics = self.evaluate(plan, pruned, distilled)
        measured = self.measure(distilled)
        self.export(distilled, metrics, measured)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, and say what to do when it runs out of memory."""
        start = time.monotonic()
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            text = str(error).lower()
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in text and "not enough memory" not in text:
                raise
            cfg = self.cfg
            raise OutOfMemory(
                f"out of memory in stage {name!r} (peak so far {peak_memory(self.device) / 2**30:.1f} GiB; "
                f"data.batch_size={cfg.data.batch_size}, calibration.batch_size={cfg.calibration.batch_size}, "
                f"evaluation.batch_size={cfg.evaluation.batch_size}). Lower the batch size of that stage; "
                "trainer.accumulate_grad_batches keeps the effective batch, trainer.precision=bf16-mixed halves activations"
            ) from error
        self.seconds[name] = self.seconds.get(name, 0) + time.monotonic() - start

    def check_data(self) -> None:
        """Raise ValueError where the images are not what the teacher takes."""
        found, wanted = self.data.image_shape(), self.teacher.data_shape()
        if found != wanted:
            raise ValueError(
                f"data={self.cfg.data.get('name', '?')} has images of (channels, height, width) {found}, but the teacher takes {wanted}; "
                "resize or convert them in the data's configuration (size, mode), or choose another teacher"
            )

    # Scores and plan

    def scores(self) -> dict[str, dict[str, float]]:
        """Scores of all units; computed once per teacher, criterion and calibration, whatever the ratio or seed."""
        cfg, calibration = self.cfg, self.cfg.calibration
        criterion = build(cfg.criterion)
        batches = self.data.subset("train", calibration.samples, calibration.seed, calibration.batch_size)
        key = {
            "teacher": self.teacher_id,
            "criterion": effective(cfg)["criterion"],
            "units": [unit.name for unit in self.units],
            "calibration": effective(cfg)["calibration"],
            "data": content_hash(batches) if criterion.needs_data else None,
            "noise_scheduler": effective(cfg)["noise_scheduler"],
            "version": SCORING_VERSION,
        }
        path = self.run / "scores.json"
        if path.exists():
            stored = read_json(path)
            self.check_stale(path, "scores", stored["key"], digest(key))
            check_scores(stored["scores"], self.units)
            return stored["scores"]

        def compute() -> Any:
            trainer = make_trainer(cfg.trainer, "score units", calibration.precision, inference_mode=not criterion.needs_grad)
            return score(criterion, self.teacher, self.units, batches, trainer, calibration.seed)

        with self.stage("score units"):
            scores = cached(self.run.cache / "scores", key, compute)
        check_scores(scores, self.units)
        self.write(path, {"key": digest(key), "teacher": self.teacher_id, "criterion": cfg.criterion.name, "scores": scores})
        return scores

    def plan(self, scores: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Which units go, and how."""
        path, selection = self.run / "plan.json", build(self.cfg.selection)
        scores_key = digest(scores)
        if path.exists():
            plan = read_json(path)
            self.check_stale(path, "teacher", plan["teacher"], self.teacher_id)
            self.check_stale(path, "scores", plan["scores"], scores_key)
            known([change["unit"] for change in plan["changes"]], self.units, str(path))
            return plan
        with self.stage("select units"):
            totals = {"params": self.teacher.params(), "macs": self.teacher.macs().linear}
            flat = {name: entry["score"] for name, entry in scores.items()}
            removed = selection.select(self.units, flat, totals[selection.budget])
        plan = {
            "teacher": self.teacher_id,
            "scores": scores_key,
            "selection": effective(self.cfg)["selection"],
            "changes": [{"unit": name, "kind": "bypass"} for name in removed],
            "predicted_harm": float(sum(flat[name] for name in removed)),
        }
        self.write(path, plan)
        return plan

    def check_stale(self, path: Path, what: str, stored: str, wanted: str) -> None:
        if stored != wanted:
            raise StaleArtefact(f"{path} belongs to {what} {stored[:16]}, this run has {wanted[:16]}; delete it, or run with force=true")

    # Networks

    def student(self, plan: dict[str, Any]) -> UNetBackbone:
        """The pruned network before any training."""
        with self.stage("build the student"):
            pruned = self.teacher.pruned([change["unit"] for change in plan["changes"]])
            self.save_network(pruned, self.run / "student")
        return pruned

    def distil(self, pruned: UNetBackbone) -> UNetBackbone:
        """The student after distillation; its weights are the moving average's where that is on."""
        cfg, folder = self.cfg, self.run / "distilled"
        if not folder.exists():
            with self.stage("distil"):
                student = load_unet(str(self.run / "student"), self.noise_scheduler)
                module = build(
                    cfg.distillation, student=student, teacher=self.teacher, optimizer=build(cfg.optimizer),
                    lr_scheduler=build(cfg.lr_scheduler), seed=cfg.seed, dump=self.run / "failure",
                )()
                callbacks = [WarmedUpEMA(cfg.ema_decay)] if cfg.ema_decay is not None else []
                fit(module, self.data, cfg.trainer, self.run.folder, "distil", self.dashboard.loggers, callbacks)
                self.save_network(student, folder)
        return load_unet(str(folder), self.noise_scheduler)

    def save_network(self, network: UNetBackbone, folder: Path) -> None:
        if is_rank_zero() and not folder.exists():
            with staged(folder) as partial:
                network.save(partial)
        barrier()

    # Measuring

    def evaluate(self, plan: dict[str, Any], pruned: UNetBackbone, distilled: UNetBackbone) -> dict[str, Any]:
        """Quality of teacher, pruned and distilled network under one protocol; counts; nothing that depends on time."""
        cfg, path = self.cfg, self.run / "metrics.json"
        if path.exists():
            return read_json(path)
        networks = {"teacher": self.teacher, "pruned": pruned} | ({"distilled": distilled} if self.distils else {})
        metrics: dict[str, Any] = {
            "run_id": self.run.id,
            "plan/requested_ratio": cfg.selection.get("ratio"),
            "plan/budget": cfg.selection.budget,
            "plan/removed_units": len(plan["changes"]),
            "plan/predicted_harm": plan["predicted_harm"],
        }
        for name, network in (("teacher", self.teacher), ("student", pruned)):
            macs = network.macs()
            metrics |= {f"{name}/params": network.params(), f"{name}/macs": macs.linear, f"{name}/macs_attention": macs.attention}
        measure = cfg.selection.budget
        metrics["plan/achieved_ratio"] = 1 - metrics[f"student/{measure}"] / metrics[f"teacher/{measure}"]
        metrics["eval/weights"] = ("ema" if cfg.ema_decay is not None else "last") if self.distils else "pruned"

        held_out = self.data.subset("holdout", cfg.evaluation.loss_samples, cfg.evaluation.seed, cfg.evaluation.batch_size)
        for name, network in networks.items():
            if name == "teacher":
                continue
            with self.stage("measure losses"):
                module = JointLoss(network, self.teacher, cfg.evaluation.seed)
                make_trainer(cfg.trainer, f"loss of {name}", cfg.evaluation.precision).test(module, held_out, verbose=False)
                metrics |= {f"{name}/{key}": value for key, value in module.metrics.items() if key != "teacher_task_loss"}
                metrics["teacher/task_loss"] = module.metrics["teacher_task_loss"]
        if cfg.evaluation.metric is not None:
            metrics |= self.frechet({name: self.samples(name, network) for name, network in networks.items()})
        # "eval/..." is what the run delivers: one name for dashboards, whether it was distilled or not.
        final = "distilled" if self.distils else "pruned"
        metrics |= {f"eval/{key.split('/')[1]}": value for key, value in metrics.items() if key.startswith(f"{final}/")}
        self.write(path, metrics)
        return metrics

    def samples(self, name: str, network: UNetBackbone) -> np.ndarray:
        """Images of one network from the evaluation's seeds, uint8 (N,H,W,C); the teacher's are shared by all runs."""
        cfg, evaluation = self.cfg, self.cfg.evaluation
        protocol = {key: effective(cfg)[key] for key in ("sampler", "noise_scheduler")}
        protocol |= {"samples": evaluation.samples, "seed": evaluation.seed, "precision": evaluation.precision}
        folder = self.run / "samples" / name
        if name == "teacher":
            folder = self.run.cache / "samples" / digest({"teacher": self.teacher_id, **protocol})[:16]
        if not (folder / "images.npy").exists():
            with self.stage("generate"):
                seeds = evaluation.seed * 10_000_019 + torch.arange(evaluation.samples)
                batches = DataLoader(seeds, batch_size=evaluation.batch_size)  # type: ignore[arg-type]
                module = Generation(network, build(cfg.sampler.scheduler), cfg.sampler.steps)
                make_trainer(cfg.trainer, f"samples of {name}", evaluation.precision).test(module, batches, verbose=False)
                if is_rank_zero():
                    with staged(folder) as partial:
                        np.save(partial / "images.npy", module.images, allow_pickle=False)
                barrier()
        shown = self.run / "samples" / name
        if is_rank_zero() and not shown.exists():
            with staged(shown) as partial:
                shutil.copyfile(folder / "images.npy", partial / "images.npy")
        return np.load(folder / "images.npy", allow_pickle=False)

    def frechet(self, samples: dict[str, np.ndarray]) -> dict[str, Any]:
        """The Frechet distance of each set of samples from the training images, with its protocol."""
        cfg = self.cfg
        features: Features = build(cfg.evaluation.metric)
        with self.stage("compare distributions"), warnings.catch_warnings():
            warnings.simplefilter("once")
            reference = self.reference(features)
            metrics: dict[str, Any] = {
                f"{name}/{features.name}": Statistics.of(features(images), f"samples of {name}").distance(reference)
                for name, images in samples.items()
            }
        metrics["protocol"] = {
            "metric": features.name, "features": features.fingerprint(), "transform": features.transform,
            "samples": cfg.evaluation.samples, "reference_images": reference.count,
            "sampler": cfg.sampler.name, "steps": cfg.sampler.steps,
        }
        return metrics

    def reference(self, features: Features) -> Statistics:
        """Statistics of the training images: the data set's own file, else computed once and kept."""
        origin = {"features": features.fingerprint(), "transform": features.transform}
        if features.name in self.data.statistics:
            return Statistics.load(self.data.statistics[features.name], **origin)
        source = self.data.source("train")
        key = {"data": effective(self.cfg)["data"]["train"] if "train" in self.cfg.data else effective(self.cfg)["data"], "size": len(source), **origin}
        path = self.run.cache / "statistics" / f"{digest(key)[:16]}.safetensors"
        if not path.exists():
            print(f"statistics of {len(source)} training images for {features.name} ...", flush=True)
            parts = np.array_split(np.arange(len(source)), max(1, len(source) // 500))
            found = Statistics.of(np.concatenate([features(source.take(part)[0]) for part in parts]), "reference images")
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{os.getpid()}.{path.name}")
            found.save(partial, **origin)
            os.replace(partial, path)
        return Statistics.load(path, **origin)

    def measure(self, student: UNetBackbone) -> dict[str, Any]:
        """Latency of teacher and student, taken in turns, and the job's time and peak memory."""
        batch, repeats = self.cfg.evaluation.latency_batch, self.cfg.evaluation.latency_repeats
        with self.stage("time"):
            calls: dict[str, Callable[[], Any]] = {}
            for name, network in (("teacher", self.teacher), ("student", student)):
                inputs = network.to(self.device).eval().example_inputs(batch, self.device)
                calls[name] = lambda network=network, inputs=inputs: network.predict(inputs)
            times = latencies(calls, repeats, self.device)
        measured = {f"{name}/latency_ms": value for name, value in times.items()}
        measured |= {
            "latency_ratio": times["student"] / times["teacher"],
            "latency_batch": batch,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "peak_memory_bytes": peak_memory(self.device),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }
        return measured

    # The end

    def export(self, network: UNetBackbone, metrics: dict[str, Any], measured: dict[str, Any]) -> None:
        """Export, prove that it reloads, draw the report, and only then call the run finished."""
        if not is_rank_zero():
            return
        with self.stage("export"), staged(self.run / "export") as partial:
            export(network, partial)
            measured["export_max_difference"] = verify(network, partial)
        measured["seconds"]["export"] = round(self.seconds["export"], 2)
        self.write(self.run / "measured.json", measured)
        with self.stage("report"):
            summary = report_run(self.run.folder)
        self.dashboard.finish(metrics, measured)
        self.write(self.run / "finished.json", {"run_id": self.run.id, "summary": summary})
        print(f"\n{summary}")

    def write(self, path: Path, content: Any) -> None:
        if is_rank_zero():
            write_json(path, content)
        barrier()


def barrier() -> None:
    """Wait for the other ranks, where there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def content_hash(batches: DataLoader) -> str:
    """sha256 of the images of some batches."""
    total = hashlib.sha256()
    for batch in batches:
        total.update(batch["image"].numpy().tobytes())
    return total.hexdigest()
