"""Stored outputs of the teacher: the same training as with the teacher on the same draws; others are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.distillation import distillation
from support.networks import bypasses
from support.results import read_repeatable_history, the_run
from support.stops import ctrl_c_after_step
from torch import Tensor

from conf.schema import ConfigError
from datamodules.images import Images
from datamodules.latents import read_manifest
from datamodules.readers.base import MissingData
from datamodules.teacher_outputs import Draws, read_outputs_manifest
from experiments.engine.artefacts import read_json
from experiments.engine.identity import get_effective_settings
from experiments.engine.inputs import build_data, build_teacher
from experiments.engine.pipeline import run_pipeline
from experiments.engine.stages import distil
from experiments.tools.precompute import check_latents, precompute
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.training.trainer import fit

DRAWS = 2
STORED = "distillation.teacher_outputs=stored"


@pytest.fixture
def job(text_job: list[str], tmp_path: Path) -> list[str]:
    """The arguments of a job on latents with mirrored pictures, in several shards."""
    settings = ["precompute.dtype=float32", "precompute.batch_size=4", "precompute.samples_per_shard=12"]
    settings += ["data.flip=true", f"latents={tmp_path}/latents", "distillation=output_only", "distillation.w_task=1"]
    return [*text_job, *settings, f"precompute.teacher_draws={DRAWS}"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of latents and outputs that the first test fills."""
    return tmp_path_factory.mktemp("made") / "latents"


@pytest.fixture
def stored(job: list[str], configure, made: Path, tmp_path: Path) -> Path:
    """The folder of the latents and of the teacher's outputs."""
    if not made.exists():
        precompute(configure(*job, f"latents={made}"))
    return shutil.copytree(made, tmp_path / "latents")


def batches(data: Images, count: int) -> list[dict[str, Any]]:
    loader = iter(data.train_dataloader())
    return [next(loader) for _ in range(count)]


def refuse(*args: Any, **options: Any) -> None:
    raise AssertionError("the teacher was called or moved")


# The training is that of the live teacher


@pytest.fixture
def train(job, stored, configure, tmp_path) -> Callable[..., tuple[dict[str, Tensor], list[Any]]]:
    """Return a function that trains a student on the stored draws -> (its weights, what was logged)."""

    def run(choice: str, name: str) -> tuple[dict[str, Tensor], list[Any]]:
        cfg = configure(*job, "trainer.checkpoint_every=1", "trainer.steps=6", "data.batch_size=4")
        teacher = build_teacher(cfg)
        student = teacher.pruned(bypasses(["down_blocks.0.resnets.0", "mid_block.resnets.1"]))
        if choice == "stored":
            teacher.network.forward = teacher.to = refuse
        module = distillation(student, teacher, w_feat=0, taps=[], teacher_outputs=choice)
        fit(module, build_data(cfg).with_teacher_outputs(), cfg.trainer, tmp_path / name, "distil")
        return module.student.state_dict(), read_repeatable_history(tmp_path / name / "history" / "distil.csv")

    return run


@pytest.mark.slow
def test_training_on_stored_outputs_is_that_on_the_same_draws_with_the_teacher(train):
    """More than one pass, mirrored pictures and text: the same bits, and the teacher is neither called nor moved."""
    (live, losses), (again, same) = train("live", "live"), train("stored", "stored")
    assert losses == same
    assert len({value for _, name, value in losses if name == "train/output"}) == 6
    assert all(torch.equal(live[name], again[name]) for name in live)


@pytest.mark.slow
def test_a_resumed_training_on_stored_outputs_has_the_same_bits(train, monkeypatch, capsys):
    whole, losses = train("stored", "whole")
    with ctrl_c_after_step(monkeypatch, 3), pytest.raises((KeyboardInterrupt, SystemExit)):
        train("stored", "parts")
    resumed, same = train("stored", "parts")
    assert "resuming from step 2 of 6" in capsys.readouterr().out
    assert losses == same
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_a_job_distils_without_its_teacher(job, stored, configure, quick_end, monkeypatch):
    def train_without(job_, *args: Any, **networks: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(job_.teacher.network, "forward", refuse)
            patched.setattr(job_.teacher, "to", refuse)
            return original(job_, *args, **networks)

    original = distil.train
    monkeypatch.setattr(distil, "train", train_without)
    cfg = configure(*job, STORED)
    run_pipeline(cfg)
    run = the_run(Path(cfg.paths.runs))
    logged = read_repeatable_history(run / "history" / "distil.csv")
    assert all(value > 0 for _, name, value in logged if name == "train/output")
    assert {name for _, name, _ in logged} >= {"train/task", "train/output"}
    assert read_json(run / "metrics.json")["eval/output_loss"] > 0


# What is stored


def test_every_stored_output_is_the_teachers_for_its_draw(job, stored, configure):
    data, teacher = build_data(configure(*job)), build_teacher(configure(*job))
    data = data.with_teacher_outputs()
    for batch in batches(data, 8):
        with torch.no_grad():
            expected = teacher.predict(teacher.training_inputs(batch))
        assert torch.equal(batch["teacher_output"], expected)
    rows = len(data.training(0)) * DRAWS * 2
    shards = read_outputs_manifest(stored)["shards"]
    assert sum(shard["rows"] for shard in shards) == rows and len(shards) == 2
    for shard in shards:
        assert load_file(stored / shard["file"])["output"].shape == (shard["rows"], 4, 8, 8)


@pytest.mark.slow
def test_outputs_are_stored_in_the_chosen_type(job, configure):
    folder = precompute(configure(*job, "precompute.dtype=float16"))
    data, teacher = build_data(configure(*job)).with_teacher_outputs(), build_teacher(configure(*job))
    (batch,) = batches(data, 1)
    with torch.no_grad():
        expected = teacher.predict(teacher.training_inputs(batch))
    assert load_file(folder / "outputs-00000.safetensors")["output"].dtype == torch.float16
    assert torch.equal(batch["teacher_output"], expected.half())


def test_a_sample_goes_through_all_its_draws_in_as_many_passes():
    draws, positions = Draws(4, mirrored=True, seed=7), np.arange(4 * 10)
    plain = draws.choose(3, positions.tolist(), 10, np.zeros(40, bool)).reshape(4, 10)
    assert all(sorted(column) == [0, 1, 2, 3] for column in plain.T)
    assert len({int(number) for number in plain[0]}) > 1  # samples begin with draws of their own
    mirrored = draws.choose(3, positions.tolist(), 10, np.ones(40, bool)).reshape(4, 10)
    assert np.array_equal(mirrored, plain + 4) and draws.per_sample == 8
    assert not np.array_equal(draws.choose(4, positions.tolist(), 10, np.zeros(40, bool)), plain.flatten())


def test_every_draw_of_every_sample_has_a_seed_of_its_own():
    draws = Draws(4, mirrored=False, seed=7)
    indices, numbers = np.divmod(np.arange(40), 4)
    seeds = draws.seeds(indices, numbers)
    assert len(seeds.unique()) == 40 and torch.equal(seeds, draws.seeds(indices, numbers))
    assert not (seeds == Draws(4, mirrored=False, seed=8).seeds(indices, numbers)).any()


def test_calibration_and_evaluation_have_no_stored_outputs(job, stored, configure):
    data = build_data(configure(*job))
    with_outputs = data.with_teacher_outputs()
    assert "teacher_output" not in next(iter(with_outputs.subset("holdout", 4, 0, 4)))
    assert "teacher_output" not in batches(data, 1)[0]
    assert {"teacher_output", "draw_seed"} <= batches(with_outputs, 1)[0].keys()


# Precomputing


@pytest.mark.slow
def test_outputs_are_added_to_finished_latents_and_leave_them_alone(job, configure):
    folder = precompute(configure(*job, "precompute.teacher_draws=0"))
    assert not list(folder.glob("outputs*"))
    before = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith("started.json")}
    precompute(configure(*job))
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    assert read_outputs_manifest(folder)["latents"] == read_manifest(folder)["id"]


def test_outputs_whose_computation_was_stopped_go_on(job, stored, configure):
    before = {path.name: path.read_bytes() for path in stored.glob("outputs*")}
    first = (stored / "outputs-00000.safetensors").stat().st_mtime_ns
    for name in ("outputs-00001.json", "outputs-00001.safetensors", "outputs.json"):
        (stored / name).unlink()
    with pytest.raises(MissingData, match=r"no outputs\.json.*precompute\.teacher_draws=8.*teacher_outputs=live"):
        build_data(configure(*job)).with_teacher_outputs()
    precompute(configure(*job))
    assert {path.name: path.read_bytes() for path in stored.glob("outputs*")} == before
    assert (stored / "outputs-00000.safetensors").stat().st_mtime_ns == first


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("precompute.teacher_draws=4", r"another precompute\.teacher_draws \(draws: 2, this job's 4\)"),
        ("seed=1", r"another seed \(seed: 0, this job's 1\)"),
        (
            "trainer.precision=bf16-mixed",
            r"another trainer\.precision \(precision: 32-true, this job's bf16-mixed\)",
        ),
    ],
)
def test_outputs_of_other_draws_are_no_continuation(job, stored, configure, change, difference):
    message = rf"outputs_started\.json was begun with {difference}; choose another folder, or delete outputs\* in it$"
    with pytest.raises(ValueError, match=message):
        precompute(configure(*job, change))


def test_outputs_that_were_deleted_can_be_made_for_other_draws(job, stored, configure):
    others = {path.name for path in stored.iterdir()} - {path.name for path in stored.glob("outputs*")}
    before = {name: (stored / name).read_bytes() for name in others - {"started.json"}}
    for path in stored.glob("outputs*"):
        path.unlink()
    precompute(configure(*job, "seed=1"))
    assert all((stored / name).read_bytes() == content for name, content in before.items())
    assert read_outputs_manifest(stored)["seed"] == 1


def test_outputs_wait_for_latents_that_another_process_makes(job, configure, monkeypatch, caplog):
    from experiments.tools import precompute as tool

    monkeypatch.setattr(tool, "write_missing", lambda note, write: None)
    with caplog.at_level("INFO"):
        folder = precompute(configure(*job))
    assert "call this again for the teacher's outputs" in caplog.text
    assert not (folder / "manifest.json").exists() and not list(folder.glob("outputs*"))


def test_outputs_that_are_not_finite_are_not_stored(job, configure, tmp_path, monkeypatch):
    monkeypatch.setattr(DiffusionBackbone, "predict", lambda self, inputs: inputs["sample"] * torch.inf)
    with pytest.raises(FloatingPointError, match=r"not finite as float32.*samples \[.*precompute\.dtype=float32"):
        precompute(configure(*job))
    assert not list((tmp_path / "latents").glob("outputs-*"))


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("weights", "another teacher"),
        ("attention_head_dim", "a teacher of another configuration"),
        ("scaling_factor", "another scaling of the VAE's latents"),
        ("prediction_type", "a teacher of another prediction type.*is epsilon, this job's v_prediction"),
        ("schedule", "another noise schedule"),
        ("version", "another version.*is 1, this job's 2"),
    ],
)
@pytest.mark.slow
def test_outputs_of_another_teacher_are_refused(job, stored, configure, text_teacher, tmp_path, change, message):
    other = tmp_path / "other"
    shutil.copytree(text_teacher, other)
    if change == "weights":
        file = next((other / "unet").glob("*.safetensors"))
        weights = load_file(file)
        save_file(weights | {"conv_in.bias": weights["conv_in.bias"] + 1}, file, {"format": "pt"})
    elif change == "version":  # the first one had no hash of the configuration
        manifest = read_outputs_manifest(stored)
        del manifest["configuration"]
        (stored / "outputs.json").write_text(json.dumps(manifest | {"version": "1"}))
    else:
        file, settings = {
            "attention_head_dim": ("unet/config.json", {"attention_head_dim": 4}),
            "scaling_factor": ("vae/config.json", {"scaling_factor": 0.5}),
            "prediction_type": ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
            "schedule": ("scheduler/scheduler_config.json", {"beta_end": 0.02}),
        }[change]
        path = other / file
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    cfg = configure(*job, STORED, f"teacher.path={other}")
    with pytest.raises(ValueError, match=rf"computed with {message}.*teacher_outputs=live, or precompute into another"):
        run_pipeline(cfg)
    live = configure(*job, f"teacher.path={other}")
    check_latents(live, build_data(live), build_teacher(live))  # the latents alone can still be used


def test_outputs_of_other_latents_are_refused(job, stored, configure):
    manifest = read_outputs_manifest(stored)
    (stored / "outputs.json").write_text(json.dumps(manifest | {"latents": "0" * 64}))
    with pytest.raises(ValueError, match=r"belong to other latents.*delete outputs\*"):
        build_data(configure(*job)).with_teacher_outputs()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["distillation.w_feat=0.1"], r"distillation\.w_feat=0\.1.*teacher_outputs=live.*w_feat=0"),
        (["distillation.w_out=0"], r"distillation\.w_out=0.*teacher_outputs=live"),
        (["latents=null"], r"latents=null.*precompute\.teacher_draws=8.*teacher_outputs=live"),
        (["distillation.teacher_outputs=both"], r"teacher_outputs='both' is unknown; choose one of: live, stored"),
        (["precompute.teacher_draws=-1"], r"precompute\.teacher_draws=-1 is out of range"),
    ],
)
def test_what_cannot_use_stored_outputs_is_refused_before_anything_is_read(job, configure, change, message):
    with pytest.raises(ConfigError, match=message):
        configure(*job, STORED, *change)


def test_a_pretraining_has_no_outputs_to_store(configure):
    with pytest.raises(ConfigError, match=r"precompute\.teacher_draws=2: a pretraining has no teacher; choose 0"):
        configure("experiment=pretrain_cifar10_t2i", "precompute.teacher_draws=2")


def test_data_that_are_not_read_from_latents_have_no_outputs(overrides, configure):
    with pytest.raises(ValueError, match=r"\(Images\) are not read from stored latents.*teacher_outputs=live"):
        build_data(configure(*overrides)).with_teacher_outputs()


# The identity of runs


@pytest.mark.slow
def test_stored_outputs_are_part_of_the_identity_of_the_runs_that_read_them(job, configure, tmp_path):
    folder = precompute(configure(*job, "precompute.teacher_draws=0"))
    live = get_effective_settings(configure(*job))
    precompute(configure(*job))
    assert get_effective_settings(configure(*job)) == live and "teacher_outputs" not in live["distillation"]
    shutil.copytree(folder, tmp_path / "elsewhere")
    found = [get_effective_settings(configure(*job, STORED, *more)) for more in ([], [f"latents={tmp_path}/elsewhere"])]
    assert found[0] == found[1] != live
    shutil.rmtree(folder)
    precompute(configure(*job, "precompute.teacher_draws=1"))
    assert get_effective_settings(configure(*job, STORED))["latents"] == found[0]["latents"]
    assert get_effective_settings(configure(*job, STORED)) != found[0]


def test_a_stage_with_settings_of_its_own_reads_outputs_too(job, stored, configure):
    settings = "+pipeline.stages.distil.settings={distillation:{teacher_outputs:stored}}"
    assert get_effective_settings(configure(*job, settings))["teacher_outputs"] == read_outputs_manifest(stored)["id"]
