"""Runs the stages of a job, as `cfg.pipeline` lists them."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra.utils
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import checks
from conf.schema import ConfigError, build
from datamodules.base import DataModule
from experiments.engine.artefacts import read_json
from experiments.engine.clock import Clock
from experiments.engine.data_identity import check_data_unchanged, fingerprint_data
from experiments.engine.identity import fingerprint
from experiments.engine.inputs import build_data, load_teacher
from experiments.engine.interrupt import explain_interrupt
from experiments.engine.job import TEACHER, Job
from experiments.engine.provenance import collect_provenance
from experiments.engine.ranks import barrier, ignore_ranks_of_the_shell, is_rank_zero, join_ranks
from experiments.engine.run import Run
from experiments.engine.stage import Stage, check_names
from experiments.engine.sweep import SKIPPED, JobRecord
from experiments.reporting.dashboard import Dashboard, is_trial
from experiments.reporting.run_page import report_run
from experiments.tools.precompute import check_latents
from lightning_modules.backbones.files import list_weight_files
from lightning_modules.export.export import check_hub, push
from lightning_modules.metrics.cost import peak_memory
from lightning_modules.training.trainer import make_callbacks, make_trainer, resolve_accelerator

log = logging.getLogger(__name__)


def run_pipeline(cfg: DictConfig, record: JobRecord | None = None) -> float | None:
    """Run the stages of a job, unless the job is finished, and print its summary.

    `record` is that of a job of a sweep: the run's folder is noted there, and whether the run was finished before.

    Returns the first measure of the network that the job delivers, for sweepers that search; None on ranks other than
    rank 0.
    """
    ignore_ranks_of_the_shell(cfg.trainer.devices * cfg.trainer.num_nodes)
    stages = make_stages(cfg)
    device = torch.device(resolve_accelerator(cfg.trainer.accelerator))
    teacher_id = identify_teacher(cfg) if any(stage.needs_teacher for stage in stages) else "none"
    data = build_data(cfg)
    run = Run(cfg, teacher_id, fingerprint_data(cfg, data))
    record = record or JobRecord()
    record.update(run=str(run.folder))
    if run.finished and not cfg.force:
        check_data_unchanged(run.folder, run.fingerprints, cfg)
        record.update(state=SKIPPED)
        if not record.in_sweep:
            print_finished(run)
        if is_trial() and is_rank_zero():
            with Dashboard(cfg, run) as trial:
                trial.finish(read_json(run / "metrics.json"), read_json(run / "measured.json"))
        if cfg.export.push_to_hub is not None:
            check_push(run, cfg.export.push_to_hub)
    else:
        run_stages(cfg, run, stages, device, data, teacher_id)
    if not is_rank_zero():
        return None
    if cfg.export.push_to_hub is not None:
        print(f"pushed to {push(run / 'export', cfg.export.push_to_hub)}")
    return get_first_measure(read_json(run / "metrics.json"))


def print_finished(run: Run) -> None:
    """Print the summary of a run that was finished before."""
    print(f"finished already: {run.folder} (force=true runs it again)\n")
    print(read_json(run / "finished.json")["summary"])


def run_stages(
    cfg: DictConfig, run: Run, stages: Sequence[Stage], device: torch.device, data: DataModule, teacher_id: str
) -> None:
    """Run the stages of a job one after another; a stage whose artefacts exist loads them.

    Args:
        cfg: the job's configuration.
        run: its run, which is locked for other processes meanwhile.
        stages: what `make_stages` returned.
        device: the device of this process.
        data: the data module of `cfg.data`.
        teacher_id: fingerprint of the teacher; "none" in a pipeline without a teacher.
    """
    artefacts = [path for stage in stages for path in stage.artefacts()]
    with run.open(artefacts), contextlib.ExitStack() as dashboards:
        with run.discard_on_error():
            job = prepare(cfg, run, stages, device, data, teacher_id)
            dashboards.enter_context(job.dashboard)
        join_ranks(make_trainer(cfg.trainer, "", cfg.trainer.precision))
        for stage in stages:
            log.info("stage %s", stage.name)
            job.cfg = apply_settings(cfg, stage)
            with explain_interrupt(job, stage.name):
                stage.run(job)
            if stage.makes is not None and "sampler" in stage.settings:
                job.samplers[stage.makes] = job.cfg.sampler
        job.cfg = cfg
        conclude(job)


def check_push(run: Run, repository: str) -> None:
    """Raise ValueError if the export of a finished run cannot be pushed to `repository`.

    Logs a warning that lists exported files changed since the run wrote them.
    """
    if is_rank_zero():
        check_hub(repository)
        if files := run.list_changes().get("export"):
            log.warning("%s is pushed as it is, but the run has written other files: %s", run / "export", files)


def make_stages(cfg: DictConfig) -> list[Stage]:
    """Return the stages of `cfg.pipeline` in their order, linked to the stages that they depend on.

    Raises ConfigError or ValueError for mistakes that the configuration alone shows.
    """
    nodes = {name: node for name, node in cfg.pipeline.stages.items() if node is not None}
    if not nodes:
        raise ConfigError("pipeline.stages is empty; choose a pipeline of conf/pipeline/, such as pipeline=prune")
    stages: list[Stage] = []
    for name, node in nodes.items():
        stage = hydra.utils.instantiate(node, _recursive_=False, _convert_="all")
        if not isinstance(stage, Stage):
            raise ConfigError(
                f"pipeline.stages.{name}._target_={node._target_}: it is no Stage (experiments/engine/stage.py)"
            )
        stage.name = str(name)
        stage.prepare(apply_settings(cfg, stage))
        stages.append(stage)
    for number, stage in enumerate(stages):
        stage.link(stages[:number])
        stage.followers = stages[number + 1 :]
    check_names(stages)
    for field, choice in (("push_to_hub", "null"), ("onnx", "false")):
        value = cfg.export[field]
        if value not in (None, False) and not any("export" in stage.artefacts() for stage in stages):
            raise ConfigError(
                f"export.{field}={value!r}: no stage of this pipeline makes an export; choose {choice}, or a pipeline "
                "with the stage `export`"
            )
    return stages


def apply_settings(cfg: DictConfig, stage: Stage) -> DictConfig:
    """Return the configuration of one stage: the job's, changed by the stage's own settings.

    Raises ConfigError naming the stage where its settings cannot be applied.
    """
    if not stage.settings:
        return cfg
    merged = cfg.copy()
    try:
        for group, change in stage.settings.items():
            if isinstance(change, dict) and "_target_" not in change and isinstance(merged.get(group), DictConfig):
                drop_replaced(merged[group], change)
                change = OmegaConf.merge(merged[group], change)
            merged[group] = change
        checks.check_config(merged)
    except (ValueError, OmegaConfBaseException) as error:
        raise ConfigError(f"pipeline.stages.{stage.name}.settings: {error}") from error
    return merged


def drop_replaced(node: DictConfig, change: dict[str, Any]) -> None:
    """Set those parts of a node to null which a change with a `_target_` replaces, so that no field of them stays."""
    for key, part in change.items():
        if isinstance(part, dict) and isinstance(node.get(key), DictConfig):
            if "_target_" in part:
                node[key] = None
            else:
                drop_replaced(node[key], part)


def identify_teacher(cfg: DictConfig) -> str:
    """Return the fingerprint of the teacher's files, without loading its weights."""
    files = list_weight_files(cfg.teacher.path, cfg.teacher.get("tokenizer"), cfg.teacher.get("get"))
    return fingerprint(files, Path(cfg.paths.cache))


def prepare(
    cfg: DictConfig, run: Run, stages: Sequence[Stage], device: torch.device, data: DataModule, teacher_id: str
) -> Job:
    """Load what all stages share, and check every stage; raises ValueError for everything that would fail later.

    Args:
        cfg: the job's configuration.
        run: the run, which is locked for other processes.
        stages: the stages of the job.
        device: the device of this process.
        data: the data module of `cfg.data`.
        teacher_id: fingerprint of the teacher's files.
    """
    job: Job
    clock = Clock(cfg, device, run.measured.get("seconds"), lambda seconds: job.record(seconds=seconds))
    data.sample_shape()  # raises an error for a wrong path or column before any weight is read
    for line in data.describe() if is_rank_zero() else ():
        log.info(line)
    job = Job(cfg, run, device, clock, Dashboard(cfg, run), data, teacher_id)
    if any(stage.needs_teacher for stage in stages):
        with clock("load the teacher"):
            job.networks[TEACHER] = load_teacher(cfg, teacher_id)
    for stage in stages:
        job.cfg = apply_settings(cfg, stage)
        stage.check(job)
    if any(stage.needs_teacher for stage in stages) and job.teacher.generates:
        check_latents(cfg, data, job.teacher)
    for stage_cfg in {id(cfg): cfg for cfg in (apply_settings(cfg, stage) for stage in stages)}.values():
        check_parts(stage_cfg, job.networks.get(TEACHER))
    job.dashboard.open_loggers()  # last, as a logger may tell a server about this job
    return job


def conclude(job: Job) -> None:
    """Write the report, upload the summary to the dashboard, and mark the run as finished."""
    if is_rank_zero():
        run, metrics = job.run, job.metrics
        job.record(peak_memory_bytes=peak_memory(job.device), provenance=collect_provenance())
        summary = f"{run.folder}: {metrics}"
        if (run / "plan.json").exists():
            with job.clock("report"):
                summary = report_run(run.folder)
        job.dashboard.finish(metrics, run.measured)
        run.write_on_rank_zero("finished.json", {"run_id": run.id, "summary": summary})
        print(f"\n{summary}")
    barrier()


def get_first_measure(metrics: dict[str, Any]) -> float | None:
    """Return the first of `evaluation.metrics` of the network that a run delivers, else its output loss.

    After a pretraining it is the first figure of metrics.json; None where there is none.
    """
    names = [f"eval/{name}" for name in metrics.get("protocol", {}).get("measures", ())]
    figures = [key for key, value in metrics.items() if isinstance(value, float) and "/" not in key]
    return next((float(metrics[key]) for key in (*names, "eval/output_loss", *figures) if key in metrics), None)


def check_parts(cfg: DictConfig, teacher: Any) -> None:
    """Build optimiser, schedule, trainers, callbacks and sampler as a trial; raises ConfigError naming the group.

    `teacher` is None where no stage needs one. Only networks that generate samples need a sampler.
    """
    weight = torch.nn.Parameter(torch.zeros(1))
    trials: dict[str, Callable[[], Any]] = {
        "optimizer and lr_scheduler": lambda: build(cfg.lr_scheduler)(build(cfg.optimizer)([weight])),
        "trainer": lambda: [
            make_trainer(cfg.trainer, "", cfg.trainer.precision, **build(cfg.trainer.options)),
            make_trainer(cfg.trainer, "", cfg.evaluation.precision),
        ],
        "callbacks": lambda: make_callbacks(cfg.callbacks),
    }
    if teacher is not None and teacher.generates:
        trials["sampler"] = lambda: [
            teacher.check_sampler(build(cfg.sampler.scheduler), steps)
            for steps in (cfg.sampler.steps, *cfg.sampler.also_steps)
        ]
    for group, make in trials.items():
        try:
            make()
        except Exception as error:
            raise ConfigError(f"{group} cannot be made as configured: {error}") from error
