"""Jobs and sweeps as a user sees them: what they leave behind, what they do not do twice, and how they fail."""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import train
from helpers_networks import bypasses, tiny_backbone
from helpers_results import files, the_run
from safetensors.torch import load_file, save_file
from wandb.proto import wandb_internal_pb2

from conf.schema import ROOT, build
from criteria.selection import InfeasibleBudget
from datamodules.images import Images
from experiments import pipeline
from experiments.pipeline import StaleArtefact, prune
from experiments.report import collect, report_set
from experiments.run import Run, RunBusy, UnwritableDirectory, fingerprint, read_json
from experiments.stages import OutOfMemory
from lightning_modules.backbones.files import weight_files
from lightning_modules.export import ExportMismatch, export, verify

pytest_plugins = ["helpers_jobs"]

WEIGHTS = "diffusion_pytorch_model.pruned.safetensors"
NETWORK = {"config.json", WEIGHTS}
FINISHED = {
    *(".lock", ".holder.json", "config.yaml", "scores.json", "plan.json", "metrics.csv", "metrics.json"),
    *("seconds.json", "measured.json", "report.html", "finished.json", "figures/scores.png", "figures/losses.png"),
    *("checkpoints/step=0000002.ckpt", "checkpoints/step=0000004.ckpt"),
    *(f"{folder}/{name}" for folder in ("student", "distilled", "export/unet") for name in NETWORK),
    *("export/README.md", "export/model_index.json", "export/scheduler/scheduler_config.json"),
    "export/unet/pruned_unet.py",
}
SAMPLED = {"figures/samples.png", *(f"samples/{name}/images.npy" for name in ("teacher", "pruned", "distilled"))}

DONE: dict[str, Path] = {}
"""One finished job, made once for all tests that start from one."""


@pytest.fixture
def finished(configure, overrides, tmp_path, tmp_path_factory, unverified) -> tuple[Any, Path]:
    """(cfg, run): a finished job below tmp_path/runs."""
    if not DONE:
        runs = tmp_path_factory.mktemp("done") / "runs"
        prune(configure(*overrides[:5], *overrides[6:], f"paths.runs={runs}"))
        DONE["runs"] = runs
    shutil.copytree(DONE["runs"], tmp_path / "runs")
    return configure(*overrides), the_run(tmp_path / "runs")


def identity(cfg: Any) -> Run:
    return Run(cfg, fingerprint(weight_files(cfg.teacher.path), Path(cfg.paths.cache)))


def stamps(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in files(folder)}


# What a job leaves behind


def test_a_finished_run_is_exactly_these_files_also_below_a_folder_with_spaces_and_unicode(
    configure, sampling, teacher_folder, tmp_path, capsys
):
    runs, teacher = tmp_path / "läufe mit leerzeichen ✂" / "runs", tmp_path / "der lehrer ü"
    shutil.copytree(teacher_folder, teacher)
    job = [override for override in sampling if not override.startswith(("paths.runs=", "teacher.path="))]
    prune(configure(*job, f"paths.runs='{runs}'", f"teacher.path='{teacher}'"))
    run = the_run(runs)
    assert files(run) == FINISHED | SAMPLED
    kinds = sorted(re.sub(r"[0-9a-f]{16,}", "ID", name) for name in files(runs / ".cache"))
    assert kinds == [
        *["fingerprints/ID.json"] * 3,  # weights, their configuration, the noise schedule
        *("samples/ID.lock", "samples/ID/images.npy", "scores/ID.json", "scores/ID.lock", "statistics/ID.safetensors"),
    ]
    assert {path.name for path in runs.iterdir()} == {".cache", "debug"}

    metrics, measured = read_json(run / "metrics.json"), read_json(run / "measured.json")
    assert run.name == f"output_loss-knapsack-0.5-normalized-seed0-{metrics['run_id'][:8]}"
    assert 0.5 <= metrics["plan/achieved_ratio"] <= 0.6
    removed = {change["unit"] for change in read_json(run / "plan.json")["changes"]}
    freed = sum(unit.params for unit in tiny_backbone("UNet2DModel").units() if unit.name in removed)
    assert metrics["teacher/params"] - metrics["student/params"] == freed
    assert len(removed) == metrics["plan/removed_units"]
    for measure in ("output_loss", "task_loss", "frechet_channels"):
        assert metrics[f"eval/{measure}"] == metrics[f"distilled/{measure}"]
    assert not any(word in key for key in metrics for word in ("seconds", "latency", "memory"))
    assert measured["export_max_difference"] <= 1e-5
    for name in ("teacher", "pruned", "distilled"):
        images = np.load(run / "samples" / name / "images.npy", allow_pickle=False)
        assert images.shape == (8, 8, 8, 3) and images.dtype == np.uint8
    summary = read_json(run / "finished.json")["summary"]
    assert summary in capsys.readouterr().out
    assert str(run / "export") in summary and "asked for 0.5" in summary and "frechet_channels" in summary


def test_a_finished_job_is_not_run_again_and_reads_no_weights(finished, monkeypatch, capsys):
    cfg, run = finished
    before = stamps(run)

    def forbidden(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a finished job did something")

    for name in ("pipeline.load_network", "run.cached"):
        monkeypatch.setattr(f"experiments.{name}", forbidden)
    for name in ("load_teacher", "files.load_teacher", "files.load_network"):
        monkeypatch.setattr(f"lightning_modules.backbones.{name}", forbidden)
    monkeypatch.setattr(hashlib, "file_digest", forbidden)
    monkeypatch.setattr(Images, "source", forbidden)
    prune(cfg)
    assert stamps(run) == before
    printed = capsys.readouterr().out
    assert f"finished already: {run} (force=true runs it again)" in printed
    assert read_json(run / "finished.json")["summary"] in printed


def test_force_runs_a_finished_job_again_from_nothing(configure, overrides, finished):
    _, run = finished
    before, results = stamps(run), read_json(run / "metrics.json")
    (run / "left_over").touch()
    prune(configure(*overrides, "force=true"))
    assert files(run) == FINISHED
    assert read_json(run / "metrics.json") == results
    for name in ("student/config.json", "checkpoints/step=0000004.ckpt", "metrics.json", "finished.json"):
        assert (run / name).stat().st_mtime_ns > before[name], name


def test_a_forced_job_that_is_stopped_while_it_clears_up_is_not_finished(configure, overrides, finished, monkeypatch):
    _, run = finished
    # In the order of names, so that the first folder comes before finished.json.
    entries = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(entries(self))))
    monkeypatch.setattr("experiments.run.shutil.rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prune(configure(*overrides, "force=true"))
    assert not (run / "finished.json").exists()


def test_a_data_set_is_one_yaml_file_outside_the_repository(configure, overrides, data_folder, images_file, unverified):
    assert not data_folder.is_relative_to(ROOT)
    assert not (ROOT / "conf" / "data" / "tiny.yaml").exists()
    assert {path.suffix for path in (data_folder / "data").iterdir()} == {".yaml"}
    cfg = configure(*overrides)
    assert cfg.data.train.path == str(images_file)
    prune(cfg)
    batch = next(iter(build(cfg.data).subset("train", 4, 0, 4)))
    with np.load(images_file) as archive:
        shown = ((batch["image"].permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
        assert np.array_equal(shown, archive["x_train"][batch["index"]])
        assert np.array_equal(batch["label"], archive["y_train"][batch["index"]])


# Sweeps

SWEEP = ["criterion=output_loss,magnitude,random", "selection.ratio=0.3,0.5,0.9999", "seed=0"]
WITHOUT_RELOAD = "import experiments.pipeline, train; experiments.pipeline.verify = lambda *_: 0.0; train.main()"


def sweep(config_dir: Path, *arguments: str) -> subprocess.CompletedProcess:
    """train.py -m in a process of its own, without the reload of each export (which has tests of its own)."""
    command = [sys.executable, "-c", WITHOUT_RELOAD, "--config-dir", str(config_dir), "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_sweep_shares_scores_survives_a_failing_job_and_is_not_run_twice(
    configure, sampling, data_folder, tmp_path, unverified
):
    job = [*sampling, "distillation=none"]
    first = sweep(data_folder, *job, *SWEEP)
    assert first.returncode != 0
    assert (
        "selection.ratio=0.9999 (tolerance 0.1) of params cannot be had: the largest achievable ratio is"
        in first.stderr
    )
    study, cache = tmp_path / "runs" / "debug", tmp_path / "runs" / ".cache"
    labels = {re.sub("-[0-9a-f]{8}$", "", path.name): (path / "finished.json").exists() for path in study.iterdir()}
    methods = {"output_loss": "knapsack", "magnitude": "knapsack", "random": "ranked"}
    assert labels == {
        f"{criterion}-{methods[criterion]}-{ratio}-none-seed0": ratio != 0.9999
        for criterion in methods
        for ratio in (0.3, 0.5, 0.9999)
    }
    assert len(list(study.glob("*/metrics.json"))) == 6
    scored = [read_json(path)["key"]["criterion"]["name"] for path in cache.glob("scores/*.json")]
    assert sorted(scored) == sorted(methods)

    before = {path.name: stamps(path) for path in study.iterdir() if (path / "finished.json").exists()}
    second = sweep(data_folder, *job, *SWEEP)
    assert second.returncode != 0
    assert second.stdout.count("finished already: ") == 6
    assert {name: stamps(study / name) for name in before} == before

    # The report of the same folder; random has a second seed.
    for ratio in (0.3, 0.5):
        prune(configure(*job, "criterion=random", "seed=1", f"selection.ratio={ratio}"))
    page = report_set(study)
    assert files(study / "report") == {
        *("index.html", "results.csv", "table.md", "output_loss_over_ratio.png"),
        *("quality_over_ratio.png", "quality_over_latency_ratio.png"),
    }
    runs = pd.read_csv(study / "report" / "results.csv")
    assert sorted(runs["run"]) == sorted(path.parent.name for path in study.glob("*/finished.json"))
    assert dict(runs["criterion"].value_counts()) == {"random": 4, "output_loss": 2, "magnitude": 2}
    rows = [line.strip("| ").split(" | ") for line in (study / "report" / "table.md").read_text().splitlines()]
    table = pd.DataFrame(rows[2:], columns=rows[0])
    assert {tuple(row) for row in table[["criterion", "selection", "ratio", "runs"]].to_numpy()} == {
        (criterion, methods[criterion], ratio, "2" if criterion == "random" else "1")
        for criterion in methods
        for ratio in ("0.3", "0.5")
    }
    for ratio in (0.3, 0.5):
        seeds = runs[(runs["criterion"] == "random") & (runs["ratio"] == ratio)]
        row = table[(table["criterion"] == "random") & (table["ratio"] == str(ratio))].iloc[0]
        for column, shown, digits in (
            ("output_loss_pruned", "output loss, pruned", 4),
            ("quality", "frechet_channels", 2),
        ):
            mean, spread = seeds[column].mean(), seeds[column].std()
            assert row[shown] == f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread > 0 else "")
    html = page.read_text()
    assert html.count("<li><a href=") == 8
    for path in study.iterdir():
        if path.name == "report":
            continue
        link = f'<li><a href="../{path.name}/report.html">'
        assert (link in html) == (path / "finished.json").exists(), path.name
        assert (f"<li>{path.name}</li>" in html) == (not (path / "finished.json").exists()), path.name
        assert (page.parent / ".." / path.name / "report.html").exists() == (path / "finished.json").exists()


def test_the_table_of_a_report_names_no_column_twice(finished):
    _, run = finished
    report_set(run.parent)
    heads = (run.parent / "report" / "table.md").read_text().splitlines()[0].strip("| ").split(" | ")
    assert len(set(heads)) == len(heads)


def test_a_folder_without_a_finished_run_is_said_to_be_one(tmp_path):
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))} has no finished run below it"):
        collect(tmp_path)


# Weights & Biases


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run: a log in blocks of 32 KiB, each piece with checksum, length and kind before it."""
    content, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def test_each_job_is_one_offline_wandb_run_that_is_finished_also_when_the_job_fails(overrides, data_folder, tmp_path):
    job = [*overrides, "logger.wandb=true", "logger.mode=offline", "distillation=none"]
    assert sweep(data_folder, *job, "selection.ratio=0.9999,0.5").returncode != 0
    runs = sorted((tmp_path / "runs" / "debug").iterdir())
    assert len(runs) == 2
    for run, ratio, code in zip(runs, (0.5, 0.9999), (0, 1), strict=True):
        (offline,) = (path for path in run.rglob("offline-run-*") if path.is_dir())
        (file,) = offline.glob("run-*.wandb")
        records = list(wandb_records(file))
        (started,) = (record.run for record in records if record.HasField("run"))
        assert started.run_id.startswith(f"debug-{run.name[-8:]}") and started.display_name == run.name
        config = {item.key: json.loads(item.value_json) for item in started.config.update}
        assert config["selection.ratio"] == ratio and config["criterion.name"] == "output_loss"
        assert [record.exit.exit_code for record in records if record.HasField("exit")] == [code]
        assert (run / "finished.json").exists() == (code == 0)
        if code == 0:
            keys = (
                item.nested_key or [item.key] for r in records if r.HasField("summary") for item in r.summary.update
            )
            summary = {".".join(key) for key in keys}
            assert {"eval/output_loss", "plan/achieved_ratio", "student/params", "student/latency_ms"} <= summary
    assert not (tmp_path / "wandb").exists()


# One job at a time

HOLDER = """
import json, os, sys
from filelock import FileLock
with FileLock(sys.argv[1] + "/.lock"):
    with open(sys.argv[1] + "/.holder.json", "w") as file:
        json.dump({"pid": os.getpid(), "host": "there"}, file)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_another_process_works_on_is_refused_until_that_process_is_gone(configure, overrides, unverified):
    cfg = configure(*overrides)
    folder = identity(cfg).folder
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunBusy, match=rf"{re.escape(str(folder))} is being made by process {holder.pid} on there"):
            prune(cfg)
        assert files(folder) == {".lock", ".holder.json"}
    finally:
        holder.kill()
        holder.communicate()
    prune(cfg)
    assert files(folder) == FINISHED
    assert read_json(folder / ".holder.json")["pid"] == os.getpid()


ASK = """
import os, sys, time
from pathlib import Path
from experiments.run import cached
folder, log, me, count = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
def compute():
    with open(log, "a") as file:
        file.write(me + "\\n")
    time.sleep(0.2)
    return {"answer": list(range(5000))}
(folder.parent / f"ready{me}").touch()
while len(list(folder.parent.glob("ready*"))) < count:
    time.sleep(0.001)
assert cached(folder, {"question": 1}, compute) == {"answer": list(range(5000))}
"""


def test_processes_that_ask_for_one_result_at_once_all_get_it_and_one_computes(tmp_path):
    folder, log = tmp_path / "cache", tmp_path / "log"
    command = [sys.executable, "-c", ASK, str(folder), str(log)]
    processes = [
        subprocess.Popen([*command, str(i), "2"], cwd=ROOT, stderr=subprocess.PIPE, text=True) for i in range(2)
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert len(log.read_text().splitlines()) == 1
    (stored,) = folder.glob("*.json")
    assert read_json(stored) == {"key": {"question": 1}, "result": {"answer": list(range(5000))}}
    assert {path.suffix for path in folder.iterdir()} == {".json", ".lock"}


# Failures


def test_a_folder_that_cannot_be_made_is_named(configure, overrides, tmp_path):
    (tmp_path / "file").write_text("a file, not a folder")
    job = [override for override in overrides if not override.startswith("paths.runs=")]
    with pytest.raises(UnwritableDirectory) as caught:
        prune(configure(*job, f"paths.runs={tmp_path}/file/runs"))
    assert str(tmp_path / "file") in str(caught.value) and "paths.runs=" in str(caught.value)


@pytest.mark.parametrize(
    ("artefact", "field"), [("plan.json", "teacher"), ("plan.json", "scores"), ("scores.json", "key")]
)
def test_an_artefact_of_another_teacher_or_of_other_scores_is_refused_with_both_ids(finished, artefact, field):
    cfg, run = finished
    (run / "finished.json").unlink()
    content = read_json(run / artefact)
    wanted, content[field] = content[field], "0123456789abcdef" * 4
    (run / artefact).write_text(json.dumps(content))
    with pytest.raises(StaleArtefact) as caught:
        prune(cfg)
    for part in (str(run / artefact), "0123456789abcdef", wanted[:16], "force=true"):
        assert part in str(caught.value)


def test_a_plan_with_an_unknown_unit_is_refused(finished):
    cfg, run = finished
    (run / "finished.json").unlink()
    content = read_json(run / "plan.json")
    content["changes"][0]["unit"] = "mid_block.resnet.0"
    (run / "plan.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"'mid_block\.resnet\.0' is not a unit .* nearest are: mid_block\.resnets\.0"
    ) as caught:
        prune(cfg)
    assert str(run / "plan.json") in str(caught.value)


@pytest.mark.parametrize("artefact", ["scores.json", "plan.json", "metrics.json", "finished.json", ".cache/scores"])
def test_a_cut_off_artefact_is_named(finished, artefact):
    cfg, run = finished
    if artefact == ".cache/scores":
        (damaged,) = run.parent.parent.glob(".cache/scores/*.json")
        (run / "scores.json").unlink()
    else:
        damaged = run / artefact
    if artefact != "finished.json":
        (run / "finished.json").unlink()
    damaged.write_text(damaged.read_text()[:40])
    with pytest.raises(ValueError, match=rf"{re.escape(str(damaged))} is not readable JSON .*delete it"):
        prune(cfg)


def test_an_edited_weight_file_makes_another_teacher(configure, overrides, teacher_folder, tmp_path):
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    job = [override for override in overrides if not override.startswith("teacher.path=")]
    cfg = configure(*job, f"teacher.path={teacher}")
    before = identity(cfg).folder
    file = teacher / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert identity(cfg).folder != before


@pytest.mark.parametrize(
    ("error", "explained"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
    ids=["cuda", "python", "cpu", "another_error"],
)
def test_running_out_of_memory_says_in_which_stage_and_what_lowers_it(
    configure, overrides, monkeypatch, error, explained
):
    def score(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "score", score)
    with pytest.raises(OutOfMemory if explained else RuntimeError) as caught:
        prune(configure(*overrides))
    assert (caught.value if not explained else caught.value.__cause__) is error
    if explained:
        for part in ("stage 'score units'", "calibration.batch_size=2", "data.batch_size=4", "evaluation.batch_size=2"):
            assert part in str(caught.value)


def test_an_infeasible_ratio_fails_before_anything_is_scored(configure, overrides, tmp_path):
    with pytest.raises(InfeasibleBudget, match=r"selection\.ratio=0\.9999 .* the nearest achievable 0\.\d+"):
        prune(configure(*overrides, "selection.ratio=0.9999"))
    assert files(the_run(tmp_path / "runs")) == {".lock", ".holder.json", "config.yaml", "seconds.json"}


# Export


def edit_a_weight(folder: Path) -> None:
    file = folder / "unet" / WEIGHTS
    tensors = load_file(file)
    tensors["conv_out.bias"] += 0.01
    save_file(tensors, file, metadata={"format": "pt"})


def remove_the_class(folder: Path) -> None:
    (folder / "unet" / "pruned_unet.py").unlink()


@pytest.mark.parametrize(
    ("tamper", "found"),
    [
        (edit_a_weight, r"reloads, but its output differs by 0\.01"),
        (remove_the_class, "does not load in a clean process"),
    ],
    ids=["edited", "incomplete"],
)
def test_an_export_that_was_tampered_with_is_found_out(teacher, tmp_path, tamper, found):
    student = teacher.pruned(bypasses(["mid_block.resnets.0", "up_blocks.0.attentions.1"]))
    export(student, tmp_path)
    tamper(tmp_path)
    with pytest.raises(ExportMismatch, match=rf"{re.escape(str(tmp_path))} {found}"):
        verify(student, tmp_path)


def test_a_run_whose_export_does_not_match_is_not_finished(configure, overrides, tmp_path, monkeypatch):
    def mismatch(*_: Any) -> None:
        raise ExportMismatch("differs")

    monkeypatch.setattr(pipeline, "verify", mismatch)
    with pytest.raises(ExportMismatch):
        prune(configure(*overrides))
    left = FINISHED - {name for name in FINISHED if name.startswith(("export/", "figures/"))}
    assert files(the_run(tmp_path / "runs")) == left - {"finished.json", "measured.json", "report.html"}


# Several processes for one job


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(configure, overrides, data_folder, tmp_path, unverified):
    job = [override for override in overrides if not override.startswith(("paths.runs=", "trainer="))]
    job += ["calibration.samples=6", "calibration.batch_size=2"]
    prune(configure(*job, "trainer=cpu", f"paths.runs={tmp_path}/one"))
    train(*job, "trainer=ddp", "trainer.accelerator=cpu", f"paths.runs={tmp_path}/two", config_dir=data_folder)
    one, two = the_run(tmp_path / "one"), the_run(tmp_path / "two")
    assert one.name == two.name
    assert files(two) == FINISHED
    expected, found = (read_json(run / "scores.json")["scores"] for run in (one, two))
    assert list(found) == list(expected)
    for name, entry in expected.items():
        assert found[name] == pytest.approx(entry, rel=1e-9), name
    assert read_json(two / "plan.json")["changes"] == read_json(one / "plan.json")["changes"]
    losses = (read_json(run / "metrics.json")["pruned/output_loss"] for run in (one, two))
    assert next(losses) == pytest.approx(next(losses), rel=1e-6)
