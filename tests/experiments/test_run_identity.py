"""The identity of a run: what changes it, what does not, and that it does not depend on where things lie."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from support.config import composed, recipe
from support.images import pictures
from support.process import ROOT

from conf import schema
from conf.schema import build
from experiments.engine import identity as run_module
from experiments.engine.artefacts import digest, read_json
from experiments.engine.data_identity import ChangedData, check_data_unchanged, fingerprint_data
from experiments.engine.pipeline import run_pipeline
from experiments.engine.run import Run
from lightning_modules.backbones.files import list_weight_files

NO_EFFECT = [
    "paths.runs=/elsewhere",
    "paths.runs='/else where/é'",
    "paths.cache=/elsewhere",
    "name=other",
    "label=other",
    "force=true",
    "logger=csv",
    "logger.mode=offline",
    "logger.project=other",
    "trainer=cpu",
    "trainer=ddp",
    "trainer.devices=2",
    "trainer.num_nodes=2",
    "trainer.resume=required",
    "trainer.checkpoint_every=7",
    "trainer.log_every_n_steps=7",
    "data.num_workers=3",
    "calibration.memory_gib=1",
    "export.push_to_hub=owner/name",
    "export.onnx=false",
    "evaluation.latency_batch=3",
    "evaluation.latency_repeats=3",
]
EFFECT = [
    "seed=1",
    "selection.ratio=0.3",
    "selection.tolerance=0.05",
    "selection.budget=macs",
    "selection=greedy",
    "criterion=magnitude",
    "calibration.seed=1",
    "calibration.samples=3",
    "data.batch_size=3",
    "data.flip=false",
    "distillation.w_feat=0.5",
    "distillation=none",
    "optimizer.lr=0.1",
    "ema_decay=null",
    "noise_scheduler=linear",
    "sampler.steps=3",
    "sampler.guidance=2",
    "evaluation.samples=3",
    "evaluation.seed=1",
    "evaluation.batch_size=3",
    "trainer.steps=3",
    "trainer.accumulate_grad_batches=2",
    "trainer.precision=bf16-mixed",
    "teacher.path=/elsewhere",
    "export.onnx=true",
]


def identity(cfg, teacher: str = "teacher") -> str:
    return Run(cfg, teacher).id


@pytest.mark.parametrize("override", NO_EFFECT)
def test_settings_without_effect_do_not_change_the_run_id(configure, override):
    assert identity(configure(override)) == identity(configure())


@pytest.mark.slow
def test_settings_with_an_effect_change_the_run_id(configure):
    ids = [identity(configure(*change)) for change in ([], *([override] for override in EFFECT))]
    assert len({*ids, identity(configure(), "another teacher")}) == len(EFFECT) + 2


def test_the_run_id_does_not_depend_on_where_values_come_from(configure, configure_with):
    by_file = configure_with(*recipe("selection: {ratio: 0.3}\nseed: 1"), "experiment=mine")
    assert identity(by_file) == identity(configure("selection.ratio=0.3", "seed=1"))
    assert identity(by_file) == identity(configure("seed=1", "selection.ratio=0.3"))


def test_the_run_id_is_the_same_wherever_the_repository_lies(configure, monkeypatch, tmp_path):
    here = identity(configure())
    (tmp_path / "another place é").mkdir()
    (tmp_path / "another place é" / "assets").symlink_to(schema.ROOT / "assets")
    for module in (schema, run_module):
        monkeypatch.setattr(module, "ROOT", tmp_path / "another place é")
    cfg = configure()
    assert cfg.teacher.path == f"{tmp_path}/another place é/assets/teacher"
    assert identity(cfg) == here


@pytest.mark.parametrize("place", ["ROOT-latents", "ROOT/latents"])
def test_latents_beside_and_inside_the_repository_are_read(configure, monkeypatch, tmp_path, place):
    root = tmp_path / "sec"
    root.mkdir()
    folder = tmp_path / place.replace("ROOT", "sec")
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"id": "x"}))
    cfg = configure(f"latents={folder}")
    monkeypatch.setattr(run_module, "ROOT", root)
    monkeypatch.setattr(
        run_module, "read_manifest", lambda path: json.loads((Path(path) / "manifest.json").read_text())
    )
    assert run_module.get_effective_settings(cfg)["latents"] == "x"


def test_only_paths_below_the_repository_are_written_as_below_root(monkeypatch):
    monkeypatch.setattr(run_module, "ROOT", Path("/data/sec"))
    values = ["/data/sec", "/data/sec/a b", "/data/sec-latents", "/data/secret/x", "see /data/sec", "/data"]
    assert run_module.make_portable(values) == ["ROOT", "ROOT/a b", *values[2:]]


def test_a_class_keeps_its_identity_in_another_module(configure):
    cfg = configure()
    before = run_module.get_effective_settings(cfg)
    assert before["criterion"]["_target_"] == "criteria.OutputLoss"
    cfg.criterion._target_ = "criteria.elsewhere.deeper.OutputLoss"
    assert run_module.get_effective_settings(cfg) == before
    for other in ("criteria.elsewhere.TaskLoss", "mine.OutputLoss", "mine.criteria.OutputLoss"):
        cfg.criterion._target_ = other
        assert run_module.get_effective_settings(cfg) != before


def test_class_names_in_configurations_are_unique_per_package():
    """Else two configurations that mean different classes would be one run."""
    targets = re.findall(r"_target_: *([\w.]+)", "".join(path.read_text() for path in (ROOT / "conf").rglob("*.yaml")))
    own = {target for target in targets if target.partition(".")[0] in run_module.PACKAGES}
    assert len({run_module.drop_modules({"_target_": target})["_target_"] for target in own}) == len(own) > 50


def test_other_weights_of_a_measure_under_the_same_path_are_another_run(configure, monkeypatch, tmp_path):
    weights = tmp_path / "resnet20.safetensors"
    job, found = f"evaluation.metrics.frechet_resnet20.features.path={weights}", []
    for content in (b"these", b"those"):
        weights.write_bytes(content)
        found.append(identity(configure(job)))
    assert len({*found, identity(configure())}) == 3


LABELS = [
    ("evaluation=accuracy", "data.name=imagenet"),
    ("evaluation=class_accuracy",),  # classes: [airplane, ...]
    ("evaluation=perplexity_raw",),  # text: test, a split on the hub
    ("evaluation.prompts=[airplane]",),
    ("pretrain=classifier",),  # architecture: resnet20
]


@pytest.mark.parametrize("words", LABELS)
def test_labels_and_texts_are_never_taken_for_files(configure, monkeypatch, tmp_path, words):
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    before = identity(configure(*words))
    for place in (tmp_path, tmp_path / "data"):
        for name in ("imagenet", "airplane", "test", "resnet20"):
            (place / name).mkdir(parents=True)
            (place / name / "stray.json").write_text("{}")
    assert identity(configure(*words)) == before


def test_a_file_with_the_prompts_is_part_of_the_run(configure, tmp_path):
    job = f"evaluation.prompts={{_target_: datamodules.texts.prompts.read_prompts, path: {tmp_path}/prompts.txt}}"
    found = []
    for content in ("a cat", "a dog"):
        (tmp_path / "prompts.txt").write_text(content)
        found.append(identity(configure(job)))
    assert len({*found}) == 2


def test_the_readme_shows_the_run_id_of_the_default_job(tmp_path):
    cfg = composed(f"paths.runs={tmp_path}")
    teacher = run_module.fingerprint(list_weight_files(cfg.teacher.path, None), tmp_path)
    folder = Run(cfg, teacher).folder
    assert f"runs/{cfg.name}/{folder.name}/report.html" in (schema.ROOT / "README.md").read_text()


# What comes from the environment


def test_a_configuration_is_written_with_resolved_values(configure):
    cfg = configure("task=classification")
    assert run_module.get_written_settings(cfg) == OmegaConf.to_container(cfg, resolve=True)


def test_texts_of_environment_variables_are_not_written(configure, overrides, monkeypatch):
    monkeypatch.setenv("MY_FOLDER", "secret-folder")
    monkeypatch.setenv("MY_SEED", "7")
    given = ["data.name=${oc.env:MY_FOLDER}", "label=x-${data.name}", "seed='${oc.decode:${oc.env:MY_SEED}}'"]
    cfg = configure(*overrides, *given, "selection.protected=[a,'${oc.env:MY_FOLDER}']", "calibration.seed=${seed}")
    run = Run(cfg, "teacher")
    with run.open():
        written = (run / "config.yaml").read_text()
    shown = run_module.get_displayed_settings(cfg)
    for content in (OmegaConf.to_container(OmegaConf.create(written)), run_module.get_written_settings(cfg)):
        assert content["data"]["name"] == "${oc.env:MY_FOLDER}" and content["label"] == "x-${data.name}"
        assert content["seed"] == content["calibration"]["seed"] == 7  # a number, with which reports compute
        assert content["selection"]["protected"] == ["a", "${oc.env:MY_FOLDER}"]
    assert "secret" not in written and "secret" not in str(shown) and shown["selection"]["ratio"] == 0.5
    assert "secret-folder" in str(run_module.get_effective_settings(cfg))
    monkeypatch.setenv("MY_SEED", "8")
    assert Run(configure(*overrides, *given), "teacher").id != run.id


def test_the_number_of_measured_images_changes_only_classifier_runs(configure):
    classifier = ("task=classification", "teacher.path=/elsewhere")
    for job in ((), classifier):
        assert "images" not in run_module.get_effective_settings(configure(*job))["evaluation"]
    assert identity(configure("evaluation.images=9")) == identity(configure())
    assert identity(configure(*classifier, "evaluation.images=9")) != identity(configure(*classifier))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@settings(derandomize=True, database=None, deadline=None, max_examples=50)
@given(st.dictionaries(st.text(max_size=5), json_values, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_a_digest_does_not_depend_on_the_order_of_keys(content, random):
    keys = list(content)
    random.shuffle(keys)
    assert digest({key: content[key] for key in keys}) == digest(content)
    assert digest(content | {keys[0]: [content[keys[0]]]}) != digest(content)


@pytest.mark.slow
def test_a_job_runs_in_a_folder_with_spaces_and_accents(configure, overrides, tmp_path):
    cfg = configure(*overrides, f"paths.runs='{tmp_path}/my runs é'")
    run_pipeline(cfg)
    (folder,) = (tmp_path / "my runs é" / "debug").iterdir()
    assert (folder / "finished.json").exists() and (folder / "export" / "model_index.json").exists()
    plain = Run(configure(*overrides), read_json(folder / "plan.json")["teacher"])
    assert (plain.folder.name, plain.id) == (folder.name, read_json(folder / "metrics.json")["run_id"])


# Data


@pytest.fixture
def pictures_job(tmp_path: Path) -> Callable[[str], list[str]]:
    """pictures_job(folder) -> arguments of a job on its 12 pictures, which ends where its data have been checked."""

    def make(folder: str) -> list[str]:
        data = ["data=image_folder", f"data.path={tmp_path / folder}", "data.size=8", "data.holdout_images=4"]
        return [*data, f"paths.runs={tmp_path}/runs", f"paths.cache={tmp_path}/cache"]

    return make


def write_pictures(folder: Path, seed: int) -> None:
    folder.mkdir(exist_ok=True)
    for number, picture in enumerate(pictures(12, 8, seed)):
        Image.fromarray(picture).save(folder / f"{number}.png")


def run_of(cfg) -> Run:
    return Run(cfg, "teacher", fingerprint_data(cfg, build(cfg.data)))


def test_data_that_changed_under_the_same_path_are_refused(configure, pictures_job, tmp_path):
    write_pictures(tmp_path / "set", seed=0)
    cfg = configure(*pictures_job("set"))
    with (first := run_of(cfg)).open():
        pass
    write_pictures(tmp_path / "set", seed=1)
    with (
        pytest.raises(ChangedData, match=rf"data=image_folder: .*not those that {first.folder} .*force=true"),
        run_of(cfg).open(),
    ):
        pass
    with (forced := run_of(configure(*pictures_job("set"), "force=true"))).open():
        pass
    with run_of(cfg).open():
        pass
    assert forced.id == first.id == run_of(cfg).id


def test_a_run_of_moved_data_is_the_same_run(configure, pictures_job, tmp_path):
    write_pictures(tmp_path / "set", seed=0)
    first = run_of(configure(*pictures_job("set")))
    assert first.id == identity(configure(*pictures_job("set")))  # as it was before there were fingerprints
    (tmp_path / "set").rename(tmp_path / "moved")
    write_pictures(tmp_path / "set", seed=1)
    assert run_of(configure(*pictures_job("moved"))).id == first.id
    assert run_of(configure(*pictures_job("moved"), "data.flip=false")).id != first.id


def test_a_run_without_a_fingerprint_still_counts(configure, pictures_job, tmp_path):
    write_pictures(tmp_path / "set", seed=0)
    cfg = configure(*pictures_job("set"))
    with (run := run_of(cfg)).open():
        pass
    (run / "data.json").unlink()
    write_pictures(tmp_path / "set", seed=1)
    check_data_unchanged(run.folder, run_of(cfg).fingerprints, cfg)
    shutil.rmtree(tmp_path / "set")  # nothing to compare with
    assert run_of(cfg).fingerprints == {}


@pytest.mark.parametrize(("package", "kept"), [("datamodules", False), ("mylab", True)])
def test_a_later_field_at_its_default_is_left_out_of_this_projects_classes_only(package, kept):
    node = {"name": "mine", "train": {"_target_": f"{package}.Pictures", "path": "/pictures", "fit": "crop"}}
    later = run_module.drop_later_fields(node, run_module.LATER_FIELDS["data"])
    assert later == (
        node if kept else {"name": "mine", "train": {"_target_": f"{package}.Pictures", "path": "/pictures"}}
    )
