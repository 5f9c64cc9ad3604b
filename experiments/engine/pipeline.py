"""The pipeline: teacher -> scores -> plan -> student -> distilled -> metrics and samples -> export.

Each stage writes one artefact, complete or absent, and is passed over where its artefact is already there: that is
all there is to resuming, but for the training itself, which resumes from its checkpoints.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from conf.schema import ConfigError, build
from criteria.base import SCORING_VERSION, check_scores
from criteria.scores.bottleneck import Bottleneck
from criteria.selection.base import Budgeted, Pool, known
from criteria.selection.bk_sdm import BkSdm
from criteria.selection.refined import Refined
from experiments.engine.artefacts import digest, read_json, staged, write_json
from experiments.engine.cache import cached
from experiments.engine.clock import Stages
from experiments.engine.evaluation import Evaluator
from experiments.engine.identity import effective, fingerprint
from experiments.engine.inputs import batches_for, data_of, teacher_of
from experiments.engine.measures import check_network_measures, of_networks
from experiments.engine.ranks import agreed, barrier, is_rank_zero, meet, wait_for
from experiments.engine.run import Run
from experiments.engine.training import train
from experiments.reporting.card import model_card
from experiments.reporting.dashboard import Dashboard
from experiments.reporting.page import report_run
from experiments.tools.precompute import check_latents
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone, is_flow
from lightning_modules.backbones.diffusion.restage import student_config
from lightning_modules.backbones.diffusion.unet import UNetBackbone
from lightning_modules.backbones.files import weight_files
from lightning_modules.backbones.loading import load_network
from lightning_modules.export.export import check_hub, dense_twin, export, push
from lightning_modules.export.verify import verify
from lightning_modules.metrics.unit_latency import unit_savings
from lightning_modules.modules.distillation import check_levels
from lightning_modules.modules.joint_loss import JointMeasure
from lightning_modules.modules.scoring import score
from lightning_modules.training.trainer import accelerator_of, autocast, make_trainer, precision_of


class StaleArtefact(ValueError):
    """A stage's artefact belongs to another teacher, or to other scores."""


def prune(cfg: DictConfig) -> None:
    """Run every stage of one job that is not there yet, and print its summary."""
    build(cfg.selection)  # a ratio out of range fails before anything is read
    device = torch.device(accelerator_of(cfg.trainer.accelerator))
    files = weight_files(cfg.teacher.path, cfg.teacher.get("tokenizer"), cfg.teacher.get("get"))
    teacher_id = fingerprint(files, Path(cfg.paths.cache))
    run = Run(cfg, teacher_id)
    if run.finished and not cfg.force:
        print(f"finished already: {run.folder} (force=true runs it again)\n")
        print(read_json(run / "finished.json")["summary"])
    else:
        with run.opened(), Dashboard(cfg, run) as dashboard:
            Job(cfg, run, teacher_id, device, dashboard).go()
    if cfg.export.push_to_hub is not None and is_rank_zero():
        print(f"pushed to {push(run / 'export', cfg.export.push_to_hub)}")


class Job:
    """The stages of one run, and what they share."""

    def __init__(self, cfg: DictConfig, run: Run, teacher_id: str, device: torch.device, dashboard: Dashboard) -> None:
        self.cfg, self.run, self.teacher_id, self.dashboard = cfg, run, teacher_id, dashboard
        self.stages = Stages(cfg, device, run / "seconds.json")
        self.data = data_of(cfg)
        self.data.sample_shape()  # a wrong path or column is said before any weight is read
        self.criterion, self.selection = build(cfg.criterion), build(cfg.selection)
        with self.stages("load the teacher"):
            self.teacher = teacher_of(cfg)
        self.check_criterion()
        calibration = cfg.calibration
        self.teacher.memory_bound = None if calibration.memory_gib is None else int(calibration.memory_gib * 2**30)
        self.teacher.compiled = {} if calibration.compile else None
        self.units = self.teacher.units(self.criterion.level)
        self.evaluator = Evaluator(cfg, run, self.data, self.teacher, teacher_id, self.stages)
        self.distils = "_target_" in cfg.distillation
        self.check()

    def go(self) -> None:
        meet(make_trainer(self.cfg.trainer, "", self.cfg.trainer.precision))
        scores = self.scores() if self.selection.needs_scores else {}
        plan = self.plan(scores)
        pruned = self.student(plan)
        distilled = self.distil(plan) if self.distils else pruned
        networks = {"teacher": self.teacher, "pruned": pruned} | ({"distilled": distilled} if self.distils else {})
        metrics = self.evaluator.metrics(plan, networks)
        if is_rank_zero():
            self.export(distilled, plan, metrics, self.evaluator.measured(distilled))
        barrier()

    def check_criterion(self) -> None:
        names = f"criterion={self.cfg.criterion.name} cannot score teacher={self.cfg.teacher.get('name', '?')}"
        if reason := self.criterion.supports(self.teacher):
            raise ValueError(f"{names}: {reason}")

    def check(self) -> None:
        """Raise ValueError for whatever would fail later, after the expensive parts."""
        cfg = self.cfg
        data_sets = {"data": self.data}
        if cfg.calibration.data is not None:
            data_sets["calibration.data"] = self.calibration_data
        for field, data in data_sets.items():
            try:
                self.teacher.check_data(data)
            except ValueError as error:
                name = OmegaConf.select(cfg, field + ".name")
                raise ValueError(f"{field}={name}: {error}") from error
        if cfg.calibration.data is not None:  # a text that scores were made on is no measure, either
            measures = self.evaluator.measures
            check_network_measures(of_networks(measures), list(measures), self.teacher, self.calibration_data)
        if isinstance(self.teacher, DiffusionBackbone):
            check_latents(cfg, self.data, self.teacher)
        self.evaluator.held_out()
        check_parts(cfg, getattr(self.teacher, "noise_scheduler", None))
        bypasses = self.criterion.level == "depth" and not isinstance(self.selection, BkSdm)
        if cfg.export.dense_twin and not (bypasses and self.teacher.library == "diffusers"):
            raise ValueError(
                "export.dense_twin=true: only a plan that bypasses whole blocks of a diffusion network has such a "
                "twin; choose false"
            )
        if isinstance(self.selection, BkSdm):
            if not isinstance(self.teacher, UNetBackbone):
                raise ValueError("selection.name='bk_sdm' is for the U-Nets of Stable Diffusion; choose knapsack")
            student_config(self.teacher.network.config, self.selection.variant)
        elif not isinstance(self.selection, Budgeted) or self.selection.budget != "latency":
            self.selection.check(self.pool())
        else:  # what units save is measured later
            self.selection.staying(self.units)
            if self.criterion.level == "channel":
                raise ValueError(
                    "selection.budget='latency' is for blocks and operators; of channels choose params, macs, or for "
                    "image classifiers flops"
                )
        if cfg.export.push_to_hub is not None:
            check_hub(cfg.export.push_to_hub)
        if self.distils:
            narrower = self.criterion.level == "channel" and self.teacher.width_changes_stages
            if narrower and cfg.distillation.get("w_feat"):
                raise ValueError(
                    f"distillation.w_feat={cfg.distillation.w_feat}: a student with fewer channels has no feature maps "
                    "like the teacher's; choose distillation=task_only, output_only or none"
                )
            self.data.train_dataloader()
            if cfg.distillation.get("lora") is not None:
                build(cfg.distillation.lora).check(self.teacher.network)
            check_levels(self.teacher, **{key: cfg.distillation.get(key) for key in ("normalization", "taps")})
        if self.selection.needs_scores:
            self.batches()
        if isinstance(self.selection, Refined):
            self.calibration_batches()

    @functools.cached_property
    def calibration_data(self) -> Any:
        node = self.cfg.calibration.data
        return self.data if node is None else build(node)

    def calibration_batches(self) -> DataLoader:
        calibration = self.cfg.calibration
        # Spread where a part of the batches has to speak for all: timesteps go with the samples' numbers.
        stepwise = isinstance(self.criterion, Bottleneck) and isinstance(self.teacher, DiffusionBackbone)
        spread = stepwise or self.cfg.criterion.get("stable_for") is not None
        return self.calibration_data.subset(
            "train",
            calibration.samples,
            calibration.seed,
            calibration.batch_size,
            spread=spread,
            augment=calibration.augment,
            field="calibration.samples",
        )

    def batches(self) -> DataLoader | None:
        """What the criterion looks at: calibration samples, or seeds; None where it looks at nothing."""
        needs = self.criterion.needs
        if needs == "nothing":
            return None
        calibration = self.calibration_batches() if needs == "data" else None
        return batches_for(self.criterion, self.cfg, self.teacher, self.calibration_data, calibration)

    # Scores and plan

    def scores(self) -> dict[str, dict[str, float]]:
        """Scores of all units; computed once per teacher, criterion and calibration, whatever the ratio or seed."""
        cfg, calibration = self.cfg, self.cfg.calibration
        criterion, fields = self.criterion, effective(cfg)
        batches = self.batches()
        precision = precision_of(calibration.precision, self.stages.device.type)
        key = {
            "teacher": self.teacher_id,
            "options": {k: v for k, v in fields["teacher"].items() if k not in ("name", "path")},
            "criterion": fields["criterion"],
            "files": fingerprint(criterion.files(), self.run.cache),
            "units": [unit.name for unit in self.units],
            "calibration": {k: v for k, v in fields["calibration"].items() if k != "data"} | {"precision": precision},
            "data": None if batches is None else content_hash(batches),  # whatever its name
            "noise_scheduler": fields["noise_scheduler"],
            "ranks": cfg.trainer.devices * cfg.trainer.num_nodes if fields["criterion"].get("stable_for") else None,
            "version": SCORING_VERSION,
        }
        path = self.run / "scores.json"
        if agreed(path.exists()):
            stored = read_json(path)
            self.check_stale(path, "scores", stored["key"], digest(key))
            check_scores(stored["scores"], self.units)
            return stored["scores"]

        def compute() -> Any:
            trainer = make_trainer(
                cfg.trainer, "score units", calibration.precision, inference_mode=not criterion.needs_grad
            )
            return score(criterion, self.teacher, self.units, batches, trainer, calibration.seed)

        with self.stages("score units"):
            scores = cached(self.run.cache / "scores", key, compute)
        check_scores(scores, self.units)
        self.run.write(
            path.name,
            {"key": digest(key), "teacher": self.teacher_id, "criterion": cfg.criterion.name, "scores": scores},
        )
        return scores

    def pool(self, savings: dict[str, int] | None = None) -> Pool:
        """What can be removed, and what everything costs."""
        teacher = self.teacher
        totals = teacher.totals()
        if savings is not None:
            totals["latency"] = savings.pop("")
        level = self.criterion.level
        return Pool(self.units, totals, teacher.shared(level), savings, teacher.cost if level == "channel" else None)

    def plan(self, scores: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Which units go, and how."""
        path = self.run / "plan.json"
        scores_key = digest(scores)
        if path.exists():
            plan = read_json(path)
            self.check_stale(path, "teacher", plan["teacher"], self.teacher_id)
            self.check_stale(path, "scores", plan["scores"], scores_key)
            known([change["unit"] for change in plan["changes"] if "unit" in change], self.units, str(path))
            return plan
        if not is_rank_zero():  # what is measured may differ between ranks, so one of them plans for all
            wait_for(path)
            return read_json(path)
        pool = self.pool(self.savings() if self.selection.budget == "latency" else None)
        with self.stages("select units"):
            flat = {name: entry["score"] for name, entry in scores.items()}
            changes = self.selection.changes(pool, flat, lambda names: self.joint_loss(names))
        plan = {
            "teacher": self.teacher_id,
            "scores": scores_key,
            "selection": effective(self.cfg)["selection"],
            "changes": changes,
            "protected": self.selection.staying(self.units) if isinstance(self.selection, Budgeted) else [],
            "predicted_harm": float(sum(flat[change["unit"]] for change in changes if "unit" in change)),
        }
        self.run.clear("config.yaml", "scores.json", "seconds.json", "wandb")  # the rest was made from another plan
        write_json(path, plan)
        return plan

    def savings(self) -> dict[str, int]:
        """Measured microseconds that each unit's removal saves; under "" those of the whole network."""
        with self.stages("time units"):  # in float32, as the student is timed in the end
            return unit_savings(self.teacher, self.units, self.cfg.evaluation, self.stages.device)

    @functools.cached_property
    def joint_loss(self) -> Callable[[Sequence[str]], float]:
        """measure(names): the measured output loss without all of these units, on the calibration samples."""
        calibration, device = self.cfg.calibration, self.stages.device
        measure = JointMeasure(self.teacher, self.calibration_batches(), calibration.seed, device)

        def measured(names: Sequence[str]) -> float:
            with autocast(calibration.precision, device):
                return measure(names)

        return measured

    def check_stale(self, path: Path, what: str, stored: str, wanted: str) -> None:
        if stored != wanted:
            raise StaleArtefact(
                f"{path} belongs to {what} {stored[:16]}, this run has {wanted[:16]}; delete it (what was made from it "
                "goes, too), or run with force=true"
            )

    # Networks

    def student(self, plan: dict[str, Any]) -> NetworkBackbone:
        """The pruned network before any training."""
        with self.stages("build the student"):
            pruned = self.teacher.pruned(plan["changes"])
            self.save_network(pruned, self.run / "student")
        return pruned

    def distil(self, plan: dict[str, Any]) -> NetworkBackbone:
        """The student after distillation; its weights are the moving average's where that is on."""
        cfg, folder = self.cfg, self.run / "distilled"
        if not folder.exists():
            with self.stages("distil"):
                student = self.teacher.adopt(load_network(self.run / "student"), plan["changes"])
                networks = {"student": student, "teacher": self.teacher}
                module = train(cfg, cfg.distillation, self.run, self.data, "distil", self.dashboard, **networks)
                self.save_network(module.result(), folder)
        return self.teacher.adopt(load_network(folder), plan["changes"])

    def save_network(self, network: NetworkBackbone, folder: Path) -> None:
        if not is_rank_zero():
            wait_for(folder)
        elif not folder.exists():
            with staged(folder) as partial:
                network.save(partial)

    # The end

    def export(
        self, network: NetworkBackbone, plan: dict[str, Any], metrics: dict[str, Any], measured: dict[str, Any]
    ) -> None:
        """Export, prove that it reloads, draw the report, and only then call the run finished; rank 0 alone."""
        cfg = self.cfg.export
        with self.stages("export"), staged(self.run / "export") as partial:
            scores = read_json(self.run / "scores.json")["scores"] if (self.run / "scores.json").exists() else {}
            export(network, partial, model_card(self.cfg, plan, scores, metrics, network))
            measured["export_max_difference"] = verify(network, partial)
            if cfg.dense_twin:
                dense_twin(self.teacher, network).save_pretrained(partial / "dense_twin")
        measured["seconds"] = self.stages.seconds
        write_json(self.run / "measured.json", measured)
        with self.stages("report"):
            summary = report_run(self.run.folder)
        self.dashboard.finish(metrics, measured)
        write_json(self.run / "finished.json", {"run_id": self.run.id, "summary": summary})
        print(f"\n{summary}")


def check_parts(cfg: DictConfig, noise_scheduler: Any) -> None:
    """Make optimiser, schedule, trainers and sampler once for nothing; raises ConfigError naming the group.

    `noise_scheduler` is None for networks without one, which need no sampler.
    """
    weight = torch.nn.Parameter(torch.zeros(1))
    tries: dict[str, Callable[[], Any]] = {
        "optimizer and lr_scheduler": lambda: build(cfg.lr_scheduler)(build(cfg.optimizer)([weight])),
        "trainer": lambda: [
            make_trainer(cfg.trainer, "", p) for p in (cfg.trainer.precision, cfg.evaluation.precision)
        ],
    }
    if noise_scheduler is not None:
        tries["sampler"] = lambda: check_sampler(build(cfg.sampler.scheduler)(noise_scheduler.config), noise_scheduler)
    for group, make in tries.items():
        try:
            make()
        except Exception as error:
            raise ConfigError(f"{group} cannot be made as configured: {error}") from error


def check_sampler(sampler: Any, noise_scheduler: Any) -> None:
    """Raise ValueError where one of the two is a flow and the other is not: samples would be wrong without a word."""
    if is_flow(sampler) != is_flow(noise_scheduler):
        kind, choice = (
            ("is a flow", "flow_euler") if is_flow(noise_scheduler) else ("is no flow", "dpm_solver, ddim, ...")
        )
        raise ValueError(f"{type(sampler).__name__} does not fit this teacher, which {kind}; choose sampler={choice}")


HASHED = 64
"""batches, evenly spaced, that stand for all calibration batches in the key of their scores"""


def content_hash(batches: DataLoader) -> str:
    """sha256 of images, labels, captions, seeds: of all batches up to HASHED, else of so many, evenly spaced."""
    several = list(batches.batch_sampler)  # type: ignore[arg-type]
    chosen = several[:: -(-len(several) // HASHED)]
    total = hashlib.sha256()
    for batch in DataLoader(
        batches.dataset, batch_sampler=chosen, num_workers=batches.num_workers, collate_fn=batches.collate_fn
    ):
        for name in sorted(batch):
            value = batch[name]
            total.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return total.hexdigest()
