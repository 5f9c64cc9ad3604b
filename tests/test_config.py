"""Every configuration that ships works; every one that cannot is refused at once, naming field, value and choices."""

import ast
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, train
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException, MissingConfigException
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from conf import schema
from conf.schema import ConfigError
from experiments import run as run_module
from experiments.pipeline import prune
from experiments.run import Run, digest

CONF = ROOT / "conf"
CHOICES = [
    (path.parent.relative_to(CONF).as_posix(), path.stem)
    for path in sorted(CONF.rglob("*.yaml"))
    if path.parent != CONF
]
IDS = ["/".join(choice) for choice in CHOICES]
REFUSED = (ConfigError, ConfigCompositionException)
FIELDS = {field.name for field in dataclasses.fields(schema.Config)}
GLOBAL = "# @package _global_\n"
PACKAGES = ("conf", "criteria", "datamodules", "experiments", "lightning_modules")


def composed(*overrides: str, folder: Path | None = None) -> DictConfig:
    """The configuration of some overrides, unchecked; `folder` holds configuration files of a user's own."""
    schema.register()
    with initialize_config_module("conf", version_base="1.3"):
        return compose("train", [*([f"hydra.searchpath=['file://{folder}']"] if folder else []), *overrides])


def left_open(node: object, path: str = "") -> Iterator[str]:
    """The paths of the fields that are ???."""
    for key, value in node.items() if isinstance(node, dict) else ():
        yield from [f"{path}{key}"] if value == "???" else left_open(value, f"{path}{key}.")


def required(group: str, choice: str) -> list[str]:
    """Values for the fields that a choice leaves to its user."""
    content = OmegaConf.to_container(composed(f"{group}={choice}"), resolve=False)
    return [f"{key}=somewhere" for key in left_open(content)]


@pytest.fixture
def configure_with(tmp_path: Path) -> Callable[..., DictConfig]:
    """configure_with(file, text, *overrides): checked, with one YAML file more, outside the repository."""

    def make(name: str, text: str, *overrides: str) -> DictConfig:
        path = tmp_path / "my configs" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        cfg = composed(*overrides, folder=tmp_path / "my configs")
        schema.check(cfg)
        return cfg

    return make


def recipe(text: str) -> tuple[str, str]:
    """File and text of an experiment of a user's own."""
    return "experiment/mine.yaml", f"{GLOBAL}{text}\n"


# What ships


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=IDS)
def test_every_choice_of_every_group_composes_and_passes_the_check(configure, group, choice):
    cfg = configure(f"{group}={choice}", *required(group, choice))
    if group in FIELDS and "name" in (node := cfg[group]):
        assert node.name == choice  # tables and dashboards call it what the command line calls it


@pytest.mark.parametrize("experiment", [choice for group, choice in CHOICES if group == "experiment"])
def test_a_whole_recipe_composes_with_the_tiny_debug_settings(configure, experiment):
    cfg = configure(f"experiment={experiment}", "debug=tiny")
    assert (cfg.trainer.steps, cfg.logger.wandb) == (4, False)


def test_the_command_line_wins_over_a_recipe(configure_with):
    cfg = configure_with(*recipe("selection: {ratio: 0.3}\ntrainer: {steps: 7}"), "experiment=mine", "trainer.steps=9")
    assert (cfg.selection.ratio, cfg.trainer.steps) == (0.3, 9)


def test_the_command_line_prints_its_configuration_from_any_folder_and_writes_nothing(data_folder, tmp_path):
    runs = tmp_path / "my runs é"
    process = train(
        "--cfg", "job", "data=tiny", "selection.ratio=0.3", f"paths.runs='{runs}'", config_dir=data_folder, cwd=tmp_path
    )
    cfg = OmegaConf.create(process.stdout)
    assert (cfg.data.name, cfg.selection.ratio, cfg.paths.runs) == ("tiny", 0.3, str(runs))
    assert list(tmp_path.iterdir()) == []


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
def test_a_mistake_in_a_recipe_outside_the_repository_names_file_and_key(configure_with, text, key):
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
        ("evaluation: {metric: {pth: here}}", "evaluation.metric.pth", "path"),
        ("distillation: {w_fea: 1.0}", "distillation.w_fea", "w_feat"),
        ("sampler: {scheduler: {timestep_spcing: leading}}", "sampler.scheduler.timestep_spcing", "timestep_spacing"),
    ],
)
def test_a_typo_beside_a_target_names_the_key_and_the_nearest_parameter(configure_with, text, key, nearest):
    with pytest.raises(ConfigError) as caught:
        configure_with(*recipe(text), "experiment=mine", "criterion=magnitude", "noise_scheduler=linear")
    assert f"{key} is unknown" in str(caught.value) and f"did you mean {nearest!r}?" in str(caught.value)


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=IDS)
def test_a_key_that_nothing_reads_is_refused_in_a_users_own_file_of_any_group(configure_with, group, choice):
    package = "" if group in FIELDS else GLOBAL
    file = (f"{group}/mine.yaml", f"{package}defaults: [{choice}]\nstray_key: 1\n")
    with pytest.raises(REFUSED, match="stray_key"):
        configure_with(*file, f"{group}=mine", *required(group, choice))


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


def test_null_is_a_value_where_a_field_may_be_empty(configure):
    assert configure("trainer.gradient_clip_val=null").trainer.gradient_clip_val is None


def test_a_whole_number_is_taken_for_a_fraction(configure):
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
    keys = [override.split("=")[0] for override in required("data", choice)]
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
        ("logger.mode=ofline", "auto, online, offline"),
    ],
)
def test_a_word_that_is_none_of_the_choices_lists_them(configure, override, choices):
    key, value = override.split("=")
    with pytest.raises(ConfigError) as caught:
        configure(override)
    assert f"{key}={value!r} is unknown; choose one of: {choices}" in str(caught.value)


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
def test_a_decay_of_the_average_outside_0_to_1_is_out_of_range_before_anything_runs(configure, value):
    with pytest.raises(ConfigError) as caught:
        configure(f"ema_decay={value}")
    assert f"ema_decay={float(value)} is out of range" in str(caught.value)


@pytest.mark.parametrize("value", ["0", "1", "-0.1", "1.5", "50", "nan", "inf"])
def test_an_impossible_ratio_fails_before_the_teacher_is_looked_for(configure, tmp_path, value):
    cfg = configure(f"selection.ratio={value}", "teacher.path=/no/such/teacher", f"paths.runs={tmp_path}/runs")
    with pytest.raises(Exception, match=r"selection\.ratio") as caught:
        prune(cfg)
    assert f"selection.ratio={value} is out of range; choose 0 < ratio < 1" in str(caught.value)
    assert ("0.5" in str(caught.value)) == (value == "50")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("selection.tolerance=-0.1", "selection.tolerance=-0.1 is out of range; choose 0 <= tolerance < 1"),
        ("selection.budget=flops", "selection.budget='flops' is unknown; choose one of: params, macs"),
        ("trainer.accelerator=tpu", "trainer.accelerator='tpu' is unknown; choose one of: auto, cpu, gpu"),
    ],
)
def test_impossible_values_fail_before_anything_is_written(configure, overrides, tmp_path, override, message):
    with pytest.raises(Exception, match=re.escape(message)):
        prune(configure(*overrides, override))
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_a_gpu_that_is_not_there_fails_before_anything_is_written(configure, overrides, tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.accelerator='gpu', but no CUDA device is visible") as caught:
        prune(configure(*overrides, "trainer=gpu"))
    assert "trainer=cpu" in str(caught.value) and "trainer=auto" in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_criterion_that_does_not_know_its_option_fails_and_lists_the_choices(configure, overrides):
    with pytest.raises(Exception, match=r"criterion\.reduction='median' is unknown; choose one of: sum, mean"):
        prune(configure(*overrides, "criterion=magnitude", "criterion.reduction=median"))


# The identity of a run

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
]


def identity(cfg, teacher: str = "teacher") -> str:
    return Run(cfg, teacher).id


@pytest.mark.parametrize("override", NO_EFFECT)
def test_what_cannot_change_a_result_does_not_change_the_run_id(configure, override):
    assert identity(configure(override)) == identity(configure())


def test_whatever_changes_a_result_changes_the_run_id(configure):
    ids = [identity(configure(*change)) for change in ([], *([override] for override in EFFECT))]
    assert len({*ids, identity(configure(), "another teacher")}) == len(EFFECT) + 2


def test_the_run_id_does_not_depend_on_how_the_same_values_were_given(configure, configure_with):
    by_file = configure_with(*recipe("selection: {ratio: 0.3}\nseed: 1"), "experiment=mine")
    assert identity(by_file) == identity(configure("selection.ratio=0.3", "seed=1"))
    assert identity(by_file) == identity(configure("seed=1", "selection.ratio=0.3"))


def test_the_run_id_is_the_same_wherever_the_repository_lies(configure, monkeypatch, tmp_path):
    here = identity(configure())
    for module in (schema, run_module):
        monkeypatch.setattr(module, "ROOT", tmp_path / "another place é")
    cfg = configure()
    assert cfg.teacher.path == f"{tmp_path}/another place é/assets/teacher"
    assert identity(cfg) == here


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


def test_a_job_runs_in_a_folder_with_spaces_and_accents_under_the_same_name(configure, overrides, tmp_path):
    cfg = configure(*overrides, f"paths.runs='{tmp_path}/my runs é'")
    prune(cfg)
    (folder,) = (tmp_path / "my runs é" / "debug").iterdir()
    assert (folder / "finished.json").exists() and (folder / "export" / "model_index.json").exists()
    plain = Run(configure(*overrides), run_module.read_json(folder / "plan.json")["teacher"])
    assert (plain.folder.name, plain.id) == (folder.name, run_module.read_json(folder / "metrics.json")["run_id"])


# The shape of the source


def sources(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> Iterator[str]:
    """The absolute names a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def belongs(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("conf", ()),
        ("datamodules", ()),
        ("criteria", ("datamodules.seeding",)),
        ("lightning_modules", ("criteria", "datamodules")),
        ("experiments", ("lightning_modules", "criteria", "datamodules")),
    ],
)
def test_imports_go_one_way(package, allowed):
    """train -> experiments -> lightning_modules -> criteria; conf is for all, and knows none of them."""
    files = sources(package)
    assert files
    for path in files:
        ours = [name for name in imported(path) if belongs(name, "train", "tests", *PACKAGES)]
        assert [name for name in ours if not belongs(name, package, "conf", *allowed)] == [], path


def test_train_wires_and_nothing_else():
    source = (ROOT / "train.py").read_text()
    assert len(source.splitlines()) < 150
    ours = [name for name in imported(ROOT / "train.py") if belongs(name, "tests", *PACKAGES)]
    assert [name for name in ours if not belongs(name, "conf", "experiments")] == []


PICKLES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib")
UNSAFE = ("torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle", "eval", "exec")


def unsafe(source: str) -> list[str]:
    """What in a source could run code that is hidden in data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [
                name for name in names if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "joblib")
            ]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        flags = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        if (
            ("weights_only" in flags and flags["weights_only"] is not True)
            or (name == "torch.load" and flags.get("weights_only") is not True)
            or name
            in ("torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle", "eval", "exec")
            or (name in ("np.load", "numpy.load") and flags.get("allow_pickle") is not False)
            or flags.get("allow_pickle") is True
        ):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "path", [ROOT / "train.py", *sources(*PACKAGES)], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_no_source_loads_or_saves_pickles(path):
    assert unsafe(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "trainer.fit(module, weights_only=False)",
        "import pickle",
        "from pickle import load",
        "torch.save(model, path)",
        "yaml.load(stream)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "exec(text)",
    ],
)
def test_the_scan_for_pickles_finds_them(source):
    assert unsafe(source) != []
