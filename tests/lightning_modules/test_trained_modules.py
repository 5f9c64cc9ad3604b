"""Modules, losses, callbacks, loggers and Trainer options of users: which are accepted, and which are refused."""

import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from support.distillation import REMOVED, STAGES, distillation, losses_of, outputs_of
from support.networks import bypasses, tiny_backbone, tiny_batch
from support.results import the_run

from conf.checks import PIPELINE_ARGUMENTS, PROJECT_ARGUMENTS
from conf.schema import ConfigError
from experiments.engine.identity import get_effective_settings
from experiments.engine.pipeline import run_pipeline
from lightning_modules.losses.cosine import CosineDistance
from lightning_modules.modules.autoencoder import Autoencoder
from lightning_modules.modules.base import can_be_fused
from lightning_modules.modules.denoiser import Denoiser
from lightning_modules.modules.lora import Lora
from lightning_modules.training.trainer import fit, make_trainer

MODULES = '''
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger

from lightning_modules.modules.base import DistillationModule


class Outputs(DistillationModule):
    """Minimises the mean absolute difference of the outputs, times `scale`."""

    def __init__(self, student, teacher, scale: float = 1.0, **others):
        super().__init__(student, teacher, **others)
        self.scale = scale

    def losses(self, batch):
        inputs = self.student.training_inputs(batch)
        with torch.no_grad():
            expected = self.teacher.predict(inputs)
        return {"loss": self.scale * (self.student.predict(inputs) - expected).abs().mean()}


class Strict(Outputs):
    @classmethod
    def check_settings(cls, settings, teacher, narrower):
        raise ValueError(f"scale={settings['scale']}, narrower={narrower}, {len(teacher.stages())} stages")


class NoResult(pl.LightningModule):
    def __init__(self, student, teacher, optimizer, lr_scheduler, seed, dump):
        super().__init__()


class NoSeed(DistillationModule):
    def __init__(self, student, teacher, optimizer, lr_scheduler, dump):
        super().__init__(student, teacher, optimizer, lr_scheduler, 0, dump)


class NoModule:
    def __init__(self, **arguments):
        pass


def make_no_result(**arguments) -> NoResult:
    return NoResult(**arguments)


def doubled(student, teacher):
    return 2 * (student - teacher).square().mean()


class Doubled:
    def __call__(self, student, teacher):
        return doubled(student, teacher)


class Steps(Callback):
    seen = []

    def on_train_batch_end(self, trainer, *arguments):
        self.seen.append(trainer.global_step)
'''


@pytest.fixture
def write_config(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function (file, text) that writes a configuration file; the module `own_modules` can be imported."""
    folder = data_folder / "own python"
    folder.mkdir(exist_ok=True)
    (folder / "own_modules.py").write_text(MODULES)
    monkeypatch.syspath_prepend(folder)

    def write(file: str, text: str) -> None:
        (data_folder / file).parent.mkdir(exist_ok=True)
        (data_folder / file).write_text(text)

    return write


def make_yaml(target: str, **fields: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.create({"name": "own", "_target_": target, "_partial_": True, **fields}))


# The contract


@pytest.mark.usefixtures("quick_end")
def test_a_module_from_outside_the_repository_needs_a_class_and_a_file(configure, overrides, write_config, tmp_path):
    write_config("distillation/own.yaml", make_yaml("own_modules.Outputs", scale=2.0))
    run_pipeline(configure(*overrides, "distillation=own"))
    lines = (the_run(tmp_path / "runs") / "history" / "distil.csv").read_text().splitlines()
    losses = [line.rpartition(",")[0] for line in lines if "loss" in line]
    assert losses == [f"{step},train/loss" for step in range(4)]
    assert (the_run(tmp_path / "runs") / "networks" / "distilled" / "config.json").exists()


@pytest.mark.parametrize(
    ("target", "fields", "fault"),
    [
        ("Outputs", {"_partial_": False}, "`_partial_: true` is missing beside it"),
        ("NoResult", {}, "it has no method result"),
        ("make_no_result", {}, "it has no method result"),
        ("NoSeed", {}, "it does not take the argument seed"),
        ("NoModule", {}, "NoModule is no LightningModule"),
    ],
)
def test_a_module_that_breaks_the_contract_is_refused_with_its_text(
    configure, overrides, write_config, tmp_path, target, fields, fault
):
    write_config("distillation/own.yaml", make_yaml(f"own_modules.{target}", **fields))
    cfg = configure(*overrides, "distillation=own")
    with pytest.raises(ConfigError, match=r"^distillation\._target_='own_modules\.") as caught:
        run_pipeline(cfg)
    message = str(caught.value)
    assert f"cannot be trained: {fault}. It has to be a LightningModule" in message
    assert "result() returns the trained NetworkBackbone" in message
    assert all(name in message for name in PIPELINE_ARGUMENTS["distillation"])
    assert not list((tmp_path / "runs").glob("debug/*"))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (path, name)
        for path, names in PIPELINE_ARGUMENTS.items()
        for name in names
        if (path, name) != ("distillation", "teacher")
    ],
)
def test_an_argument_that_the_pipeline_passes_is_refused_as_a_key(configure, path, name):
    job = ["experiment=pretrain_cifar10"] * (path == "pretrain")
    match = rf"^{path}\.{name}=3: the pipeline passes {name} itself; remove the key$"
    with pytest.raises(ConfigError, match=match):
        configure(*job, f"+{path}.{name}=3")


@pytest.mark.parametrize("narrower", [False, True])
def test_a_module_may_check_its_own_settings(configure, overrides, write_config, narrower):
    write_config("distillation/own.yaml", make_yaml("own_modules.Strict", scale=2.0))
    width = ["criterion=magnitude", "criterion.level=channel", "selection=threshold"] if narrower else []
    with pytest.raises(ValueError, match=rf"^scale=2\.0, narrower={narrower}, 5 stages$"):
        run_pipeline(configure(*overrides, "distillation=own", *width))


NOTHING: dict[str, Any] = {"optimizer": None, "lr_scheduler": None, "seed": 0, "dump": Path("/nowhere")}


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Lora(["to_q"], alpha=0), "distillation.lora.alpha=0"),
        (lambda: Lora([]), "distillation.lora.targets=[]"),
        (lambda: Denoiser(None, drop_text=1.5, captions=None, **NOTHING), "pretrain.drop_text=1.5"),
        (lambda: Autoencoder(None, kl_weight=-1.0, **NOTHING), "pretrain.kl_weight=-1.0"),
    ],
)
def test_an_option_of_a_module_out_of_range_is_refused_by_name(make, field):
    with pytest.raises(ValueError, match=re.escape(field)):
        make()


# Distances of feature maps


def test_feature_distance_replaces_the_squared_error():
    teacher = tiny_backbone("UNet2DModel")
    student, batch = teacher.pruned(bypasses(REMOVED)), tiny_batch(teacher)
    options: dict[str, Any] = {"normalization": "none", "skip_emptied": False}
    losses = losses_of(distillation(student, teacher, feature_distance=CosineDistance(), **options), batch)
    squared = losses_of(distillation(student, teacher, **options), batch)
    s, t = outputs_of(student, STAGES, batch), outputs_of(teacher, STAGES, batch)
    for name in STAGES:
        assert torch.equal(losses[f"feature/{name}"], 1 - F.cosine_similarity(s[name], t[name], dim=1).mean())
        assert torch.equal(squared[f"feature/{name}"], F.mse_loss(s[name], t[name]))
    assert torch.equal(losses["output"], squared["output"])


@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 4, 5), 1), ((2, 4, 3), 2), ((7, 3), 1)])
def test_the_cosine_distance_ignores_the_norm_of_channel_vectors(shape, axis):
    one, other = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dots = (one * other).sum(axis) / (one.square().sum(axis) * other.square().sum(axis)).sqrt()
    distance = CosineDistance()
    assert float(distance(one, other)) == pytest.approx(1 - float(dots.mean()), rel=1e-12)
    assert float(distance(one, 4 * one)) == pytest.approx(0, abs=1e-12)
    assert float(distance(one, -one)) == pytest.approx(2, rel=1e-12)
    assert torch.equal(distance(8 * one, other), distance(one, other))  # a power of two: no rounding


@pytest.mark.usefixtures("quick_end")
@pytest.mark.slow
def test_a_distance_from_outside_the_repository_needs_a_class_and_a_line(configure, overrides, write_config, tmp_path):
    runs = {}
    for name, distance in {"plain": "null", "own": "{_target_: own_modules.Doubled}"}.items():
        write_config(
            f"distillation/{name}.yaml", f"defaults: [normalized]\nname: {name}\nfeature_distance: {distance}\n"
        )
        job = [o for o in overrides if not o.startswith("paths.runs=")]
        run_pipeline(configure(*job, f"distillation={name}", f"paths.runs={tmp_path}/{name}"))
        lines = (the_run(tmp_path / name) / "history" / "distil.csv").read_text().splitlines()
        runs[name] = {line.split(",")[1]: float(line.split(",")[2]) for line in reversed(lines[1:])}  # of step 0
    assert runs["own"]["train/output"] == runs["plain"]["train/output"]
    assert runs["own"]["train/feature/up_blocks_1"] == pytest.approx(2 * runs["plain"]["train/feature/up_blocks_1"])


@pytest.mark.parametrize("value", ["cosine", "{a: 1}", "{_target_: own_modules.Steps}"])
def test_a_feature_distance_of_another_type_is_refused_before_scoring(
    configure, overrides, write_config, tmp_path, value
):
    write_config("distillation/own.yaml", f"defaults: [normalized]\nname: own\nfeature_distance: {value}\n")
    with pytest.raises(ValueError, match=r"^distillation\.feature_distance=.* is no distance; choose null") as caught:
        run_pipeline(configure(*overrides, "distillation=own"))
    assert "lightning_modules.losses.cosine.CosineDistance" in str(caught.value)
    assert not list((tmp_path / "runs").glob("debug/*"))


# Options of the Trainer


def record_trainer_arguments(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]) -> dict[str, Any]:
    """Return the arguments with which a function constructs a Trainer."""

    class TrainerConstructed(Exception):
        pass

    given: dict[str, Any] = {}

    def trainer(**arguments: Any) -> None:
        given.update(arguments)
        raise TrainerConstructed

    monkeypatch.setattr(pl, "Trainer", trainer)
    with pytest.raises(TrainerConstructed):
        make()
    return given


def test_trainer_options_apply_to_training_only(configure, overrides, tmp_path, monkeypatch):
    cfg = configure(*overrides, "+trainer.options={detect_anomaly: true, inference_mode: false}")
    trained = record_trainer_arguments(
        monkeypatch, lambda: fit(pl.LightningModule(), pl.LightningDataModule(), cfg.trainer, tmp_path, "distil")
    )
    assert (trained["detect_anomaly"], trained["inference_mode"]) == (True, False)
    assert trained.keys() - {"detect_anomaly", "inference_mode"} == set(PROJECT_ARGUMENTS) - {"default_root_dir"}
    other = record_trainer_arguments(monkeypatch, lambda: make_trainer(cfg.trainer, "score units", "32-true"))
    assert not other.keys() & {"detect_anomaly", "inference_mode"}


@pytest.mark.parametrize(("deterministic", "expected"), [("true", ("warn", False)), ("false", (False, True))])
def test_only_training_searches_for_the_fastest_algorithms(
    configure, overrides, tmp_path, monkeypatch, deterministic, expected
):
    cfg = configure(*overrides, f"trainer.deterministic={deterministic}")
    trained = record_trainer_arguments(
        monkeypatch, lambda: fit(pl.LightningModule(), pl.LightningDataModule(), cfg.trainer, tmp_path, "distil")
    )
    other = record_trainer_arguments(monkeypatch, lambda: make_trainer(cfg.trainer, "score units", "32-true"))
    assert (trained["deterministic"], trained["benchmark"]) == expected
    assert (other["deterministic"], other["benchmark"]) == ("warn", False)


@pytest.mark.parametrize("name", PROJECT_ARGUMENTS)
def test_a_trainer_option_that_the_project_sets_is_refused(configure, name):
    assert name in inspect.signature(pl.Trainer).parameters
    with pytest.raises(ConfigError, match=rf"^trainer\.options\.{name}=1: this project sets it"):
        configure(f"+trainer.options.{name}=1")


def test_an_unknown_trainer_option_is_refused_with_the_choices(configure):
    with pytest.raises(ConfigError, match=r"^trainer\.options\.detect_anomly is unknown; did you mean") as caught:
        configure("+trainer.options.detect_anomly=true")
    assert "'detect_anomaly'" in str(caught.value)
    assert all(name in str(caught.value) for name in inspect.signature(pl.Trainer).parameters)
    with pytest.raises(ConfigError, match=r"trainer\.options\.detect_anomaly='often' is of the wrong type"):
        configure("+trainer.options.detect_anomaly=often")


def test_an_invalid_trainer_option_is_refused_before_scoring(configure, overrides, tmp_path):
    with pytest.raises(ConfigError, match=r"^trainer cannot be made as configured: .*enable_progress_bar"):
        run_pipeline(configure(*overrides, "+trainer.options.enable_progress_bar=false"))
    assert not list((tmp_path / "runs").glob("debug/*"))


# Callbacks and loggers


@pytest.mark.usefixtures("quick_end")
def test_configured_callbacks_and_loggers_are_used_in_training(configure, overrides, write_config, tmp_path):
    write_config("callbacks/steps.yaml", "steps: {_target_: own_modules.Steps}\n")
    write_config(
        "logger/tables.yaml",
        "loggers:\n  one: {_target_: own_modules.CSVLogger, version: one}\n"
        f"  two: {{_target_: own_modules.CSVLogger, version: two, save_dir: '{tmp_path}/elsewhere'}}\n",
    )
    given = ["callbacks=[learning_rate,steps]", "logger=[csv,tables,tensorboard]"]
    run_pipeline(configure(*overrides, *given, "trainer.accumulate_grad_batches=2"))
    run = the_run(tmp_path / "runs")
    from own_modules import Steps

    assert Steps.seen == [0, 1, 1, 2, 2, 3, 3, 4]
    history = (run / "history" / "distil.csv").read_text()
    tables = [folder / "lightning_logs" for folder in (run / "logs", tmp_path / "elsewhere")]
    assert (tables[0] / "one" / "metrics.csv").read_text() == (tables[1] / "two" / "metrics.csv").read_text()
    assert "lr-AdamW" in history and "lr-AdamW" in (tables[0] / "one" / "metrics.csv").read_text()
    assert len(list(tables[0].glob("events.out.tfevents.*"))) == 1


def test_other_loggers_can_be_combined_with_the_dashboard(configure):
    assert configure("logger=[wandb,tensorboard]").logger.wandb
    for logger in ("csv", "tensorboard"):
        assert not configure(f"logger={logger}").logger.wandb


def test_options_change_the_run_identity_and_callbacks_do_not(configure):
    plain = get_effective_settings(configure())
    assert get_effective_settings(configure("callbacks=learning_rate", "logger=tensorboard")) == plain
    changed = get_effective_settings(configure("+trainer.options.gradient_clip_algorithm=value"))
    assert changed["trainer"].pop("options") == {"gradient_clip_algorithm": "value"}
    assert plain["trainer"].pop("options") == {} and changed == plain


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+callbacks.mine=3", r"callbacks\.mine=3 is no callback: choose a class as its _target_"),
        ("+logger.loggers.mine=3", r"logger\.loggers\.mine=3 is no logger: choose a class as its _target_"),
    ],
)
def test_a_callback_or_logger_of_another_type_is_refused(configure, override, message):
    with pytest.raises(ConfigError, match=message):
        configure(override)


def test_an_unknown_group_of_callbacks_is_refused(configure):
    with pytest.raises(MissingConfigException, match="Could not find 'callbacks/learning'"):
        configure("callbacks=learning")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("torch.nn.Identity", r"callbacks\.mine\._target_='torch\.nn\.Identity' makes no Callback of Lightning"),
        (
            "pytorch_lightning.callbacks.ModelPruning, pruning_fn: none_such",
            r"callbacks\.mine cannot be made: .*none_such",
        ),
    ],
)
def test_a_callback_that_cannot_be_made_is_refused_before_scoring(configure, overrides, tmp_path, target, message):
    with pytest.raises(ConfigError, match=message):
        run_pipeline(configure(*overrides, f"+callbacks.mine={{_target_: {target}}}"))
    assert not list((tmp_path / "runs").glob("debug/*"))


def test_without_tensorboard_the_error_names_what_to_install(configure, overrides, tmp_path, monkeypatch):
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning_fabric.loggers.tensorboard.{name}", False)
    monkeypatch.setattr("pytorch_lightning.loggers.tensorboard._TENSORBOARD_AVAILABLE", False, raising=False)
    with pytest.raises(ConfigError, match=r"^logger\.loggers\.tensorboard cannot be made: (?s:.*)'\.\[tensorboard\]'"):
        run_pipeline(configure(*overrides, "logger=tensorboard"))
    assert not list((tmp_path / "runs").glob("debug/*"))


# Optimisers


@pytest.mark.parametrize(
    ("make", "on_gpu", "precision", "expected"),
    [
        (functools.partial(torch.optim.AdamW, lr=1.0), True, "bf16-mixed", True),
        (functools.partial(torch.optim.AdamW, lr=1.0), False, "32-true", False),
        (functools.partial(torch.optim.AdamW, lr=1.0), True, "16-mixed", False),
        (functools.partial(torch.optim.AdamW, lr=1.0, foreach=True), True, "32-true", False),
        (functools.partial(torch.optim.Rprop, lr=1.0), True, "32-true", False),
    ],
)
def test_an_optimizer_is_fused_on_a_gpu_that_allows_it(make, on_gpu, precision, expected):
    assert can_be_fused(make, [SimpleNamespace(is_cuda=on_gpu, is_meta=False)], precision) == expected
