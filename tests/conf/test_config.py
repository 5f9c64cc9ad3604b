"""Every configuration that ships works; every one that cannot is refused at once, naming field, value and choices."""

import dataclasses
import functools
import re
import shutil
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from support.config import GLOBAL, composed, recipe
from support.process import ROOT, train

from conf import checks, schema, search_path
from conf.schema import ConfigError
from experiments.engine.pipeline import run_pipeline

CONF = ROOT / "conf"
CHOICES = [
    (path.parent.relative_to(CONF).as_posix(), path.stem)
    for path in sorted(CONF.rglob("*.yaml"))
    if path.parent != CONF
]
IDS = ["/".join(choice) for choice in CHOICES]
FIRST_CHOICES = dict(reversed(CHOICES))
"""{group: the first of its choices}"""
REFUSED = (ConfigError, ConfigCompositionException)
FIELDS = {field.name for field in dataclasses.fields(schema.Config)}


def left_open(node: object, path: str = "") -> Iterator[str]:
    """The paths of the fields that are ???."""
    for key, value in node.items() if isinstance(node, dict) else ():
        yield from [f"{path}{key}"] if value == "???" else left_open(value, f"{path}{key}.")


@functools.cache
def required(group: str, choice: str) -> list[str]:
    """The fields that a choice leaves to its user."""
    return list(left_open(OmegaConf.to_container(composed(f"{group}={choice}"), resolve=False)))


def completed(*overrides: str) -> DictConfig:
    """The checked configuration of some overrides, with a value for every field that is left to the user."""
    cfg = composed(*overrides)
    for key in left_open(OmegaConf.to_container(cfg, resolve=False)):
        OmegaConf.update(cfg, key, "somewhere")
    checks.check_config(cfg)
    return cfg


# What ships


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=IDS)
def test_every_choice_of_every_group_composes_and_passes_the_check(group, choice):
    cfg = completed(f"{group}={choice}")
    if group in FIELDS and "name" in (node := cfg[group]):
        assert node.name == choice  # tables and dashboards call it what the command line calls it


@pytest.mark.parametrize("experiment", [choice for group, choice in CHOICES if group == "experiment"])
def test_a_recipe_composes_with_debug_tiny(experiment):
    cfg = completed(f"experiment={experiment}", "debug=tiny")
    assert (cfg.trainer.steps, cfg.logger.wandb) == (4, False)


def test_the_command_line_wins_over_a_recipe(configure_with):
    cfg = configure_with(*recipe("selection: {ratio: 0.3}\ntrainer: {steps: 7}"), "experiment=mine", "trainer.steps=9")
    assert (cfg.selection.ratio, cfg.trainer.steps) == (0.3, 9)


def test_cfg_job_prints_the_configuration_and_writes_nothing(data_folder, tmp_path):
    """A file of the user's own has the name of one of conf/, and is the one that is used."""
    runs, folder = tmp_path / "my runs é", tmp_path / "my configs"
    shutil.copytree(data_folder, folder)
    (folder / "sampler").mkdir()
    (folder / "sampler" / "ddim.yaml").write_text("name: mine\nsteps: 7\nscheduler: null\n")
    job = ["data=tiny", "sampler=ddim", "selection.ratio=0.3", f"paths.runs='{runs}'"]
    process = train("--cfg", "job", *job, config_dir=folder, cwd=tmp_path)
    cfg = OmegaConf.create(process.stdout)
    assert (cfg.data.name, cfg.selection.ratio, cfg.paths.runs) == ("tiny", 0.3, str(runs))
    assert (cfg.sampler.name, cfg.sampler.steps) == ("mine", 7)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_searchpath_file_with_a_built_in_name_is_refused(tmp_path, monkeypatch):
    source = SimpleNamespace(provider="hydra.searchpath in command-line", schema="file", path=str(tmp_path))
    hydra = SimpleNamespace(runtime=SimpleNamespace(config_sources=[source]))
    monkeypatch.setattr(search_path.HydraConfig, "get", lambda: hydra)
    for name in ("mine.yaml", "ddim.yaml"):
        search_path.check_shadowed_files()
        (tmp_path / "sampler").mkdir(exist_ok=True)
        (tmp_path / "sampler" / name).touch()
    with pytest.raises(ConfigError, match=rf"hydra\.searchpath: {tmp_path}/sampler/ddim\.yaml has the name"):
        search_path.check_shadowed_files()


def test_debug_tiny_measures_few_images_of_a_classifier(configure):
    job = ("task=classification", "evaluation=[accuracy,accuracy_top5]", "teacher.path=/elsewhere")
    for more, images in (((), None), (("debug=tiny",), 4)):
        metrics = configure(*job, *more).evaluation.metrics
        assert [metric.images for metric in metrics.values()] == [images, images]


# Typos


@pytest.mark.parametrize(
    "override",
    [
        "sede=1",
        "trainer.stpes=3",
        "calibration.sample=8",
        "evaluation.sampels=3",
        "paths.run=here",
        "logger.wandbb=false",
        "selection.ratoi=0.3",
        "data.batchsize=2",
        "+sede=1",
        "+trainer.stpes=3",
        "+evaluation.sampels=3",
        "+selection.ratoi=0.3",
        "+data.batchsize=2",
    ],
)
def test_a_typo_on_the_command_line_names_the_key(configure, override):
    with pytest.raises(REFUSED) as caught:
        configure(override)
    assert override.lstrip("+").split("=")[0].split(".")[-1] in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("sede: 1", "sede"),
        ("trainer: {stpes: 3}", "trainer.stpes"),
        ("evaluation: {sampels: 3}", "evaluation.sampels"),
        ("criteron: {name: magnitude}", "criteron"),
        ("trainer: {steps: abc}", "trainer.steps"),
    ],
)
def test_a_mistake_in_an_own_recipe_names_file_and_key(configure_with, text, key):
    with pytest.raises(ConfigCompositionException) as caught:
        configure_with(*recipe(text), "experiment=mine")
    assert "experiment/mine" in str(caught.value) and f"full_key: {key}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("criterion: {reductoin: mean}", "criterion.reductoin", "reduction"),
        ("selection: {tolerence: 0.1}", "selection.tolerence", "tolerance"),
        ("teacher: {pth: here}", "teacher.pth", "path"),
        ("data: {batchsize: 2}", "data.batchsize", "batch_size"),
        ("data: {train: {tlie: 8}}", "data.train.tlie", "tile"),
        ("optimizer: {weigth_decay: 0.1}", "optimizer.weigth_decay", "weight_decay"),
        ("lr_scheduler: {num_warmup_step: 1}", "lr_scheduler.num_warmup_step", "num_warmup_steps"),
        ("noise_scheduler: {beta_ends: 0.1}", "noise_scheduler.beta_ends", "beta_end"),
        (
            "evaluation: {metrics: {frechet_resnet20: {featurs: 1}}}",
            "evaluation.metrics.frechet_resnet20.featurs",
            "features",
        ),
        ("distillation: {w_fea: 1.0}", "distillation.w_fea", "w_feat"),
        ("sampler: {scheduler: {timestep_spcing: leading}}", "sampler.scheduler.timestep_spcing", "timestep_spacing"),
    ],
)
def test_a_typo_beside_a_target_names_the_nearest_parameter(configure_with, text, key, nearest):
    with pytest.raises(ConfigError) as caught:
        configure_with(*recipe(text), "experiment=mine", "criterion=magnitude", "noise_scheduler=linear")
    assert f"{key} is unknown" in str(caught.value) and f"did you mean {nearest!r}?" in str(caught.value)


@pytest.mark.parametrize(("group", "choice"), FIRST_CHOICES.items())
def test_an_unknown_key_in_an_own_file_is_refused_in_any_group(configure_with, group, choice):
    package = "" if group in FIELDS else GLOBAL
    file = (f"{group}/mine.yaml", f"{package}defaults: [{choice}]\nstray_key: 1\n")
    with pytest.raises(REFUSED, match="stray_key"):
        configure_with(*file, f"{group}=mine", *(f"{key}=somewhere" for key in required(group, choice)))


# Types


@pytest.mark.parametrize(
    "override",
    [
        "trainer.steps=abc",
        "trainer.steps=1.5",
        "trainer.devices=true",
        "trainer.gradient_clip_val=high",
        "seed=abc",
        "force=maybe",
        "logger.wandb=perhaps",
        "calibration.samples=2.5",
        "ema_decay=slow",
        "selection.ratio=half",
        "selection.target=half",
        "selection.protected=mid_block",
        "data.batch_size=2.5",
        "data.batch_size=true",
        "data.flip=maybe",
        "data.train.tile=large",
        "distillation.w_out=some",
        "lr_scheduler.num_warmup_steps=abc",
        "optimizer.lr=fast",
        "sampler.steps=abc",
    ],
)
def test_a_value_of_the_wrong_type_names_field_and_value(configure, override):
    key, value = override.split("=")
    with pytest.raises(REFUSED) as caught:
        configure(override)
    assert key in str(caught.value) and value in str(caught.value).lower()


def test_null_is_valid_where_a_field_may_be_empty(configure):
    assert configure("trainer.gradient_clip_val=null").trainer.gradient_clip_val is None


def test_a_whole_number_is_valid_for_a_fraction(configure):
    assert configure("distillation.w_out=1").distillation.w_out == 1


@pytest.mark.parametrize("key", ["distillation.w_out", "optimizer.lr"])
def test_a_number_in_quotes_never_reaches_a_class_as_text(configure, key):
    try:
        found = OmegaConf.select(configure(f"{key}='0.25'"), key)
    except ConfigError as error:
        assert f"{key}='0.25'" in str(error)
    else:
        assert found == 0.25


def test_a_target_that_cannot_be_imported_names_field_and_value(configure):
    with pytest.raises(ConfigError, match=r"criterion\._target_='criteria\.nothing\.Nothing' cannot be imported"):
        configure("criterion._target_=criteria.nothing.Nothing")


@pytest.mark.parametrize("choice", ["hf_images", "image_folder"])
def test_a_field_that_was_left_open_is_named(configure, choice):
    keys = required("data", choice)
    with pytest.raises(ConfigError) as caught:
        configure(f"data={choice}")
    assert keys and keys[0] in str(caught.value)


# Choices and ranges


@pytest.mark.parametrize("group", sorted({group for group, _ in CHOICES}))
def test_an_unknown_choice_lists_the_choices_there_are(configure, group):
    with pytest.raises(MissingConfigException) as caught:
        configure(f"{group}=nonsense")
    listed = str(caught.value).partition("Config search path")[0].split()
    assert f"'{group}/nonsense'" in listed
    assert {choice for name, choice in CHOICES if name == group} <= set(listed)


@pytest.mark.parametrize(
    ("override", "choices"),
    [
        ("trainer.resume=requierd", "auto, required"),
        ("trainer.strategy=fsdp2", "auto, ddp, ddp_find_unused_parameters_true, fsdp"),
        ("logger.mode=ofline", "auto, online, offline"),
    ],
)
def test_an_unknown_word_lists_the_choices(configure, override, choices):
    key, value = override.split("=")
    with pytest.raises(ConfigError) as caught:
        configure(override)
    assert f"{key}={value!r} is unknown; choose one of: {choices}" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.precision=16-mixed", "trainer.precision='16-mixed': .*; choose bf16-mixed, 32-true or auto"),
        ("trainer.compile=true", "trainer.compile=true: .*; choose trainer.compile=false, or trainer.strategy=ddp"),
    ],
)
def test_what_sharded_networks_cannot_be_trained_with_is_refused(configure, override, message):
    configure("trainer=ddp", override)
    with pytest.raises(ConfigError, match=message):
        configure("trainer=fsdp", override)


@pytest.mark.parametrize("value", ["0", "-1"])
@pytest.mark.parametrize(
    "key",
    [
        "trainer.steps",
        "trainer.accumulate_grad_batches",
        "trainer.checkpoint_every",
        "trainer.devices",
        "trainer.num_nodes",
        "calibration.samples",
        "calibration.batch_size",
        "evaluation.samples",
        "evaluation.batch_size",
        "evaluation.loss_samples",
        "evaluation.latency_batch",
        "evaluation.latency_repeats",
        "data.batch_size",
        "sampler.steps",
    ],
)
def test_counts_below_one_are_out_of_range(configure, key, value):
    with pytest.raises(ConfigError) as caught:
        configure(f"{key}={value}")
    assert f"{key}={value} is out of range" in str(caught.value)


@pytest.mark.parametrize("value", ["1.0", "1.5", "-0.1"])
def test_a_decay_outside_of_0_to_1_is_out_of_range(configure, value):
    with pytest.raises(ConfigError) as caught:
        configure(f"ema_decay={value}")
    assert f"ema_decay={float(value)} is out of range" in str(caught.value)


@pytest.mark.parametrize("value", ["0", "1", "-0.1", "1.5", "50", "nan", "inf"])
def test_an_impossible_ratio_fails_before_the_teacher_is_read(configure, value):
    with pytest.raises(ConfigError) as caught:
        configure(f"selection.ratio={value}", "teacher.path=/no/such/teacher")
    message = f"selection.ratio={value} is out of range; choose 0 < ratio < 1 (a fraction, not a percentage)"
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("selection.tolerance=-0.1", "selection.tolerance=-0.1 is out of range; choose 0 <= tolerance < 1"),
        ("selection.budget=flop", "selection.budget='flop' is unknown; choose one of: params, macs"),
        ("selection.target=5e6", "selection.ratio=0.5, selection.target=5000000.0: give exactly one of the two"),
        ("trainer.accelerator=tpu", "trainer.accelerator='tpu' is unknown; choose one of: auto, cpu, gpu"),
        ("lr_scheduler.num_warmup_steps=-5", "lr_scheduler.num_warmup_steps=-5 is out of range; choose a whole number"),
        ("lr_scheduler.num_warmup_steps=5", "lr_scheduler.num_warmup_steps=5 is longer than the training, trainer.st"),
    ],
)
def test_impossible_values_fail_before_anything_is_written(configure, overrides, tmp_path, override, message):
    with pytest.raises(Exception, match=re.escape(message)):
        run_pipeline(configure(*overrides, override))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_default_warm_up_is_no_longer_than_the_training(configure, schedule):
    warm_ups = {steps: configure(f"lr_scheduler={schedule}", f"trainer.steps={steps}") for steps in (4, 10, 150)}
    assert {steps: cfg.lr_scheduler.num_warmup_steps for steps, cfg in warm_ups.items()} == {4: 4, 10: 10, 150: 10}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_fails_before_anything_is_written(configure, overrides, tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.accelerator='gpu', but no CUDA device is visible") as caught:
        run_pipeline(configure(*overrides, "trainer=gpu"))
    assert "trainer=cpu" in str(caught.value) and "trainer=auto" in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_option_of_a_criterion_lists_the_choices(configure, overrides):
    with pytest.raises(Exception, match=r"criterion\.reduction='median' is unknown; choose one of: sum, mean"):
        run_pipeline(configure(*overrides, "criterion=magnitude", "criterion.reduction=median"))


@pytest.mark.parametrize("criterion", ["output_loss", "wanda"])
def test_a_criterion_without_levels_names_criteria_with_levels(configure, criterion):
    with pytest.raises(ConfigError, match=f"criterion={criterion} takes no criterion.level='channel'") as caught:
        configure("task=classification", f"criterion={criterion}")
    assert "such as: bottleneck, magnitude, taylor, random" in str(caught.value)
