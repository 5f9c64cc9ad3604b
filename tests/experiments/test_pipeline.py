"""Jobs as a user sees them: what they leave behind, what they do not do twice, and how they fail."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.networks import bypasses, tiny_backbone
from support.process import train
from support.results import files, read_markdown, stamps, the_run

from conf.schema import ROOT, build
from criteria.selection.base import InfeasibleBudget
from experiments.engine.artefacts import StaleArtefact, UnwritableDirectory, check_fresh, digest, read_json
from experiments.engine.clock import OutOfMemory
from experiments.engine.identity import fingerprint
from experiments.engine.pipeline import run_pipeline
from experiments.engine.run import Run, RunBusy
from experiments.reporting.set_page import collect_runs, report_set
from lightning_modules.backbones.files import list_weight_files
from lightning_modules.export.export import export
from lightning_modules.export.verify import ExportMismatch, verify

WEIGHTS = "diffusion_pytorch_model.pruned.safetensors"
NETWORK = {"config.json", WEIGHTS}
FINISHED = {
    *(".lock", ".holder.json", ".manifest.json", "config.yaml", "data.json", "scores.json", "plan.json", "run.log"),
    *("history/distil.csv", "metrics.json", "measured.json", "report.html", "finished.json"),
    *("figures/scores.png", "figures/losses.png"),
    *("checkpoints/distil/step=0000002.ckpt", "checkpoints/distil/step=0000004.ckpt"),
    *(f"{folder}/{name}" for folder in ("networks/pruned", "networks/distilled", "export/unet") for name in NETWORK),
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
        run_pipeline(configure(*overrides[:5], *overrides[6:], f"paths.runs={runs}"))
        DONE["runs"] = runs
    shutil.copytree(DONE["runs"], tmp_path / "runs")
    return configure(*overrides), the_run(tmp_path / "runs")


def forget_hashes(run: Path) -> None:
    """Leave a manifest as earlier versions wrote it, which had no hashes."""
    manifest = read_json(run / ".manifest.json")
    assert manifest.pop("sha256")
    (run / ".manifest.json").write_text(json.dumps(manifest))


def identity(cfg: Any) -> Run:
    return Run(cfg, fingerprint(list_weight_files(cfg.teacher.path), Path(cfg.paths.cache)))


# What a job leaves behind


@pytest.mark.slow
def test_a_finished_run_consists_of_exactly_these_files(configure, sampling, teacher_folder, tmp_path, capsys):
    runs, teacher = tmp_path / "läufe mit leerzeichen ✂" / "runs", tmp_path / "der lehrer ü"
    shutil.copytree(teacher_folder, teacher)
    job = [override for override in sampling if not override.startswith(("paths.runs=", "teacher.path="))]
    run_pipeline(configure(*job, f"paths.runs='{runs}'", f"teacher.path='{teacher}'"))
    run = the_run(runs)
    assert files(run) == FINISHED | SAMPLED
    kinds = sorted(re.sub(r"[0-9a-f]{16,}", "ID", name) for name in files(runs / ".cache"))
    assert kinds == [
        "data/ID.json",  # where data of this content were first seen
        *["fingerprints/ID.json"] * 3,  # weights, their configuration, the noise schedule
        *("samples/ID.lock", "samples/ID.sha256", "samples/ID/images.npy", "scores/ID.json", "scores/ID.lock"),
        *("statistics/ID.lock", "statistics/ID.safetensors", "statistics/ID.safetensors.sha256"),
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


def test_a_finished_job_does_not_run_again(finished, monkeypatch, capsys):
    cfg, run = finished
    before = stamps(run)

    def forbidden(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a finished job did something")

    for name in ("job.load_network", "stages.score.cached"):
        monkeypatch.setattr(f"experiments.engine.{name}", forbidden)
    for name in ("diffusion.load.load_teacher", "diffusion.load.load_network"):
        monkeypatch.setattr(f"lightning_modules.backbones.{name}", forbidden)
    monkeypatch.setattr(hashlib, "file_digest", forbidden)
    run_pipeline(cfg)
    assert stamps(run) == before
    printed = capsys.readouterr().out
    assert f"finished already: {run} (force=true runs it again)" in printed
    assert read_json(run / "finished.json")["summary"] in printed


def test_force_runs_a_finished_job_again_from_nothing(configure, overrides, finished):
    _, run = finished
    before, results = stamps(run), read_json(run / "metrics.json")
    (run / "export" / "left_over").touch()
    run_pipeline(configure(*overrides, "force=true"))
    assert files(run) == FINISHED
    assert read_json(run / "metrics.json") == results
    for name in (
        "networks/pruned/config.json",
        "checkpoints/distil/step=0000004.ckpt",
        "metrics.json",
        "finished.json",
    ):
        assert (run / name).stat().st_mtime_ns > before[name], name


def test_a_forced_job_stopped_while_clearing_is_not_finished(configure, overrides, finished, monkeypatch):
    _, run = finished
    monkeypatch.setattr(
        "experiments.engine.artefacts.shutil.rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(configure(*overrides, "force=true"))
    assert not (run / "finished.json").exists()


def test_a_data_set_is_one_yaml_file_outside_the_repository(configure, overrides, data_folder, images_file, unverified):
    assert not data_folder.is_relative_to(ROOT)
    assert not (ROOT / "conf" / "data" / "tiny.yaml").exists()
    assert {path.suffix for path in (data_folder / "data").iterdir()} == {".yaml"}
    cfg = configure(*overrides)
    assert cfg.data.train.path == str(images_file)
    run_pipeline(cfg)
    batch = next(iter(build(cfg.data).subset("train", 4, 0, 4)))
    with np.load(images_file) as archive:
        shown = ((batch["image"].permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
        assert np.array_equal(shown, archive["x_train"][batch["index"]])
        assert np.array_equal(batch["label"], archive["y_train"][batch["index"]])


# Reports


def test_the_table_of_a_report_names_no_column_twice(finished):
    _, run = finished
    report_set(run.parent)
    heads = list(read_markdown(run.parent / "report" / "table.md"))
    assert len(set(heads)) == len(heads)


def test_a_report_of_no_finished_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))} has no finished run below it"):
        collect_runs(tmp_path)


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


def test_a_run_is_refused_while_another_process_works_on_it(configure, overrides, unverified):
    cfg = configure(*overrides)
    folder = identity(cfg).folder
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", HOLDER, str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunBusy, match=rf"{re.escape(str(folder))} is being made by process {holder.pid} on there"):
            run_pipeline(cfg)
        assert files(folder) == {".lock", ".holder.json"}
    finally:
        holder.kill()
        holder.communicate()
    run_pipeline(cfg)
    assert files(folder) == FINISHED
    assert read_json(folder / ".holder.json")["pid"] == os.getpid()


ASK = """
import os, sys, time
from pathlib import Path
from experiments.engine.cache import cached
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


@pytest.mark.slow
def test_one_of_several_processes_computes_a_cached_result(tmp_path):
    folder, log = tmp_path / "cache", tmp_path / "log"
    command = [sys.executable, "-c", ASK, str(folder), str(log)]
    processes = [
        subprocess.Popen([*command, str(i), "2"], cwd=ROOT, stderr=subprocess.PIPE, text=True) for i in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert len(log.read_text().splitlines()) == 1
    (stored,) = folder.glob("*.json")
    answer = {"answer": list(range(5000))}
    assert read_json(stored) == {"key": {"question": 1}, "sha256": digest(answer), "result": answer}
    assert {path.suffix for path in folder.iterdir()} == {".json", ".lock"}


# Failures


def test_a_folder_that_cannot_be_created_is_named(configure, overrides, tmp_path):
    (tmp_path / "file").write_text("a file, not a folder")
    job = [override for override in overrides if not override.startswith("paths.runs=")]
    with pytest.raises(UnwritableDirectory) as caught:
        run_pipeline(configure(*job, f"paths.runs={tmp_path}/file/runs"))
    assert str(tmp_path / "file") in str(caught.value) and "paths.runs" in str(caught.value)


def test_a_cache_folder_that_cannot_be_created_names_paths_cache(configure, overrides, tmp_path):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(UnwritableDirectory, match=rf"{tmp_path}/file.* with paths\.cache=\.\.\."):
        run_pipeline(configure(*overrides, f"paths.cache={tmp_path}/file/cache"))


@pytest.mark.parametrize(
    ("artefact", "field"), [("plan.json", "teacher"), ("plan.json", "scores"), ("scores.json", "key")]
)
def test_a_stale_artefact_is_refused_with_both_ids(finished, artefact, field):
    cfg, run = finished
    (run / "finished.json").unlink()
    forget_hashes(run)
    content = read_json(run / artefact)
    wanted, content[field] = content[field], "0123456789abcdef" * 4
    (run / artefact).write_text(json.dumps(content))
    with pytest.raises(StaleArtefact) as caught:
        run_pipeline(cfg)
    for part in (str(run / artefact), "0123456789abcdef", wanted[:16], "force=true"):
        assert part in str(caught.value)


def test_ids_are_shown_as_far_as_they_differ():
    one, other = "0" * 63 + "1", "0" * 63 + "2"
    with pytest.raises(StaleArtefact, match=f"belongs to teacher {one}, this run has {other};"):
        check_fresh(Path("plan.json"), "teacher", one, other)


def test_a_new_plan_removes_what_the_old_one_made(finished):
    cfg, run = finished
    before = read_json(run / "plan.json")
    (cache,) = run.parent.parent.glob(".cache/scores/*.json")
    stored = read_json(cache)
    for entry in stored["result"].values():  # as other data would have them
        entry["score"] *= -1
    cache.write_text(json.dumps(stored | {"sha256": digest(stored["result"])}))
    (run / "wandb").mkdir()  # is open while a job runs
    for name in ("finished.json", "scores.json", "plan.json"):
        (run / name).unlink()
    for name in ("failure/distil", "sounds/pruned"):
        (run / name).mkdir(parents=True)
    run_pipeline(cfg)
    plan, metrics = read_json(run / "plan.json"), read_json(run / "metrics.json")
    assert plan["changes"] != before["changes"]
    removed = [change["unit"] for change in plan["changes"]]
    for name in ("networks/pruned", "networks/distilled", "export/unet"):
        assert read_json(run / name / "config.json")["removed_units"] == removed, name
    assert metrics["plan/predicted_harm"] == plan["predicted_harm"]
    assert files(run) == FINISHED and (run / "wandb").exists() and not (run / "sounds").exists()


def test_a_plan_with_an_unknown_unit_is_refused(finished):
    cfg, run = finished
    (run / "finished.json").unlink()
    forget_hashes(run)
    content = read_json(run / "plan.json")
    content["changes"][0]["unit"] = "mid_block.resnet.0"
    (run / "plan.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"'mid_block\.resnet\.0' is not a unit .* nearest are: mid_block\.resnets\.0"
    ) as caught:
        run_pipeline(cfg)
    assert str(run / "plan.json") in str(caught.value)


@pytest.mark.parametrize("artefact", ["scores.json", "plan.json", "metrics.json", "finished.json"])
def test_a_truncated_artefact_without_a_hash_is_named(finished, artefact):
    cfg, run = finished
    forget_hashes(run)
    damaged = run / artefact
    if artefact != "finished.json":
        (run / "finished.json").unlink()
    damaged.write_text(damaged.read_text()[:40])
    with pytest.raises(ValueError, match=rf"{re.escape(str(damaged))} is not readable JSON .*delete it"):
        run_pipeline(cfg)


def test_an_edited_weight_file_is_another_teacher(configure, overrides, teacher_folder, tmp_path):
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
def test_running_out_of_memory_names_stage_and_settings(configure, overrides, monkeypatch, error, explained):
    def score(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("experiments.engine.stages.score.score", score)
    with pytest.raises(OutOfMemory if explained else RuntimeError) as caught:
        run_pipeline(configure(*overrides))
    assert (caught.value if not explained else caught.value.__cause__) is error
    if explained:
        for part in ("stage 'score units'", "calibration.batch_size=2", "data.batch_size=4", "evaluation.batch_size=2"):
            assert part in str(caught.value)


def test_an_infeasible_ratio_fails_before_anything_is_scored(configure, overrides, tmp_path):
    with pytest.raises(InfeasibleBudget, match=r"selection\.ratio=0\.9999 .* the nearest achievable 0\.\d+"):
        run_pipeline(configure(*overrides, "selection.ratio=0.9999"))
    assert not (tmp_path / "runs" / "debug").exists()  # a configuration that is refused leaves no run


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
@pytest.mark.slow
def test_a_changed_export_fails_its_verification(teacher, tmp_path, tamper, found):
    student = teacher.pruned(bypasses(["mid_block.resnets.0", "up_blocks.0.attentions.1"]))
    export(student, tmp_path)
    tamper(tmp_path)
    with pytest.raises(ExportMismatch, match=rf"{re.escape(str(tmp_path))} {found}"):
        verify(student, tmp_path)


def test_a_run_whose_export_does_not_match_is_not_finished(configure, overrides, tmp_path, monkeypatch):
    def mismatch(*_: Any) -> None:
        raise ExportMismatch("differs")

    monkeypatch.setattr("experiments.engine.stages.export.verify", mismatch)
    with pytest.raises(ExportMismatch):
        run_pipeline(configure(*overrides))
    left = FINISHED - {name for name in FINISHED if name.startswith(("export/", "figures/"))}
    assert files(the_run(tmp_path / "runs")) == left - {"finished.json", "report.html"}


# Several processes for one job


def start_two_processes(*job: str) -> None:
    """Start both processes of a job as Lightning does, from one process."""
    train(*job, "trainer=ddp", "trainer.devices=2")


def start_two_machines(*job: str) -> None:
    """Start a job as torchrun does on two machines, with one process on each; here both machines are this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command = [*torchrun, "--rdzv-backend=c10d", place, str(ROOT / "train.py"), *job]
    command += ["trainer=fsdp", "trainer.devices=1", "trainer.num_nodes=2"]
    machines = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [machine.wait(600) for machine in machines] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("start", [start_two_processes, start_two_machines])
def test_two_processes_score_and_train_like_one(configure, overrides, data_folder, tmp_path, unverified, start):
    job = [override for override in overrides if not override.startswith(("paths.runs=", "trainer="))]
    job += ["calibration.samples=6", "calibration.batch_size=2"]
    run_pipeline(configure(*job, "trainer=cpu", f"paths.runs={tmp_path}/one"))
    start("--config-dir", str(data_folder), *job, "trainer.accelerator=cpu", f"paths.runs={tmp_path}/two")
    one, two = the_run(tmp_path / "one"), the_run(tmp_path / "two")
    assert one.name == two.name
    assert files(two) == FINISHED
    expected, found = (read_json(run / "scores.json")["scores"] for run in (one, two))
    assert list(found) == list(expected)
    for name, entry in expected.items():
        assert found[name] == pytest.approx(entry, rel=1e-9), name
    assert read_json(two / "plan.json")["changes"] == read_json(one / "plan.json")["changes"]
    for name, rounding in (("pruned", 1e-6), ("distilled", 1e-3)):  # AdamW enlarges the rounding of small gradients
        losses = (read_json(run / "metrics.json")[f"{name}/output_loss"] for run in (one, two))
        assert next(losses) == pytest.approx(next(losses), rel=rounding), name


@pytest.mark.slow
def test_one_part_is_trained_as_the_whole(overrides, data_folder, tmp_path):
    """FSDP2 on one device, the only kind of it that a machine with one GPU can run."""
    job = [override for override in overrides if not override.startswith(("paths.runs=", "trainer="))]
    job += ["trainer.accelerator=cpu", "trainer.precision=32-true", "evaluation.every_n_steps=2"]
    trained = []
    for strategy in ("auto", "fsdp"):
        runs = tmp_path / strategy
        train(*job, f"trainer.strategy={strategy}", f"paths.runs={runs}", config_dir=data_folder)
        trained.append(load_file(next((the_run(runs) / "networks" / "distilled").glob("*.safetensors"))))
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-4, atol=1e-5)
