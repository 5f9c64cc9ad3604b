"""Artefacts that have changed since they were written are named and made again, or taken as they are without a hash."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.results import differences, files, results, the_run

from experiments.engine.artefacts import digest, read_json, write_folder, write_text
from experiments.engine.cache import (
    cached,
    is_intact,
    read_result,
    write_result,
    write_shared_file,
    write_shared_folder,
)
from experiments.engine.pipeline import run_pipeline
from lightning_modules.disk import DiskFull
from lightning_modules.modules.sampling import create_images

FINISHED: dict[str, Path] = {}
"""The runs folder of one finished job, made once for all tests."""


@pytest.fixture
def finished(configure, overrides, tmp_path, tmp_path_factory, quick_end, caplog) -> tuple[Any, Path, dict[str, Any]]:
    """(cfg, run, its results): a job below tmp_path/runs that has all its artefacts and is not marked finished."""
    job = [override for override in overrides if not override.startswith("paths.runs=")]
    if not FINISHED:
        runs = tmp_path_factory.mktemp("finished") / "runs"
        run_pipeline(configure(*job, f"paths.runs={runs}"))
        FINISHED["runs"] = runs
    shutil.copytree(FINISHED["runs"], tmp_path / "runs")
    run = the_run(tmp_path / "runs")
    (run / "finished.json").unlink()
    caplog.set_level(logging.WARNING)
    return configure(*overrides), run, results(run)


def flip_bit(path: Path) -> None:
    """Change the lowest bit of the last byte of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit(path: Path, *keys: str | int, value: Any) -> None:
    """Set the value at `keys` of a JSON file."""
    content = part = read_json(path)
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path.write_text(json.dumps(content, indent=1) + "\n")


@pytest.mark.slow
def test_damaged_artefacts_are_named_and_made_again(finished, caplog):
    cfg, run, before = finished
    weights = [next((run / "networks" / name).glob("*.safetensors")) for name in ("pruned", "distilled")]
    for path in weights:
        flip_bit(path)
    unit = next(iter(read_json(run / "scores.json")["scores"]))
    edit(run / "scores.json", "scores", unit, "score", value=9.5)
    edit(run / "metrics.json", "eval/output_loss", value=0.125)
    run_pipeline(cfg)
    for name in ("pruned", "distilled"):
        shutil.rmtree(run / f"networks-{name}.changed")
    assert differences(results(run), before) == []
    for path in (run / "scores.json", run / "metrics.json", *(path.parent for path in weights)):
        assert f"{path} is not what this run has written" in caplog.text
    assert read_json(run / "metrics.json.changed")["eval/output_loss"] == 0.125
    assert (run / "finished.json").exists()


@pytest.mark.slow
def test_an_edited_plan_is_kept_and_the_message_names_selection_given(finished, caplog):
    cfg, run, before = finished
    changes = read_json(run / "plan.json")["changes"]
    (run / "plan.json.changed").write_text("kept from an earlier time")
    edit(run / "plan.json", "changes", value=changes[1:])
    run_pipeline(cfg)
    assert differences(results(run), before) == []
    assert "plan.json.changed1 and made again; a plan of your own goes in by selection=given" in caplog.text
    assert read_json(run / "plan.json.changed1")["changes"] == changes[1:]
    assert (run / "plan.json.changed").read_text() == "kept from an earlier time"


def test_an_edited_score_in_the_cache_is_computed_again(finished, caplog):
    cfg, run, before = finished
    (run / "scores.json").unlink()
    (entry,) = run.parent.parent.glob(".cache/scores/*.json")
    stored = entry.read_bytes()
    edit(entry, "result", next(iter(read_json(entry)["result"])), "score", value=9.5)
    run_pipeline(cfg)
    assert differences(results(run), before) == []
    assert f"{entry} is not what was written there: it is made again" in caplog.text
    assert entry.read_bytes() == stored


def test_a_finished_run_with_an_edited_figure_is_not_finished(finished, capsys):
    cfg, run, before = finished
    run_pipeline(cfg)
    edit(run / "metrics.json", "eval/output_loss", value=0.125)
    assert run_pipeline(cfg) == json.loads(before["metrics.json"])["eval/output_loss"]
    assert differences(results(run), before) == []
    run_pipeline(cfg)
    assert "finished already" in capsys.readouterr().out


KEY = {"question": [1, 2]}
DAMAGED = {
    "a digit": lambda stored: stored | {"result": 43},
    "the key": lambda stored: stored | {"key": {"question": [1, 3]}},
    "a name": lambda stored: {"key": stored["key"], "sha157": stored["sha256"], "result": 43},
    "the kind": lambda stored: [stored],
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_an_edited_cache_entry_is_not_used(tmp_path, caplog, damage):
    path = tmp_path / f"{digest(KEY)}.json"
    write_result(path, KEY, 42)
    assert read_result(path, KEY) == 42
    path.write_text(json.dumps(DAMAGED[damage](read_json(path))))
    assert cached(tmp_path, KEY, lambda: 42) == 42
    assert f"{path} is not what was written there" in caplog.text
    assert read_result(path, KEY) == 42


def test_a_cache_entry_without_a_hash_is_used(tmp_path):
    path = tmp_path / f"{digest(KEY)}.json"
    path.write_text(json.dumps({"key": KEY, "result": 42}))
    assert cached(tmp_path, KEY, lambda: pytest.fail("it is there")) == 42


def test_partial_files_of_a_killed_process_in_the_cache_are_removed(tmp_path):
    half = tmp_path / f".{digest(KEY)}.json.ab12cd_3"
    half.write_text("half")
    cached(tmp_path, KEY, lambda: 42)
    assert not half.exists()


def test_a_damaged_shared_file_or_folder_is_not_used(tmp_path, caplog):
    with write_shared_folder(tmp_path / "samples") as partial:
        (partial / "images.npy").write_bytes(b"images")
    write_shared_file(tmp_path / "statistics.safetensors", lambda partial: partial.write_bytes(b"statistics"))
    for name, damaged in (("samples", "samples/images.npy"), ("statistics.safetensors",) * 2):
        assert is_intact(tmp_path / name)
        flip_bit(tmp_path / damaged)
        assert not is_intact(tmp_path / name)
        assert f"{tmp_path / name} is not what was written there ({Path(damaged).name})" in caplog.text
        (tmp_path / f"{name}.sha256").unlink()  # as an earlier version left it
        assert is_intact(tmp_path / name)


# A full disk

NO_SPACE = {"python": OSError(28, "No space left on device"), "safetensors": RuntimeError("I/O error: (os error 28)")}


@pytest.mark.parametrize("error", NO_SPACE)
def test_a_full_disk_is_named_and_leaves_no_temporary_folder(tmp_path, error):
    message = rf"no space is left on the disk for {tmp_path}/networks/pruned \([\d,]+ bytes"
    with pytest.raises(DiskFull, match=message), write_folder(tmp_path / "networks" / "pruned") as partial:
        (partial / "half").touch()
        raise NO_SPACE[error]
    assert files(tmp_path) == set()


def test_a_full_disk_leaves_no_temporary_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "chmod", lambda *_: (_ for _ in ()).throw(NO_SPACE["python"]))
    with pytest.raises(DiskFull, match=rf"{tmp_path}/plan.json"):
        write_text(tmp_path / "plan.json", "{}")
    assert files(tmp_path) == set()


def test_space_for_all_samples_is_taken_at_once(tmp_path, monkeypatch):
    images = create_images(tmp_path / "images.npy", (3, 100, 100, 3))
    images[:] = 7
    size = (tmp_path / "images.npy").stat()
    assert size.st_blocks * 512 >= size.st_size == 90_128
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(NO_SPACE["python"]))
    with pytest.raises(OSError, match=rf"90,128 bytes are needed for 3 samples: '{tmp_path}/images\.npy'"):
        create_images(tmp_path / "images.npy", (3, 100, 100, 3))
