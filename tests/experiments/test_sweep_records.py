"""The records of a sweep, what it prints, and its exit code; the jobs themselves are replaced."""

import json
import logging
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra_plugins.hydra_optuna_sweeper.config import Direction
from omegaconf import OmegaConf
from pytorch_lightning.utilities import rank_zero_only

import train
from conf.schema import ROOT, ConfigError
from experiments.engine import jobs, launch, repeats, sweep
from experiments.engine.locks import describe_this_process
from experiments.engine.pipeline import make_stages
from experiments.engine.run import RunBusy
from experiments.engine.sweep import SKIPPED, JobRecord, format_progress, format_seconds, read_sweep


@pytest.fixture
def sweep_command(monkeypatch, tmp_path):
    """Return a function that runs `train.py -m`; jobs at ratio 0.7 and 0.9 fail, those at 0.3 are finished already."""

    def run_job(cfg, record):
        if cfg.selection.ratio == 0.9:
            raise ValueError("selection.ratio=0.9 cannot be had")
        folder = tmp_path / "runs" / f"{cfg.criterion.name}-{cfg.selection.ratio}"
        record.update(run=str(folder))
        if cfg.selection.ratio == 0.3:
            record.update(state=SKIPPED)
        if cfg.selection.ratio == 0.7:
            raise RuntimeError(f"no room\nfor {cfg.criterion.name}")
        if cfg.selection.ratio == 0.6:
            raise KeyboardInterrupt
        return cfg.selection.ratio / 2

    def run_sweep(*arguments):
        monkeypatch.setattr(jobs, "run_pipeline", run_job)
        monkeypatch.setattr(sys, "argv", ["train.py", "-m", f"paths.runs={tmp_path / 'runs'}", *arguments])
        with pytest.raises(SystemExit) as end:
            train.main()
            sys.exit(0)
        return end.value.code

    return run_sweep


def read_only_sweep(tmp_path):
    (folder,) = (path.parent for path in tmp_path.glob("runs/.sweep/*/sweep.json"))
    return read_sweep(folder)


@pytest.mark.slow
def test_failed_jobs_are_listed_with_reason_log_and_command(sweep_command, tmp_path, capsys):
    assert sweep_command("criterion=magnitude,random", "selection.ratio=0.3,0.5,0.7,0.9") == 1
    records = read_only_sweep(tmp_path)["records"]
    states = ["finished before", "finished", "failed", "failed"] * 2
    assert [record["state"] for record in records] == states
    assert [record.get("measure") for record in records] == [0.15, 0.25, None, None] * 2
    out = capsys.readouterr().out
    for position, line in (
        ("[1/8]", f"finished before: {tmp_path}/runs/magnitude-0.3; 1 finished before of 8"),
        ("[3/8]", "failed: RuntimeError: no room for magnitude"),
        ("[8/8]", "failed: ValueError: selection.ratio=0.9 cannot be had"),
    ):
        assert f"{position} {line}" in out
    end = out[out.index("overrides") :]
    assert "2 finished, 2 finished before, 4 failed of 8" in end
    rows = [re.split(r"  +", line) for line in end.splitlines()[2:10]]
    assert [row[:3] for row in rows[:3]] == [
        ["1", "criterion=magnitude selection.ratio=0.3", "finished before"],
        ["2", "criterion=magnitude selection.ratio=0.5", "finished"],
        ["3", "criterion=magnitude selection.ratio=0.7", "failed"],
    ]
    logs = re.findall(r"  log:   (.+)", end)
    assert len(logs) == 4
    assert all("Traceback (most recent call last)" in Path(log).read_text() for log in logs)
    commands = re.findall(r"  again: python train.py (.+)", end)
    assert commands[0] == f"paths.runs={tmp_path}/runs criterion=magnitude selection.ratio=0.7"


def test_a_rank_left_in_the_shell_does_not_hide_a_sweep(sweep_command, tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as Lightning reads it when it is imported
    assert sweep_command("selection.ratio=0.5,0.7") == 1
    assert [record["state"] for record in read_only_sweep(tmp_path)["records"]] == ["finished", "failed"]


@pytest.mark.slow
def test_a_repeated_sweep_writes_to_the_same_folder(sweep_command, tmp_path):
    assert sweep_command("selection.ratio=0.3,0.7") == 1
    assert sweep_command("selection.ratio=0.3,0.7") == 1
    assert sweep_command("selection.ratio=0.3,0.5") == 0
    assert len(list(tmp_path.glob("runs/.sweep/*/sweep.json"))) == 2


def test_an_interrupted_sweep_is_recorded_as_stopped(sweep_command, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        sweep_command("selection.ratio=0.5,0.6,0.7")
    interrupted = read_only_sweep(tmp_path)
    assert [record["state"] for record in interrupted["records"]] == ["finished", "stopped"]
    assert format_progress(interrupted).startswith("1 finished, 1 stopped of 3, about ")


def test_status_shows_a_job_whose_process_has_ended(sweep_command, tmp_path, capsys, monkeypatch):
    sweep_command("selection.ratio=0.3,0.5")
    folder = next(tmp_path.glob("runs/.sweep/*/sweep.json")).parent
    record = JobRecord(folder, 1, ["selection.ratio=0.5"])
    record.update(pid=2**22 + 1)  # above the largest process number of Linux
    monkeypatch.setattr(sys, "argv", ["status", str(tmp_path / "runs")])
    capsys.readouterr()
    runpy.run_module("experiments.status", run_name="__main__")
    out = capsys.readouterr().out
    assert "job 2 stopped: process 4194305 has ended without a word" in out
    assert "python train.py -m " in out


def test_status_of_a_folder_without_sweeps_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["status", str(tmp_path)])
    with pytest.raises(SystemExit, match="has no sweep"):
        runpy.run_module("experiments.status", run_name="__main__")


# What is printed, and when


@pytest.mark.parametrize(
    ("arguments", "code", "lines"),
    [
        (["selection.ratio=1.5"], 1, ["selection.ratio=1.5 is out of range; choose 0 < ratio < 1 (a fraction, not"]),
        (["selection.rati=0.5"], 1, ["Could not override 'selection.rati'."]),
        (
            ["-m", "selection.ratio=1.5"],
            1,
            ["sweep of 1 jobs; to watch it", "[1/1] ", "[1/1] failed: ConfigError: selection.ratio=1.5 is"],
        ),
    ],
)
def test_first_lines_and_mistakes_come_before_torch_is_imported(tmp_path, arguments, code, lines):
    script = (
        "import sys, train\n"
        "try:\n    train.main()\n"
        "finally:\n    print('torch' in sys.modules, 'pytorch_lightning' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, *arguments, f"paths.runs={tmp_path}/runs"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == code
    text = process.stdout + process.stderr
    for start in lines:
        assert any(line.startswith(start) for line in text.splitlines()), start
    assert "False False" in process.stderr and "Traceback" not in text
    assert not list(tmp_path.glob("runs/[!.]*"))  # no run folder


def test_warnings_of_libraries_are_printed_once(monkeypatch, capsys):
    monkeypatch.setattr(repeats, "_printed", set())
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    shown = []
    monkeypatch.setattr(repeats, "_print_warning", lambda *arguments: shown.append(arguments))
    root = logging.getLogger()
    for _ in range(2):  # two jobs: Hydra makes the handlers of the log anew
        handler = logging.StreamHandler(sys.stdout)
        monkeypatch.setattr(root, "handlers", [handler])
        repeats.drop_repeats()
        for name in ("some_library.part", "experiments.engine.job"):
            logging.getLogger(name).warning("from %s", name)
        logging.getLogger("some_library").error("an error")
        warnings.showwarning("deprecated", UserWarning, "library.py", 7)
    out = capsys.readouterr().out
    assert out.splitlines().count("from some_library.part") == 1
    assert out.splitlines().count("from experiments.engine.job") == out.splitlines().count("an error") == 2
    assert shown == [("deprecated", UserWarning, "library.py", 7)]


# Runs that another process works on


@pytest.fixture
def busy(monkeypatch, tmp_path):
    """Return the calls of a run_pipeline that is busy the first two times for the job "b", and a maker of records."""
    calls: list[str] = []

    def run_pipeline(cfg, record) -> float:
        calls.append(cfg.name)
        if cfg.name == "b" and calls.count("b") < 3:
            raise RunBusy("run b is being made by process 1 on there; wait for it or stop it")
        return 1.0

    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": 3} | describe_this_process()))
    monkeypatch.setattr(jobs, "run_pipeline", run_pipeline)
    monkeypatch.setattr(jobs.checks, "check_targets", lambda cfg: None)
    monkeypatch.setattr(launch, "check_early", lambda cfg, record: None)
    monkeypatch.setattr(launch, "open_record", lambda: JobRecord(tmp_path, len(calls)))
    monkeypatch.setattr(jobs, "POLL", 0.0)
    return calls


def job(name: str, devices: int = 1):
    return SimpleNamespace(name=name, label=name, trainer=SimpleNamespace(devices=devices, num_nodes=1))


def test_a_job_of_another_process_is_postponed_in_a_sweep(busy, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(jobs, "runs_jobs_in_turn", lambda: True)
    assert [launch.start_job(job(name)) for name in "abc"] == [1.0, None, 1.0]
    assert [record["state"] for record in read_sweep(tmp_path)["records"]] == ["finished", "waiting", "finished"]
    (postponed,) = sweep.POSTPONED
    monkeypatch.setattr(sweep, "POSTPONED", [])
    postponed()
    assert busy == ["a", "b", "c", "b", "b"]
    assert [record["state"] for record in read_sweep(tmp_path)["records"]] == ["finished"] * 3
    assert "waiting: run b is being made by process 1" in capsys.readouterr().out
    jobs.POSTPONED.clear()


def test_a_searching_sweeper_waits_for_the_other_process(busy, monkeypatch):
    monkeypatch.setattr(jobs, "runs_jobs_in_turn", lambda: False)
    assert launch.start_job(job("b")) == 1.0


def test_busy_runs_of_single_jobs_are_refused_and_those_of_several_devices_fail(busy, monkeypatch, tmp_path):
    assert launch.start_job(job("b", devices=2)) is None
    monkeypatch.setattr(launch, "open_record", JobRecord)
    with pytest.raises(RunBusy):
        launch.start_job(job("b"))


@pytest.mark.slow
def test_two_processes_of_one_sweep_keep_their_records_apart(sweep_command, tmp_path, monkeypatch):
    sweep_command("selection.ratio=0.3,0.5")
    (first,) = tmp_path.glob("runs/.sweep/*/sweep.json")
    unfinished = json.loads(first.read_text()) | {"ended": None, "host": "elsewhere"}
    first.write_text(json.dumps(unfinished))
    sweep_command("selection.ratio=0.3,0.5")
    assert len(list(tmp_path.glob("runs/.sweep/*/sweep.json"))) == 2
    assert json.loads(first.read_text()) == unfinished


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.26, "0.3 s"), (42, "42 s"), (185, "3 min 5 s"), (7800, "2 h 10 min"), (60, "1 min 0 s")]
)
def test_durations_are_written_in_two_units(seconds, text):
    assert format_seconds(seconds) == text


ACCURACY = ("task=classification", "evaluation=accuracy")


@pytest.mark.parametrize(
    ("given", "sweeper", "right"),
    [
        (ACCURACY, {"direction": "minimize"}, "accuracy, of which higher values are better; choose maximize"),
        (ACCURACY, {"direction": "maximize"}, None),
        (ACCURACY, {}, None),
        ((), {"direction": "maximize"}, "frechet_resnet20, of which lower values are better; choose minimize"),
        ((), {"direction": ["minimize"]}, None),
        ((), {"direction": Direction.minimize}, None),
        (("evaluation=none",), {"direction": "minimize"}, None),
        (
            ("evaluation=none",),
            {"direction": "maximize"},
            "output_loss, of which lower values are better; choose minimize",
        ),
    ],
)
def test_a_search_for_the_worst_is_refused(configure, monkeypatch, tmp_path, given, sweeper, right):
    monkeypatch.setattr(sweep, "open_record", lambda: JobRecord(tmp_path))
    hydra: Any = OmegaConf.create({"sweeper": sweeper}, flags={"allow_objects": True})
    monkeypatch.setattr(sweep.HydraConfig, "get", lambda: hydra)
    if right is None:
        make_stages(configure(*given))
        return
    with pytest.raises(ConfigError) as error:
        make_stages(configure(*given))
    expected = right.replace("choose ", "choose hydra.sweeper.direction=")
    assert str(error.value) == (
        f"hydra.sweeper.direction={sweeper['direction']}: a job returns its first measure, {expected}"
    )
