"""A criterion, a trained one, a loss, a way to distil, a backbone and a stage from outside the repository."""

import functools
from pathlib import Path

import pytest
from support.results import the_run

from conf.schema import ConfigError
from experiments.engine.artefacts import read_json
from experiments.engine.pipeline import run_pipeline

pytestmark = pytest.mark.usefixtures("quick_end")

PACKAGE = '''
import pytorch_lightning as pl
import torch
from torch import nn

from criteria.base import Criterion, zeros
from experiments.engine.stage import Stage
from lightning_modules.backbones.diffusion.load import load_teacher
from lightning_modules.backbones.diffusion.unet import UNetBackbone
from lightning_modules.modules.base import DistillationModule


class Increase(Criterion):
    """The increase of the task loss without each unit."""

    def start(self, backbone, units, seed):
        super().start(backbone, units, seed)
        self.states = {"sum": zeros(len(units))}

    def update(self, batch):
        inputs = self.backbone.calibration_inputs(batch, self.seed)
        whole = self.backbone.losses(self.backbone.predict(inputs), inputs).sum()
        for i, unit in enumerate(self.units):
            with self.backbone.without([unit.name]):
                output = self.backbone.predict(inputs)
            self.states["sum"][i] += float(self.backbone.losses(output, inputs).sum() - whole)

    def compute(self):
        return self.table(score=self.states["sum"])


class Scales(Criterion):
    """A trained number per unit."""

    needs_grad = True

    def __init__(self, module):
        self.module = module

    def start(self, backbone, units, seed):
        super().start(backbone, units, seed)
        self.numbers = nn.Parameter(torch.ones(len(units)))

    def compute(self):
        return self.table(score=self.numbers.detach().double())


class ScalesTraining(pl.LightningModule):
    """A step per calibration batch towards the place of each unit."""

    def __init__(self, criterion, backbone):
        super().__init__()
        self.numbers = criterion.numbers

    def training_step(self, batch, batch_idx):
        return (self.numbers - torch.arange(len(self.numbers))).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD([self.numbers], lr=0.25)


class Absolute:
    """The mean absolute difference of two feature maps."""

    def __call__(self, student, teacher):
        return (student - teacher).abs().mean()


class Late(DistillationModule):
    """The output loss; the weight of a sample grows with its timestep."""

    def losses(self, batch):
        inputs = self.student.training_inputs(batch)
        with torch.no_grad():
            expected = self.teacher.predict(inputs)
        errors_N = (self.student.predict(inputs) - expected).square().flatten(1).mean(1)
        weights_N = inputs["timestep"] / self.student.noise_scheduler.config.num_train_timesteps
        return {"loss": (weights_N * errors_N).mean()}


class Forgetful(pl.LightningModule):
    def __init__(self, student, teacher, *, optimizer, lr_scheduler, seed, dump):
        super().__init__()


class Strange(pl.LightningModule):
    def __init__(self, student, optimizer, lr_scheduler, seed, dump):
        super().__init__()

    def result(self):
        return None


class OnlyResnets(UNetBackbone):
    """A U-Net of which only ResNet blocks are units."""

    def units(self, level="depth"):
        return [unit for unit in super().units(level) if unit.kind == "resnet"]


def load_only_resnets(path, noise_scheduler=None):
    """Return a teacher of which only ResNet blocks are units."""
    teacher = load_teacher(path, noise_scheduler)
    return OnlyResnets(teacher.network, teacher.noise_scheduler, teacher.pipeline_parts, **teacher.options)


class Count(Stage):
    """Writes how many parameters each network has."""

    usual_name = "count"

    def artefacts(self):
        return [self.artefact("counts.json")]

    def run(self, job):
        if not (job.run / self.artefact("counts.json")).exists():
            counts = {name: network.totals()["params"] for name, network in job.networks.items()}
            job.run.write(self.artefact("counts.json"), counts)
'''
FILES = {
    "criterion/increase.yaml": "name: increase\n_target_: foreign_package.Increase\n",
    "criterion/scales.yaml": "name: scales\n_target_: foreign_package.Scales\n"
    "module: {_target_: foreign_package.ScalesTraining, _partial_: true}\n",
    "distillation/absolute.yaml": "defaults: [normalized]\nname: absolute\nnormalization: none\n"
    "feature_distance: {_target_: foreign_package.Absolute}\n",
    "distillation/late.yaml": "name: late\n_target_: foreign_package.Late\n_partial_: true\n",
    "teacher/only_resnets.yaml": "name: only_resnets\n_target_: foreign_package.load_only_resnets\npath: ???\n",
    "pipeline/counted.yaml": "defaults: [prune]\nname: counted\nstages:\n  count: {_target_: foreign_package.Count}\n",
}


@pytest.fixture
def package(data_folder, monkeypatch) -> None:
    """The package on the Python path, and its files in a configuration directory outside the repository."""
    for name, content in FILES.items():
        (data_folder / name).parent.mkdir(exist_ok=True)
        (data_folder / name).write_text(content)
    (data_folder / "outside").mkdir(exist_ok=True)
    (data_folder / "outside" / "foreign_package.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(data_folder / "outside")


@pytest.fixture
def job(package, configure, overrides, tmp_path):
    """job(*more) -> the folder of a run that has ended."""

    def run(*more: str) -> Path:
        run_pipeline(configure(*overrides, *more))
        return the_run(tmp_path / "runs")

    return run


def scores_of(run: Path) -> dict[str, float]:
    return {name: entry["score"] for name, entry in read_json(run / "scores.json")["scores"].items()}


def test_a_criterion_from_outside_the_repository(job, tmp_path):
    scores = scores_of(job("criterion=increase", "distillation=none"))
    (tmp_path / "runs").rename(tmp_path / "first")
    ours = scores_of(job("criterion=task_loss", "distillation=none"))
    samples = 4  # debug=tiny; ours is a mean
    assert scores == pytest.approx({name: samples * value for name, value in ours.items()}, rel=1e-3, abs=1e-5)


def test_a_trained_criterion_from_outside_the_repository(job):
    scores = scores_of(job("criterion=scales", "distillation=none"))
    places = range(len(scores))
    assert list(scores.values()) == pytest.approx([place + (1 - place) * 0.5**2 for place in places])  # two batches


def test_a_distance_of_feature_maps_from_outside_the_repository(job):
    history = (job("distillation=absolute") / "history" / "distil.csv").read_text()
    assert "train/feature/" in history


def test_a_distillation_module_from_outside_the_repository(job):
    run = job("distillation=late")
    assert read_json(run / "metrics.json")["networks"] == ["teacher", "pruned", "distilled"]
    assert "train/loss" in (run / "history" / "distil.csv").read_text()


def test_a_backbone_from_outside_the_repository(job, overrides):
    path = next(override for override in overrides if override.startswith("teacher.path="))
    scores = scores_of(job("teacher=only_resnets", path, "distillation=none", "selection.ratio=0.3"))
    assert len(scores) == 8 and all("resnets" in name for name in scores)


def test_a_stage_from_outside_the_repository(job):
    run = job("pipeline=counted", "distillation=none")
    metrics = read_json(run / "metrics.json")
    assert read_json(run / "counts.json") == {name: metrics[f"{name}/params"] for name in ("teacher", "pruned")}


WRONG = {
    "Forgetful": ("_partial_: true", "it has no method result"),
    "Strange": ("_partial_: true", "it does not take the argument teacher"),
    "Late": ("", "`_partial_: true` is missing"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_module_that_breaks_the_contract_is_refused_at_once(
    package, configure, overrides, data_folder, tmp_path, name
):
    line, fault = WRONG[name]
    file = data_folder / "distillation" / f"wrong_{name.lower()}.yaml"
    file.write_text(f"name: wrong_{name.lower()}\n_target_: foreign_package.{name}\n{line}\n")
    cfg = configure(*overrides, f"distillation=wrong_{name.lower()}")
    with pytest.raises(
        ConfigError, match=rf"'foreign_package.{name}' cannot be trained: ({fault}).*result\(\) returns "
    ):
        run_pipeline(cfg)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("key", ["student", "optimizer", "lr_scheduler", "seed", "dump"])
def test_arguments_that_the_pipeline_passes_cannot_be_configured(configure, overrides, tmp_path, key):
    with pytest.raises(ConfigError, match=rf"distillation\.{key}=.: the pipeline passes {key} itself; remove the key"):
        run_pipeline(configure(*overrides, f"+distillation.{key}={1 if key == 'seed' else 'x'}"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_trainer_options_and_callbacks_apply_to_training_only(job, monkeypatch):
    seen = []
    from pytorch_lightning import Trainer

    init = Trainer.__init__

    @functools.wraps(init)
    def watched(self, *args, **options) -> None:
        seen.append(options)
        init(self, *args, **options)

    monkeypatch.setattr(Trainer, "__init__", watched)
    run = job("+trainer.options.detect_anomaly=true", "callbacks=learning_rate", "logger=csv")
    assert any("detect_anomaly" in options for options in seen)
    assert all(
        ("detect_anomaly" in options) == ("max_steps" in options) for options in seen[2:]
    )  # two are for the check
    assert "lr-AdamW" in (run / "history" / "distil.csv").read_text()


@pytest.mark.parametrize(
    ("option", "reason"), [("max_steps=3", "=3: this project sets it"), ("speed=3", " is unknown")]
)
def test_reserved_and_unknown_trainer_options_are_refused(configure, overrides, option, reason):
    name = option.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"trainer\.options\.{name}{reason}"):
        run_pipeline(configure(*overrides, f"+trainer.options.{option}"))


def test_further_loggers_write_into_the_folder_of_the_run(job):
    run = job("logger=tensorboard")
    assert any(path.name.startswith("events.out.tfevents") for path in (run / "logs").rglob("*"))


@pytest.mark.slow
def test_a_finished_run_returns_its_first_measure_too(configure, sampling, tmp_path):
    cfg = configure(*sampling)
    first, again = run_pipeline(cfg), run_pipeline(cfg)
    metrics = read_json(the_run(tmp_path / "runs") / "metrics.json")
    assert first == again == metrics["eval/frechet_channels"]


def test_a_failure_leaves_a_traceback_and_a_success_its_provenance(configure, overrides, tmp_path, monkeypatch):
    cfg = configure(*overrides)

    def broken(*_: object) -> None:
        raise RuntimeError("the disk is on fire")

    with monkeypatch.context() as patch:
        patch.setattr("experiments.engine.stages.build.Build.run", broken)
        with pytest.raises(RuntimeError):
            run_pipeline(cfg)
    log = (the_run(tmp_path / "runs") / "run.log").read_text()
    assert "Traceback (most recent call last)" in log and "RuntimeError: the disk is on fire" in log
    run_pipeline(cfg)
    provenance = read_json(the_run(tmp_path / "runs") / "measured.json")["provenance"]
    assert {"secateur", "commit", "dirty", "python", "torch", "diffusers", "command"} <= provenance.keys()
