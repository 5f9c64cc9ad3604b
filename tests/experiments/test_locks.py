"""Locks: for whom a process waits, and what happens when the holder has ended."""

import json
import logging
import os
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from filelock import FileLock

from experiments.engine import locks, sweep
from experiments.engine.artefacts import digest
from experiments.engine.cache import cached
from experiments.engine.run import RunBusy


@pytest.fixture
def entry(tmp_path, monkeypatch, caplog):
    """The path of a cached result, without its ending, whose lock is held by this test."""
    monkeypatch.setattr(locks, "PATIENCE", 0.05)
    caplog.set_level(logging.WARNING)
    path = tmp_path / "scores" / digest("key")
    path.parent.mkdir()
    with FileLock(path.with_suffix(".lock")):
        yield path


def write_holder(path, pid: int) -> None:
    path.with_suffix(".holder.json").write_text(json.dumps({"pid": pid, "host": socket.gethostname()}))


def test_a_process_that_waits_says_for_whom(entry, caplog):
    write_holder(entry, os.getppid())
    waiting = threading.Thread(target=cached, args=(entry.parent, "key", lambda: 42))
    waiting.start()
    expected = f"waiting for process {os.getppid()} on {socket.gethostname()}, which computes the scores ({entry}.lock)"
    for _ in range(200):
        if expected in caplog.text:
            break
        waiting.join(0.05)
    assert caplog.text.count(expected) == 1 and waiting.is_alive()
    entry.with_suffix(".json").write_text(json.dumps({"key": "key", "result": 41}))
    entry.with_suffix(".lock").unlink()  # as good as released: the next attempt makes another file
    waiting.join(10)
    assert not waiting.is_alive() and json.loads(entry.with_suffix(".json").read_text())["result"] == 41


def test_the_lock_of_a_process_that_has_ended_is_taken_over(entry, caplog):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    write_holder(entry, ended.pid)
    assert cached(entry.parent, "key", lambda: 42) == 42
    assert f"process {ended.pid} on {socket.gethostname()}, which held {entry}.lock, has ended" in caplog.text


@pytest.mark.parametrize("host", ["elsewhere", "?"])
def test_of_processes_on_other_machines_nothing_is_assumed(host):
    assert not locks.has_ended({"pid": 1, "host": host})


# A sweep that two processes share


@pytest.fixture
def shared_sweep(monkeypatch):
    """run_pipeline is busy the first two times for the job "b"; returns the list of its calls."""
    calls: list[str] = []

    def run_pipeline(cfg) -> float:
        calls.append(cfg.name)
        if cfg.name == "b" and calls.count("b") < 3:
            raise RunBusy("run b is being made by process 1 on there; wait for it or stop it")
        return 1.0

    monkeypatch.setattr(sweep, "run_pipeline", run_pipeline)
    monkeypatch.setattr(sweep, "is_in_sweep", lambda: True)
    monkeypatch.setattr(sweep, "POLL", 0.0)
    return calls


def job(name: str, devices: int = 1):
    return SimpleNamespace(name=name, trainer=SimpleNamespace(devices=devices, num_nodes=1))


def test_a_job_of_another_process_is_looked_at_again_after_the_others(shared_sweep, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "runs_jobs_in_turn", lambda: True)
    assert [sweep.run_job(job(name)) for name in "abc"] == [1.0, None, 1.0]
    sweep.run_postponed_jobs()
    assert shared_sweep == ["a", "b", "c", "b", "b"]
    printed = capsys.readouterr().out
    assert "left to another process for now: run b is being made by process 1" in printed
    assert "waiting: run b is being made by process 1" in printed


def test_a_sweeper_that_needs_the_measure_waits_for_it(shared_sweep, monkeypatch):
    monkeypatch.setattr(sweep, "runs_jobs_in_turn", lambda: False)
    assert sweep.run_job(job("b")) == 1.0


def test_a_single_job_and_one_on_several_devices_are_refused(shared_sweep, monkeypatch):
    with pytest.raises(RunBusy):
        sweep.run_job(job("b", devices=2))
    monkeypatch.setattr(sweep, "is_in_sweep", lambda: False)
    with pytest.raises(RunBusy):
        sweep.run_job(job("b"))
