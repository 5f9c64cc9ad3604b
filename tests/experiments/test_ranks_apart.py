"""Ranks that are not at the same place: one is late, sees a file that another does not see yet, or has ended."""

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities import rank_zero_only
from support.jobs import QUICK_END
from support.ranks import two_ranks
from support.results import the_run

from conf.schema import ROOT
from experiments.engine import pipeline, ranks
from experiments.engine.artefacts import read_json, write_json
from experiments.engine.clock import Clock
from experiments.engine.pipeline import run_pipeline
from experiments.engine.ranks import ignore_ranks_of_the_shell, is_rank_zero
from experiments.engine.run import Run
from experiments.engine.samples import SampleEvaluation
from experiments.engine.stages import score as score_stage
from experiments.engine.texts import Texts


@pytest.fixture
def job(overrides: list[str]) -> list[str]:
    """A job that makes scores, plan and student without a Trainer."""
    return [*overrides, "criterion=magnitude"]


ON_TWO = ["trainer=ddp", "trainer.accelerator=cpu"]


def call_late(run: Run, method: Callable[..., Any], *arguments: Any) -> Any:
    """Call a method of a run, a second late on rank 0."""
    time.sleep(is_rank_zero())
    return method(run, *arguments)


def pruned(rank: int, cfg: DictConfig) -> None:
    run_pipeline(cfg)
    assert torch.distributed.get_world_size() == 2


@pytest.mark.slow
def test_a_rank_waits_for_the_student_that_rank_0_writes(configure, job, tmp_path):
    late = {"experiments.engine.run.Run.write_folder": functools.partialmethod(call_late, Run.write_folder)}
    with two_ranks(pruned, configure(*job, *ON_TWO), patches=QUICK_END | late):
        pass
    assert (the_run(tmp_path / "runs") / "finished.json").exists()


def note_and_meet(folder: Path, meet: Callable[..., None], trainer: Any) -> None:
    """Meet the other rank; rank 1 leaves a file behind before."""
    if not is_rank_zero():
        (folder / "rank 1 goes").touch()
    meet(trainer)


def clean_late(run: Run, folder: Path, clean: Callable[..., None]) -> None:
    """Clean a run's folder a second after rank 1 could begin to read."""
    until = time.monotonic() + 20
    while is_rank_zero() and not (folder / "rank 1 goes").exists() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(is_rank_zero())
    clean(run)


@pytest.mark.slow
def test_a_rank_of_a_forced_job_reads_nothing_of_the_old_run(configure, job, tmp_path, quick_end):
    run_pipeline(configure(*job))
    run = the_run(tmp_path / "runs")
    before = read_json(run / "scores.json")
    write_json(run / "scores.json", before | {"key": "of another teacher"})
    patches = {
        "experiments.engine.pipeline.join_ranks": functools.partial(note_and_meet, tmp_path, pipeline.join_ranks),
        "experiments.engine.run.Run.clean": functools.partialmethod(clean_late, tmp_path, Run.clean),
    }
    with two_ranks(pruned, configure(*job, *ON_TWO, "force=true"), patches=QUICK_END | patches):
        pass
    assert read_json(run / "scores.json") == before


def note_and_ask(folder: Path, cached: Callable[..., Any], *arguments: Any) -> Any:
    """Ask for cached scores; each rank leaves a file behind before."""
    (folder / f"rank {int(not is_rank_zero())} asks").touch()
    return cached(*arguments)


def refuse_to_score(*_: Any) -> None:
    pytest.fail("scores are there")


@pytest.mark.slow
def test_ranks_agree_on_scores_that_another_job_has_just_made(configure, overrides, tmp_path, quick_end):
    """Rank 0 waits for that job; before that, rank 1 sees no scores."""
    job = [*overrides, "distillation=none", "evaluation.loss_samples=4"]
    run_pipeline(configure(*job))
    (scores,) = tmp_path.glob("runs/.cache/scores/*.json")
    patches = {
        "experiments.engine.stages.score.cached": functools.partial(note_and_ask, tmp_path, score_stage.cached),
        "experiments.engine.stages.score.score": refuse_to_score,
    }
    other = scores.rename(tmp_path / "other.json")
    with (
        FileLock(scores.with_suffix(".lock")) as lock,
        two_ranks(pruned, configure(*job, *ON_TWO, "selection.ratio=0.4"), patches=QUICK_END | patches),
    ):
        while len(list(tmp_path.glob("rank * asks"))) < 2:
            time.sleep(0.01)
        time.sleep(0.5)
        other.rename(scores)
        lock.release()
    assert len(list(tmp_path.glob("runs/debug/*/finished.json"))) == 2


def test_a_leftover_rank_is_ignored_on_one_device(configure, job, tmp_path, monkeypatch, caplog, quick_end):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as Lightning's import would have found it
    run_pipeline(configure(*job, "distillation=none"))
    assert (the_run(tmp_path / "runs") / "finished.json").exists()
    assert "RANK, LOCAL_RANK of the environment is ignored, as trainer.devices=1" in caplog.text


def test_each_task_of_a_slurm_job_can_run_a_job_of_its_own(monkeypatch):
    for name, value in (("SLURM_PROCID", "3"), ("SLURM_LOCALID", "3"), ("SLURM_NTASKS", "4"), ("SLURM_JOB_ID", "7")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    ignore_ranks_of_the_shell(processes=2)
    assert not is_rank_zero()
    ignore_ranks_of_the_shell(processes=1)
    assert is_rank_zero() and not SLURMEnvironment.detect() and os.environ["SLURM_JOB_ID"] == "7"


def test_a_waiting_rank_names_the_file(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ranks, "PATIENCE", 0.0)
    monkeypatch.setattr(ranks.time, "sleep", lambda _: (tmp_path / "plan.json").touch())
    monkeypatch.setattr(ranks, "PARENT_PID", os.getppid())
    ranks.wait_for(tmp_path / "plan.json")
    assert f"this rank waits for rank 0, which is to write {tmp_path}/plan.json" in caplog.text


def generated(rank: int, folder: Path) -> None:
    """Ask for samples where only rank 0 sees some."""
    torch.distributed.init_process_group("gloo")
    sampling = object.__new__(SampleEvaluation)
    sampling.cfg = OmegaConf.create({"evaluation": {}})
    sampling.generate("teacher", None, None, folder / str(rank))  # type: ignore[arg-type]


def test_ranks_agree_on_samples_that_only_rank_0_can_see(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "images.npy").touch()
    with two_ranks(generated, tmp_path):
        pass


def wrote(rank: int, run: Run) -> None:
    """Ask for what a teacher writes."""
    torch.distributed.init_process_group("gloo")
    texts = object.__new__(Texts)
    texts.cfg = OmegaConf.create({"evaluation": {"tokens": 2, "precision": "32-true"}})
    texts.teacher_key, texts.prompts = {}, ["one"]
    cpu = torch.device("cpu")
    texts.job = SimpleNamespace(run=run, device=cpu, clock=Clock(texts.cfg, cpu))
    for _ in range(2):
        texts.write("teacher", SimpleNamespace(write=lambda prompts, *_: [f"{prompts[0]} two"]))


def test_two_ranks_share_the_texts_of_a_language_model(configure, job, tmp_path):
    run = Run(configure(*job), "teacher")
    run.folder.mkdir(parents=True)
    with two_ranks(wrote, run):
        pass
    assert read_json(run / "samples" / "teacher" / "texts.json")["texts"] == ["one two"]
    assert len(list(run.cache.glob("texts/*.json"))) == 1


WAIT = """
import os, sys, time
from pathlib import Path
from experiments.engine.ranks import wait_for
folder, parent = Path(sys.argv[1]), os.getppid()
(folder / "started").touch()
while os.getppid() == parent and "late" in sys.argv:
    time.sleep(0.01)
wait_for(folder / "plan.json")
"""


@pytest.mark.parametrize("when", ["late", "early"])
@pytest.mark.slow
def test_a_rank_stops_waiting_for_a_process_that_has_ended(tmp_path, when):
    started = tmp_path / "started"
    rank = f"'{sys.executable}' -c '{WAIT}' '{tmp_path}' {when}"
    script = f"{rank} & while [ ! -e '{started}' ]; do sleep 0.1; done; sleep 0.5"
    done = subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert f"RuntimeError: the process that was to write {tmp_path}/plan.json has ended" in done.stderr
