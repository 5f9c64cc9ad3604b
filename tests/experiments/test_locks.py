"""Locks: for whom a process waits, and what happens when the holder has ended."""

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from filelock import FileLock

from experiments.engine import locks
from experiments.engine.artefacts import digest
from experiments.engine.cache import cached


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
    path.with_suffix(".holder").write_text(json.dumps({"pid": pid, "host": socket.gethostname()}))


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


def test_two_processes_that_wait_for_an_ended_one_compute_a_result_once(entry):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    write_holder(entry, ended.pid)
    calls = []

    def compute() -> int:
        calls.append(threading.current_thread().name)
        time.sleep(0.3)  # the other one looks at the lock meanwhile, several times
        return 42

    waiting = [threading.Thread(target=cached, args=(entry.parent, "key", compute)) for _ in range(2)]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join(30)
    assert not any(thread.is_alive() for thread in waiting) and len(calls) == 1


def test_a_process_of_another_container_never_counts_as_ended():
    here = locks.describe_this_process()
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    assert locks.has_ended(here | {"pid": ended.pid})
    assert not locks.has_ended(here | {"pid": ended.pid, "system": "another"})


@pytest.mark.parametrize("host", ["elsewhere", "?"])
def test_a_process_on_another_machine_never_counts_as_ended(host):
    assert not locks.has_ended({"pid": 1, "host": host})
