"""Evaluation while training: what it gives, and that it changes nothing."""

import contextlib
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from support.jobs import QUICK_END
from support.ranks import two_ranks
from support.results import differences, files, read_repeatable_history, results, the_run
from support.stops import ctrl_c_after_step

from conf.schema import ConfigError
from experiments.engine import training_evaluation
from experiments.engine.artefacts import read_json
from experiments.engine.clock import OutOfMemory
from experiments.engine.identity import get_effective_settings
from experiments.engine.job import TEACHER, Job
from experiments.engine.pipeline import run_pipeline
from experiments.engine.training_evaluation import EvaluateWhileTraining, TrainingEvaluation

pytestmark = pytest.mark.usefixtures("quick_end")

EVERY_TWO = "evaluation.every_n_steps=2"
PREVIEWS = {f"previews/distil/step=000000{step}.png" for step in (0, 2, 4)}


def read_evaluations(run: Path) -> dict[str, dict[int, float]]:
    """{measure: {step: value}} of the evaluations while training."""
    table = pd.read_csv(run / "history" / "distil.csv")
    table = table[table["name"].str.startswith("train/eval/")]
    return {name.split("/")[2]: dict(part[["step", "value"]].to_numpy()) for name, part in table.groupby("name")}


@pytest.fixture
def plain(configure, sampling, tmp_path):
    """A finished run without evaluation while training."""
    run_pipeline(configure(*sampling))
    return the_run(tmp_path / "runs")


@pytest.mark.slow
def test_it_changes_no_bit_and_agrees_with_the_final_evaluation(configure, sampling, tmp_path, plain):
    shutil.move(tmp_path / "runs", tmp_path / "plain")
    run_pipeline(configure(*sampling, EVERY_TWO))
    run, plain = the_run(tmp_path / "runs"), the_run(tmp_path / "plain")
    assert run.name == plain.name
    assert differences(results(run), results(plain)) == []
    assert files(run) == files(plain) | PREVIEWS
    values, metrics = read_evaluations(run), read_json(run / "metrics.json")
    assert values["frechet_channels"][0] == metrics["pruned/frechet_channels"]  # before the first step
    assert set(values) == {"frechet_channels", "teacher_frechet_channels"}  # the first measure
    assert values["frechet_channels"].keys() == {0, 1, 3}
    assert values["frechet_channels"][3] == metrics["distilled/frechet_channels"]
    assert set(values["teacher_frechet_channels"].values()) == {metrics["teacher/frechet_channels"]}
    rows = read_repeatable_history(run / "history" / "distil.csv")
    assert [row for row in rows if "/eval/" not in row[1]] == read_repeatable_history(plain / "history" / "distil.csv")


@pytest.mark.slow
def test_a_resumed_run_continues_its_evaluations(configure, sampling, tmp_path, monkeypatch, plain):
    shutil.move(tmp_path / "runs", tmp_path / "plain")
    job = [*sampling, EVERY_TWO, "evaluation.training_samples=4", "trainer.accumulate_grad_batches=2"]
    run_pipeline(configure(*job, f"paths.runs={tmp_path}/undisturbed"))
    with ctrl_c_after_step(monkeypatch, 3), pytest.raises(SystemExit):
        run_pipeline(configure(*job))
    run_pipeline(configure(*job))
    run, undisturbed = the_run(tmp_path / "runs"), the_run(tmp_path / "undisturbed")
    assert differences(results(run), results(undisturbed)) == []
    histories = [read_repeatable_history(path / "history" / "distil.csv") for path in (run, undisturbed)]
    assert histories[0] == histories[1]
    assert read_evaluations(run)["frechet_channels"].keys() == {0, 1, 3}
    assert all((run / name).read_bytes() == (undisturbed / name).read_bytes() for name in PREVIEWS)


def run_on_rank(rank: int, cfg: DictConfig) -> None:
    run_pipeline(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_evaluate_as_one_process(configure, sampling, tmp_path, strategy):
    run_pipeline(configure(*sampling, EVERY_TWO))
    on_two = [f"trainer={strategy}", "trainer.accelerator=cpu", f"paths.runs={tmp_path}/two"]
    with two_ranks(run_on_rank, configure(*sampling, EVERY_TWO, *on_two), patches=QUICK_END):
        pass
    one, two = the_run(tmp_path / "runs"), the_run(tmp_path / "two")
    assert one.name == two.name and files(two) == files(one)
    expected, found = (pd.DataFrame(read_evaluations(run)).sort_index(axis=1) for run in (one, two))
    pd.testing.assert_frame_equal(found, expected, rtol=1e-3)
    metrics = read_json(two / "metrics.json")
    assert found["frechet_channels"][3] == pytest.approx(metrics["distilled/frechet_channels"])
    assert list(found["teacher_frechet_channels"]) == pytest.approx([metrics["teacher/frechet_channels"]] * 3)


@pytest.mark.slow
def test_without_measures_there_are_pictures(configure, sampling, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        training_evaluation, "draw_sample_grids", lambda images, path: drawn.append((path.name, images))
    )
    job = [override for override in sampling if not override.startswith("evaluation=")]
    run_pipeline(configure(*job, "evaluation=none", EVERY_TWO, "evaluation.training_samples=3", "ema_decay=null"))
    assert read_evaluations(the_run(tmp_path / "runs")) == {}
    assert [(name, list(images)) for name, images in drawn] == [
        (f"step=000000{step}.png", ["teacher", f"step {step}"]) for step in (0, 2, 4)
    ]
    first, *later = (images["teacher"] for _, images in drawn)
    assert first.shape == (3, 8, 8, 3) and all(np.array_equal(first, images) for images in later)


@pytest.mark.slow
def test_samples_that_are_not_finite_do_not_end_the_training(configure, sampling, tmp_path, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise FloatingPointError("samples are not finite")

    monkeypatch.setattr(training_evaluation.SampleEvaluation, "generate_without_files", fail)
    run_pipeline(configure(*sampling, EVERY_TWO))
    run = the_run(tmp_path / "runs")
    assert (run / "finished.json").exists() and read_evaluations(run) == {}
    assert "evaluation of distil while training: samples are not finite" in caplog.text


def fail_in_evaluation(monkeypatch, number: int) -> None:
    """Let the student's evaluation of a number raise an error, after it has drawn random numbers."""
    measure, names = TrainingEvaluation.measure_images, []

    def measure_or_fail(evaluation, name, images):
        names.append(name)
        if name == "distil" and names.count(name) == number:
            torch.rand(1), np.random.rand()
            raise torch.OutOfMemoryError("16 GiB are in use")
        return measure(evaluation, name, images)

    monkeypatch.setattr(TrainingEvaluation, "measure_images", measure_or_fail)


@pytest.mark.slow
def test_a_later_error_changes_no_bit_of_the_training(configure, sampling, tmp_path, monkeypatch, caplog, plain):
    shutil.move(tmp_path / "runs", tmp_path / "plain")
    fail_in_evaluation(monkeypatch, 2)
    run_pipeline(configure(*sampling, EVERY_TWO))
    run, plain = the_run(tmp_path / "runs"), the_run(tmp_path / "plain")
    assert differences(results(run), results(plain)) == []
    assert read_evaluations(run)["frechet_channels"].keys() == {0, 3}
    assert (
        "evaluation.every_n_steps=2: the evaluation after step 2 of the stage distil has failed, and the training goes "
        "on: OutOfMemory: out of memory in the evaluation after step 2 of stage 'distil' (16 GiB are in use). Lower "
        "evaluation.batch_size="
    ) in caplog.text


@pytest.mark.slow
def test_an_error_before_the_first_step_ends_the_training(configure, sampling, tmp_path, monkeypatch):
    fail_in_evaluation(monkeypatch, 1)
    with pytest.raises(OutOfMemory, match=r"^out of memory in the evaluation after step 0 of stage 'distil'"):
        run_pipeline(configure(*sampling, EVERY_TWO))
    assert list(the_run(tmp_path / "runs").glob("checkpoints/distil/*")) == []


@pytest.mark.parametrize(
    ("step", "ranks", "error", "passes"),
    [
        (0, 1, RuntimeError, True),
        (2, 1, RuntimeError, False),
        (2, 2, RuntimeError, True),
        (2, 1, KeyboardInterrupt, True),
        (2, 1, SystemExit, True),
    ],
)
def test_which_errors_end_a_training(configure, step, ranks, error, passes):
    watcher = EvaluateWhileTraining(SimpleNamespace(cfg=configure(EVERY_TWO)), None, "distil", "train")
    watcher.step = step
    with pytest.raises(error) if passes else contextlib.nullcontext(), watcher.warn_of_errors(ranks):
        raise error


@pytest.mark.slow
def test_each_step_has_one_value_with_an_evaluation_every_step(configure, sampling, tmp_path):
    run_pipeline(configure(*sampling, "evaluation.every_n_steps=1", "evaluation.training_samples=2"))
    table = pd.read_csv(the_run(tmp_path / "runs") / "history" / "distil.csv")
    assert list(table["step"][table["name"] == "train/eval/frechet_channels"]) == [0, 1, 2, 3]


@pytest.mark.slow
def test_an_unfit_measure_is_warned_of_once(configure, sampling, caplog):
    caplog.set_level(logging.WARNING)
    run_pipeline(configure(*sampling, EVERY_TWO, "+evaluation.fits.frechet_channels=[other]"))
    assert caplog.text.count("evaluation.metrics.frechet_channels: its features were learnt from data=other") == 1


@pytest.mark.slow
def test_a_picture_shows_teacher_and_student(plain, configure, sampling, tmp_path):
    run_pipeline(configure(*sampling, EVERY_TWO, "force=true"))
    picture = np.asarray(Image.open(the_run(tmp_path / "runs") / "previews" / "distil" / "step=0000004.png"))
    assert picture.shape[1] > 1.5 * picture.shape[0]  # two grids, side by side


def test_a_pretraining_is_refused(configure):
    from experiments.engine.stages.train import Train

    job = Job(configure("experiment=pretrain_cifar10", EVERY_TWO), None, torch.device("cpu"), None, None, None, "none")

    with pytest.raises(ConfigError, match=r"^evaluation\.every_n_steps=2: .* has no teacher to compare with"):
        Train().check(job)


def test_a_network_without_anything_to_evaluate_is_refused(configure, overrides):
    class Classifier:
        classifies, generates, writes_text = True, False, False

    cfg = configure(*overrides, EVERY_TWO, "evaluation.images=4")
    job = Job(cfg, None, torch.device("cpu"), None, None, None, "id", {TEACHER: Classifier})
    with pytest.raises(ValueError, match=r"^evaluation\.every_n_steps=2: there is nothing to evaluate"):
        TrainingEvaluation(job)


@pytest.mark.parametrize("budget", ["params", "latency"])
def test_it_is_no_part_of_the_run_identity(configure, budget):
    plain, changed = (
        get_effective_settings(configure(f"selection.budget={budget}", *more))
        for more in ([], [EVERY_TWO, "evaluation.training_samples=4"])
    )
    assert plain == changed
