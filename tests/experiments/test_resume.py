"""The same command again goes on where the last one stopped, and ends in the same bits."""

import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pytorch_lightning import Trainer
from support.results import differences, files, read_repeatable_history, results, the_run, trained_state

from conf.schema import ROOT
from experiments.engine.artefacts import read_json
from experiments.engine.pipeline import run_pipeline
from lightning_modules.training.checkpoints import CorruptCheckpoint

pytestmark = pytest.mark.usefixtures("quick_end")


def moved(overrides: list[str], runs: Path) -> list[str]:
    """The same job below another folder."""
    return [*(override for override in overrides if not override.startswith("paths.runs=")), f"paths.runs={runs}"]


# A process that is killed


def kill_when(condition: Callable[[], bool], command: list[str], log: Path, seconds: float = 1500) -> str:
    """Start a process, kill it (SIGKILL) as soon as the condition holds; returns what it had printed."""
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    give_up = time.monotonic() + seconds
    try:
        while not condition():
            assert process.poll() is None, f"the job ended before it could be killed:\n{log.read_text()}"
            assert time.monotonic() < give_up, f"the job never got there:\n{log.read_text()}"
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    return log.read_text()


@pytest.mark.slow
def test_a_job_killed_three_times_ends_in_the_same_bits(
    configure,
    sampling,
    data_folder,
    tmp_path,
):
    job = [
        *sampling,
        "calibration.samples=24",
        "calibration.batch_size=1",
        "trainer.steps=60",
        "trainer.checkpoint_every=5",
        "sampler.steps=30",
        "evaluation.batch_size=1",
    ]
    run_pipeline(configure(*moved(job, tmp_path / "undisturbed")))
    undisturbed = the_run(tmp_path / "undisturbed")

    runs = tmp_path / "killed"
    run, cache = runs / "debug" / undisturbed.name, runs / ".cache"
    command = [sys.executable, str(ROOT / "train.py"), "--config-dir", str(data_folder), *moved(job, runs)]

    kill_when(lambda: any(cache.glob("scores/*.lock")), command, tmp_path / "scoring.log")
    assert not list(cache.glob("scores/*.json")) and not (run / "scores.json").exists(), "killed too late"

    kill_when(lambda: any(run.glob("checkpoints/distil/*.ckpt")), command, tmp_path / "training.log")
    assert (run / "networks" / "pruned").exists() and not (run / "networks" / "distilled").exists(), "killed too late"

    printed = kill_when(lambda: (run / "samples" / "pruned").exists(), command, tmp_path / "evaluating.log")
    assert re.search(r"distil: resuming from step \d+ of 60 \(step=\d+\.ckpt\)", printed)
    assert not (run / "samples" / "distilled").exists() and not (run / "metrics.json").exists(), "killed too late"

    run_pipeline(configure(*moved(job, runs)))
    assert the_run(runs) == run
    assert differences(results(run), results(undisturbed)) == []
    assert {name for name in files(run) if not name.startswith("checkpoints/")} == {
        name for name in files(undisturbed) if not name.startswith("checkpoints/")
    }
    history = pd.read_csv(run / "history" / "distil.csv")
    assert not history.duplicated(["step", "name"]).any()


def test_partial_files_of_a_killed_process_are_removed(configure, overrides, tmp_path):
    cfg = configure(*overrides)
    run_pipeline(cfg)
    run = the_run(tmp_path / "runs")
    (run / "finished.json").unlink()
    complete = files(run) | {"finished.json"}
    for name in ("networks/.pruned.abcdefg1", "samples/.pruned.abcdefg2", ".metrics.json.abcdefg3"):
        (run / name).mkdir(parents=True)
        (run / name / "part").touch()
    run_pipeline(cfg)
    assert files(run) == complete


# In one process


class Stopped(BaseException):
    """As if the process had ended here."""


@pytest.mark.slow
def test_a_job_stopped_after_each_of_its_artefacts_ends_in_the_same_bits(configure, sampling, tmp_path, monkeypatch):
    run_pipeline(configure(*moved(sampling, tmp_path / "undisturbed")))
    runs, replace, stopped_at = tmp_path / "stopped", os.replace, []

    def replace_and_stop(source: Any, target: Any) -> None:
        replace(source, target)
        if Path(target).is_relative_to(runs) and str(target) not in stopped_at:
            stopped_at.append(str(target))
            raise Stopped

    monkeypatch.setattr(os, "replace", replace_and_stop)
    cfg = configure(*moved(sampling, runs))
    for _ in range(40):
        try:
            run_pipeline(cfg)
            break
        except Stopped:
            pass
    run, undisturbed = the_run(runs), the_run(tmp_path / "undisturbed")
    artefacts = (
        "scores.json plan.json networks/pruned networks/distilled metrics.json export measured.json finished.json"
    )
    artefacts += " samples/teacher samples/pruned samples/distilled"
    artefacts += " checkpoints/distil/step=0000002.ckpt checkpoints/distil/step=0000004.ckpt"
    artefacts += " history/distil.csv .holder.json .manifest.json config.yaml data.json"
    inside = {Path(path).relative_to(run).as_posix() for path in stopped_at if Path(path).is_relative_to(run)}
    assert inside == set(artefacts.split())
    assert differences(results(run), results(undisturbed)) == []
    assert files(run) == files(undisturbed)
    assert files(runs / ".cache") == files(tmp_path / "undisturbed" / ".cache")


BASES: dict[tuple[str, ...], Path] = {}
"""Finished runs, by what was asked for beyond the usual: made once for all tests."""


@pytest.fixture
def trained(configure, overrides, tmp_path_factory, monkeypatch):
    """trained(*more) -> (overrides, run): a finished run of 5 steps, and every step's checkpoint beside it.

    It is a job of `overrides`, or of the `base` that is given.
    """

    def make(*more: str, base: list[str] | None = None) -> tuple[list[str], Path]:
        job = [*(base or overrides), "trainer.steps=5", "trainer.checkpoint_every=1", *more]
        key = (*more, *(base or []))
        if key not in BASES:
            runs, save = tmp_path_factory.mktemp("base"), Trainer.save_checkpoint
            (runs / "every_step").mkdir()

            def save_and_copy(trainer: Trainer, path: Any, *args: Any, **options: Any) -> None:
                save(trainer, path, *args, **options)
                shutil.copy(path, runs / "every_step")

            with monkeypatch.context() as patch:
                patch.setattr(Trainer, "save_checkpoint", save_and_copy)
                run_pipeline(configure(*moved(job, runs)))
            BASES[key] = the_run(runs)
            assert files(runs / "every_step") == {f"step={step:07d}.ckpt" for step in range(1, 6)}
        return job, BASES[key]

    return make


def interrupted(run: Path, runs: Path, steps: list[int]) -> Path:
    """The state of a run of which only these checkpoints were there yet; returns the folder of the checkpoints."""
    folder = runs / "debug" / run.name
    checkpoints = folder / "checkpoints" / "distil"
    for made in (checkpoints, folder / "history"):
        made.mkdir(parents=True)
    for name in (".manifest.json", "scores.json", "plan.json", "history/distil.csv"):
        shutil.copy(run / name, folder / name)
    shutil.copytree(run / "networks" / "pruned", folder / "networks" / "pruned")
    for step in steps:
        shutil.copy(run.parent.parent / "every_step" / f"step={step:07d}.ckpt", checkpoints)
    return checkpoints


@pytest.mark.parametrize(
    ("steps", "more"),
    [
        ([1, 2, 3, 4, 5], []),
        (
            [1, 3, 5],
            ["trainer.accumulate_grad_batches=2", "+data.num_workers=1", "distillation.normalization=running"],
        ),
        ([3, 5], ["ema_decay=null", "distillation.normalization=initial_error", "timesteps=logit_normal"]),
    ],
    ids=["plain", "accumulated", "without_average"],
)
@pytest.mark.slow
def test_resuming_from_every_checkpoint_ends_in_the_same_bits(configure, tmp_path, trained, capsys, steps, more):
    job, run = trained(*more)
    for step in steps:
        runs = tmp_path / f"from{step}"
        interrupted(run, runs, [step])
        capsys.readouterr()
        run_pipeline(configure(*moved(job, runs)))
        assert ("resuming from step" in capsys.readouterr().out) == (step < 5)
        assert differences(results(the_run(runs)), results(run)) == [], f"from step {step}"
        resumed, expected = (read_repeatable_history(path / "history" / "distil.csv") for path in (the_run(runs), run))
        assert resumed == expected


@pytest.mark.slow
def test_a_text_to_image_job_resumes_in_the_same_bits(configure, text_job, tmp_path, trained, capsys):
    """Its latents are draws, and its captions are encoded anew."""
    job, run = trained("criterion=magnitude", base=text_job)
    interrupted(run, tmp_path / "text", [3])
    run_pipeline(configure(*moved(job, tmp_path / "text")))
    assert "resuming from step 3 of 5" in capsys.readouterr().out
    assert differences(results(the_run(tmp_path / "text")), results(run)) == []


def flip_a_bit(content: bytes) -> bytes:
    """Change one bit in the middle, which lies in a tensor."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half of it": lambda content: content[: len(content) // 2],
    "without its end": lambda content: content[: int(0.99 * len(content))],
    "a bit": flip_a_bit,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_named_and_skipped(configure, tmp_path, trained, capsys, damage):
    job, run = trained()
    damaged = interrupted(run, tmp_path / "damaged", [2, 3]) / "step=0000003.ckpt"
    damaged.write_bytes(DAMAGES[damage](damaged.read_bytes()))
    with pytest.warns(UserWarning, match=re.escape(f"checkpoint {damaged} cannot be read")):
        run_pipeline(configure(*moved(job, tmp_path / "damaged")))
    assert "resuming from step 2 of 5 (step=0000002.ckpt)" in capsys.readouterr().out
    assert differences(results(the_run(tmp_path / "damaged")), results(run)) == []


def test_checkpoints_that_all_are_damaged_are_named(configure, tmp_path, trained):
    job, run = trained()
    folder = interrupted(run, tmp_path / "damaged", [2, 3])
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    with warnings.catch_warnings(), pytest.raises(CorruptCheckpoint) as caught:
        warnings.simplefilter("ignore")
        run_pipeline(configure(*moved(job, tmp_path / "damaged")))
    for part in (str(folder), "step=0000002.ckpt", "step=0000003.ckpt", "delete them"):
        assert part in str(caught.value)
    assert files(folder) == {"step=0000002.ckpt", "step=0000003.ckpt"}  # nothing was thrown away


def test_resume_required_fails_without_a_checkpoint(configure, overrides, tmp_path, trained):
    job, run = trained()
    required = moved([*job, "trainer.resume=required"], tmp_path / "required")
    with pytest.raises(ValueError, match=r"trainer\.resume='required', but there is no checkpoint in ") as caught:
        run_pipeline(configure(*required))
    assert str(the_run(tmp_path / "required") / "checkpoints" / "distil") in str(caught.value)
    assert "trainer.resume=auto" in str(caught.value)
    shutil.rmtree(tmp_path / "required")
    interrupted(run, tmp_path / "required", [2])
    run_pipeline(configure(*required))
    assert differences(results(the_run(tmp_path / "required")), results(run)) == []


MEASURES = ("frechet_channels", "brightness")


@pytest.mark.slow
def test_metrics_are_a_function_of_the_seed(configure, sampling, tmp_path):
    found = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        torch.rand(5)  # the global generator plays no part
        run_pipeline(configure(*moved(sampling, tmp_path / name), f"seed={seed}"))
        found[name] = results(the_run(tmp_path / name))
    assert differences(found["again"], found["first"]) == []
    for name in (
        "scores.json",
        "plan.json",
        "networks/pruned/diffusion_pytorch_model.pruned.safetensors",
        "samples/pruned/images.npy",
    ):
        assert found["other"][name] == found["first"][name], f"the training seed has changed {name}"
    first, other = (read_json(the_run(tmp_path / name) / "metrics.json") for name in ("first", "other"))
    changed = {key for key in first if first[key] != other[key]}
    assert changed == {
        "run_id",
        *(f"{name}/{key}" for name in ("distilled", "eval") for key in ("output_loss", "task_loss", *MEASURES)),
    }


def test_only_the_last_two_checkpoints_are_kept(configure, overrides, tmp_path):
    run_pipeline(configure(*overrides, "trainer.steps=6", "trainer.checkpoint_every=1"))
    assert files(the_run(tmp_path / "runs") / "checkpoints" / "distil") == {"step=0000005.ckpt", "step=0000006.ckpt"}


def test_a_resumed_run_keeps_only_the_last_two_checkpoints(configure, tmp_path, trained):
    job, run = trained()
    folder = interrupted(run, tmp_path / "resumed", [1, 2])
    run_pipeline(configure(*moved(job, tmp_path / "resumed")))
    assert files(folder) == {"step=0000004.ckpt", "step=0000005.ckpt"}


def test_a_finished_stage_is_not_run_again(configure, overrides, tmp_path, monkeypatch):
    """A job that stopped after its training reads the distilled network and does not train."""
    run_pipeline(configure(*overrides))
    run = the_run(tmp_path / "runs")
    (run / "finished.json").unlink()
    before = trained_state(max((run / "checkpoints" / "distil").iterdir()))
    for name in ("distil.train", "score.score"):
        monkeypatch.setattr(
            f"experiments.engine.stages.{name}", lambda *_, **__: pytest.fail("a finished stage was run again")
        )
    run_pipeline(configure(*overrides))
    assert (run / "finished.json").exists()
    assert differences(trained_state(max((run / "checkpoints" / "distil").iterdir())), before) == []
