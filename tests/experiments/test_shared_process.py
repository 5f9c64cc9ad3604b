"""Jobs of a sweep that run in one process: they read the teacher once, and have the bits of jobs that run alone."""

import sys
from pathlib import Path

import pytest
from support.results import read_repeatable_history, the_run

import train
from experiments.engine import inputs
from experiments.engine.artefacts import hash_files, read_json
from experiments.engine.inputs import build_teacher


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """Return the list of the paths of the teachers that are loaded from files."""
    paths = []

    def load(cfg):
        paths.append(Path(cfg.teacher.path).name)
        return build_teacher(cfg)

    monkeypatch.setattr(inputs, "build_teacher", load)
    monkeypatch.setattr(inputs, "_kept", {})
    return paths


def run(monkeypatch, folder: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--config-dir", str(folder), *arguments])
    train.main()


@pytest.mark.parametrize("family", ["overrides", pytest.param("text_job", marks=pytest.mark.slow)])
def test_the_second_job_of_a_process_has_the_bits_of_a_job_alone(
    request, family, data_folder, tmp_path, monkeypatch, quick_end, loads
):
    job = request.getfixturevalue(family)
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    run(monkeypatch, data_folder, *job, "criterion=magnitude", f"paths.runs={alone}")
    assert len(loads) == 1 and inputs._kept == {}  # a single job keeps no copy
    run(monkeypatch, data_folder, "-m", *job, "criterion=output_loss,magnitude", f"paths.runs={shared}")
    assert len(loads) == 2  # for both jobs once
    first = the_run(alone)
    second = shared / first.relative_to(alone)
    assert read_json(second / "metrics.json") == read_json(first / "metrics.json")
    for name in ("networks", "scores.json", "plan.json"):
        assert hash_files(second / name) == hash_files(first / name), name
    for history in (first / "history").iterdir():
        assert read_repeatable_history(second / "history" / history.name) == read_repeatable_history(history)


@pytest.mark.slow
def test_a_job_with_another_teacher_reads_its_files(overrides, data_folder, tmp_path, monkeypatch, loads, text_teacher):
    kept = [override for override in overrides if not override.startswith("teacher.path=")]
    paths = f"teacher.path={tmp_path / 'first'},{tmp_path / 'second'}"
    for name in ("first", "second"):
        (tmp_path / name).symlink_to(next(o for o in overrides if o.startswith("teacher.path=")).partition("=")[2])
    monkeypatch.setattr(
        "experiments.engine.stages.score.Score.run", lambda *_: (_ for _ in ()).throw(ValueError("stop"))
    )
    with pytest.raises(SystemExit):
        run(monkeypatch, data_folder, "-m", *kept, paths, "selection.ratio=0.3,0.5")
    assert loads == ["first", "second"] and len(inputs._kept) == 1
