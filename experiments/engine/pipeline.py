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

from conf import schema
from conf.schema import ConfigError, build
from experiments.engine.artefacts import read_json
from experiments.engine.clock import Clock
from experiments.engine.identity import fingerprint
from experiments.engine.inputs import data_of, teacher_of
from experiments.engine.interrupt import explained_interrupt
from experiments.engine.job import TEACHER, Job
from experiments.engine.provenance import provenance
from experiments.engine.ranks import barrier, ignore_ranks_of_the_shell, is_rank_zero, meet
from experiments.engine.run import Run
from experiments.engine.stage import Stage, check_names
from experiments.reporting.dashboard import Dashboard
from experiments.reporting.run_page import report_run
from experiments.tools.precompute import check_latents
from lightning_modules.backbones.files import list_weight_files
from lightning_modules.export.export import check_hub, push
from lightning_modules.metrics.cost import peak_memory
from lightning_modules.training.trainer import accelerator_of, make_callbacks, make_trainer

log = logging.getLogger(__name__)


def run_pipeline(cfg: DictConfig) -> float | None:
    """Run every stage of a job whose artefacts are not there yet, and print the job's summary.

    Returns the first measure of what the job delivers, for sweepers that search; None on ranks other than the first.
    """
    ignore_ranks_of_the_shell(cfg.trainer.devices * cfg.trainer.num_nodes)
    stages = make_stages(cfg)
    device = torch.device(accelerator_of(cfg.trainer.accelerator))
    teacher_id = identify_teacher(cfg) if any(stage.needs_teacher for stage in stages) else "none"
    run = Run(cfg, teacher_id)
    if run.finished and not cfg.force:
        print(f"finished already: {run.folder} (force=true runs it again)\n")
        print(read_json(run / "finished.json")["summary"])
        if cfg.export.push_to_hub is not None:
            check_push(run, cfg.export.push_to_hub)
    else:
        run_stages(cfg, run, stages, device, teacher_id)
    if not is_rank_zero():
        return None
    if cfg.export.push_to_hub is not None:
        print(f"pushed to {push(run / 'export', cfg.export.push_to_hub)}")
    return first_measure(read_json(run / "metrics.json"))


def run_stages(cfg: DictConfig, run: Run, stages: Sequence[Stage], device: torch.device, teacher_id: str) -> None:
    """Run the stages one after another; those whose artefacts are there load them.

    Args:
        cfg: the job's configuration.
        run: its run, which no other process works on meanwhile.
        stages: what `make_stages` returned.
        device: the device of this process.
        teacher_id: fingerprint of the teacher; "none" in a pipeline without a teacher.
    """
    artefacts = [path for stage in stages for path in stage.artefacts()]
    with run.opened(artefacts), contextlib.ExitStack() as dashboards:
        with run.discarded_on_error():
            job = prepare(cfg, run, stages, device, teacher_id)
            dashboards.enter_context(job.dashboard)
        meet(make_trainer(cfg.trainer, "", cfg.trainer.precision))
        for stage in stages:
            log.info("stage %s", stage.name)
            job.cfg = with_settings(cfg, stage)
            with explained_interrupt(job, stage.name):
                stage.run(job)
        job.cfg = cfg
        conclude(job)


def check_push(run: Run, repository: str) -> None:
    """Raise ValueError where the export of a finished run cannot be pushed; log which of its files have changed."""
    if is_rank_zero():
        check_hub(repository)
        if files := run.list_changes().get("export"):
            log.warning("%s is pushed as it is, but the run has written other files: %s", run / "export", files)


def make_stages(cfg: DictConfig) -> list[Stage]:
    """Return the stages of `cfg.pipeline` in their order, each with its name and what it uses of those before it.

    Raises ConfigError or ValueError for what can be told from the configuration alone.
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
        stage.prepare(with_settings(cfg, stage))
        stages.append(stage)
    for place, stage in enumerate(stages):
        stage.link(stages[:place])
        stage.followers = stages[place + 1 :]
    check_names(stages)
    if cfg.export.push_to_hub is not None and not any("export" in stage.artefacts() for stage in stages):
        raise ConfigError(
            f"export.push_to_hub={cfg.export.push_to_hub!r}: no stage of this pipeline makes an export; choose null, "
            "or a pipeline with the stage `export`"
        )
    return stages


def with_settings(cfg: DictConfig, stage: Stage) -> DictConfig:
    """Return the configuration of one stage: the job's, with the stage's own settings."""
    if not stage.settings:
        return cfg
    merged = cfg.copy()
    try:
        for group, change in stage.settings.items():
            if isinstance(change, dict) and "_target_" not in change and isinstance(merged.get(group), DictConfig):
                change = OmegaConf.merge(merged[group], change)
            merged[group] = change
        schema.check(merged)
    except (ValueError, OmegaConfBaseException) as error:
        raise ConfigError(f"pipeline.stages.{stage.name}.settings: {error}") from error
    return merged


def identify_teacher(cfg: DictConfig) -> str:
    """Return the fingerprint of the teacher's files, without reading a weight into memory."""
    files = list_weight_files(cfg.teacher.path, cfg.teacher.get("tokenizer"), cfg.teacher.get("get"))
    return fingerprint(files, Path(cfg.paths.cache))


def prepare(cfg: DictConfig, run: Run, stages: Sequence[Stage], device: torch.device, teacher_id: str) -> Job:
    """Load what all stages share, and check every stage; raises ValueError for whatever would fail later."""
    job: Job
    clock = Clock(cfg, device, run.measured.get("seconds"), lambda seconds: job.record(seconds=seconds))
    data = data_of(cfg)
    data.sample_shape()  # a wrong path or column is said before any weight is read
    job = Job(cfg, run, device, clock, Dashboard(cfg, run), data, teacher_id)
    if any(stage.needs_teacher for stage in stages):
        with clock("load the teacher"):
            job.networks[TEACHER] = teacher_of(cfg)
    for stage in stages:
        job.cfg = with_settings(cfg, stage)
        stage.check(job)
    if any(stage.needs_teacher for stage in stages) and job.teacher.generates:
        check_latents(cfg, data, job.teacher)
    for each in {id(settings): settings for settings in (with_settings(cfg, stage) for stage in stages)}.values():
        check_parts(each, job.networks.get(TEACHER))
    job.dashboard.open_loggers()  # last, as a logger may tell a server about this job
    return job


def conclude(job: Job) -> None:
    """Draw the report, close the dashboard's summary, and call the run finished."""
    if is_rank_zero():
        run, metrics = job.run, job.metrics
        job.record(peak_memory_bytes=peak_memory(job.device), provenance=provenance())
        summary = f"{run.folder}: {metrics}"
        if (run / "plan.json").exists():
            with job.clock("report"):
                summary = report_run(run.folder)
        job.dashboard.finish(metrics, run.measured)
        run.write_alone("finished.json", {"run_id": run.id, "summary": summary})
        print(f"\n{summary}")
    barrier()


def first_measure(metrics: dict[str, Any]) -> float | None:
    """Return the first of `evaluation.metrics` of what a run delivers, else its output loss, else its first figure."""
    names = [f"eval/{name}" for name in metrics.get("protocol", {}).get("measures", ())]
    figures = [key for key, value in metrics.items() if isinstance(value, float) and "/" not in key]
    return next((float(metrics[key]) for key in (*names, "eval/output_loss", *figures) if key in metrics), None)


def check_parts(cfg: DictConfig, teacher: Any) -> None:
    """Make optimiser, schedule, trainers and sampler once for nothing; raises ConfigError naming the group.

    `teacher` is None where no stage needs one. Only networks that generate samples need a sampler.
    """
    weight = torch.nn.Parameter(torch.zeros(1))
    tries: dict[str, Callable[[], Any]] = {
        "optimizer and lr_scheduler": lambda: build(cfg.lr_scheduler)(build(cfg.optimizer)([weight])),
        "trainer": lambda: [
            make_trainer(cfg.trainer, "", cfg.trainer.precision, **build(cfg.trainer.options)),
            make_trainer(cfg.trainer, "", cfg.evaluation.precision),
        ],
        "callbacks": lambda: make_callbacks(cfg.callbacks),
    }
    if teacher is not None and teacher.generates:
        tries["sampler"] = lambda: teacher.check_sampler(build(cfg.sampler.scheduler), cfg.sampler.steps)
    for group, make in tries.items():
        try:
            make()
        except Exception as error:
            raise ConfigError(f"{group} cannot be made as configured: {error}") from error
