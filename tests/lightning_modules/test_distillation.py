"""Distillation: the terms of its loss, the teacher, the moving average, and losses that are not finite."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback
from safetensors import safe_open
from safetensors.torch import load_file
from support.distillation import REMOVED, STAGES, distillation, losses_of, outputs_of
from support.networks import FAMILIES, TRANSFORMERS, UNETS, bypasses, same_tensors, tiny_backbone, tiny_batch
from support.results import the_run
from torch import Tensor

from conf import schema
from conf.schema import ROOT
from experiments.engine.artefacts import read_json
from experiments.engine.pipeline import run_pipeline
from lightning_modules.losses.level_weights import FLOOR, NORMALIZATIONS, LevelWeights
from lightning_modules.modules.distillation import Distillation
from lightning_modules.modules.non_finite import NonFiniteLoss, advise_on_non_finite
from lightning_modules.nested import tensors_by_path
from lightning_modules.training.ema import WarmedUpEMA
from lightning_modules.training.monitor import MEASURED
from lightning_modules.training.trainer import fit

# Terms


@pytest.mark.parametrize("taps", ["stages", "units"])
@pytest.mark.parametrize(
    ("family", "normalization"),
    [*product(UNETS, NORMALIZATIONS), *((family, "teacher_energy") for family in FAMILIES if family not in UNETS)],
)
def test_an_unpruned_student_has_output_and_feature_losses_of_zero(family, normalization, taps):
    """The zeros of pipelines are not exact: trained projections without bias are multiplied in another order."""
    teacher = tiny_backbone(family)
    module = distillation(teacher.pruned(bypasses([])), teacher, normalization=normalization, taps=taps)
    losses = losses_of(module, tiny_batch(teacher))
    rounding = 0 if family in UNETS else 1e-11
    assert float(losses["task"].detach()) > 0
    assert torch.equal(losses["loss"], losses["task"])
    followed = {name for name in losses if name.startswith(("output", "feature/", "weighted_feature/"))}
    assert len(followed) == 1 + 2 * len(teacher.stages() if taps == "stages" else teacher.survivors())
    assert all(float(losses[name].detach()) <= rounding for name in followed)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in TRANSFORMERS])
def test_every_loss_term_equals_its_formula(family):
    teacher = tiny_backbone(family)
    student, batch = teacher.pruned(bypasses(REMOVED)), tiny_batch(teacher)
    module = distillation(student, teacher, w_task=0.5, w_out=2.0, w_feat=0.25, skip_emptied=False)
    losses = losses_of(module, batch)
    s, t = outputs_of(student, STAGES, batch), outputs_of(teacher, STAGES, batch)
    assert torch.equal(losses["task"], (s["output"] - s["target"]).square().mean((1, 2, 3)).mean())
    assert torch.equal(losses["output"], F.mse_loss(s["output"], t["output"]))
    total = 0.5 * losses["task"] + 2 * losses["output"]
    for name in STAGES:
        raw, energy = F.mse_loss(s[name], t[name]), t[name].square().mean()
        assert torch.equal(losses[f"feature/{name}"], raw)
        torch.testing.assert_close(losses[f"weighted_feature/{name}"], raw / energy, rtol=1e-6, atol=0)
        total = total + 0.25 * losses[f"weighted_feature/{name}"]
    assert torch.equal(losses["loss"], total)
    assert set(losses) == {"loss", "task", "output"} | {
        f"{kind}/{n}" for kind in ("feature", "weighted_feature") for n in STAGES
    }


def test_a_term_trains_the_student_and_costs_nothing_at_weight_zero():
    teacher = tiny_backbone("UNet2DModel")
    calls = []
    teacher.network.register_forward_hook(lambda *_: calls.append(1))
    for weights, passes in (((1, 0, 0), 0), ((0, 1, 0), 1), ((0, 0, 1), 1), ((1, 1, 1), 1)):
        calls.clear()
        student = teacher.pruned(bypasses(REMOVED))
        options = dict(zip(("w_task", "w_out", "w_feat"), weights, strict=True))
        losses_of(distillation(student, teacher, **options), tiny_batch(teacher))["loss"].backward()
        assert len(calls) == passes
        assert float(student.network.conv_in.weight.grad.abs().sum()) > 0
        assert all(parameter.grad is None for parameter in teacher.parameters())


# Normalisation


def maps(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2**seed


def weigh(weights: LevelWeights, level: int, teacher: Tensor, error: float = 1.0) -> Tensor:
    return weights(level, weights.measure(teacher, torch.tensor(error), F.mse_loss))


def test_teacher_energy_makes_a_term_a_relative_error_at_any_scale():
    weights = LevelWeights("teacher_energy", 1)
    f_s, f_t = maps(0), maps(1)
    term = weigh(weights, 0, f_t) * F.mse_loss(f_s, f_t)
    torch.testing.assert_close(term, ((f_s - f_t) ** 2).mean() / (f_t**2).mean(), rtol=1e-6, atol=0)
    assert torch.equal(
        weigh(weights, 0, 64 * f_t) * F.mse_loss(64 * f_s, 64 * f_t), term
    )  # a power of two: no rounding


def test_normalization_none_does_not_change_the_terms():
    assert torch.equal(weigh(LevelWeights("none", 1), 0, maps()), torch.ones(()))


def test_teacher_norm_is_the_inverse_of_the_mean_norm_per_sample():
    f_t = maps(2)
    norms = [float(sample.flatten().double().square().sum().sqrt()) for sample in f_t]
    assert float(weigh(LevelWeights("teacher_norm", 1), 0, f_t)) == pytest.approx(4 / sum(norms), rel=1e-6)


def test_running_starts_like_teacher_energy_and_averages_per_level():
    running, energy = LevelWeights("running", 2, momentum=0.75), LevelWeights("teacher_energy", 2)
    assert torch.equal(weigh(running, 0, maps(0)), weigh(energy, 0, maps(0)))
    assert torch.equal(weigh(running, 1, maps(3)), weigh(energy, 1, maps(3)))  # levels do not mix
    e0, e1 = (float(maps(seed).square().mean()) for seed in (0, 1))
    assert float(weigh(running, 0, maps(1))) == pytest.approx(1 / (0.75 * e0 + 0.25 * e1), rel=1e-6)
    assert list(running.state_dict()) == ["energy"]  # so that a resumed run continues with it


def test_initial_error_divides_a_term_by_that_of_the_first_batch():
    weights = LevelWeights("initial_error", 2)
    teacher = maps(1)
    floor = FLOOR * float(teacher.square().mean())
    assert float(weigh(weights, 0, teacher, 4.0)) == pytest.approx(1 / (4 + floor), rel=1e-6)
    assert float(weigh(weights, 0, maps(2), 9.0)) == pytest.approx(1 / (4 + floor), rel=1e-6)
    assert float(weigh(weights, 1, teacher, 0.0)) == pytest.approx(1 / floor, rel=1e-6)  # levels do not mix
    resumed = LevelWeights("initial_error", 2)
    resumed.load_state_dict(weights.state_dict())
    assert torch.equal(weigh(resumed, 0, maps(3), 9.0), weigh(weights, 0, maps(3), 9.0))


def test_levels_begin_with_terms_of_one_with_initial_error():
    """But for levels in front of the first removed unit, where the student is the teacher."""
    teacher = tiny_backbone("UNet2DModel")
    student = teacher.pruned(bypasses(["down_blocks.1.resnets.0", "up_blocks.1.resnets.1"]))
    module = distillation(student, teacher, normalization="initial_error")
    losses = losses_of(module, tiny_batch(teacher))
    terms = {name: float(losses[f"weighted_feature/{name}"]) for name in STAGES}
    assert terms["down_blocks.0"] == 0
    energies = outputs_of(teacher, STAGES, tiny_batch(teacher))
    for name in STAGES[1:]:
        error = float(losses[f"feature/{name}"])
        assert terms[name] == pytest.approx(error / (error + FLOOR * float(energies[name].square().mean())), rel=1e-4)


def test_an_unknown_normalization_lists_the_choices():
    with pytest.raises(ValueError, match=r"distillation\.normalization='energy' is unknown; choose one of: ") as caught:
        LevelWeights("energy", 1)
    assert str(caught.value).partition("one of: ")[2].split(", ") == list(NORMALIZATIONS)


# Training


class Recorder(Callback):
    """Records the student's weights after each optimiser step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer, module, *args) -> None:
        self.weights.append({key: value.clone() for key, value in module.student.state_dict().items()})


@pytest.fixture
def train_tiny(configure, overrides, tmp_path):
    """Return a function (class, callbacks, *overrides, **options of Distillation) -> the module after 4 steps."""

    def run(cls=Distillation, callbacks=(), *more: str, **options: Any) -> Distillation:
        cfg = configure(*overrides, "trainer.checkpoint_every=1", *more)
        teacher = tiny_backbone("UNet2DModel")
        module = distillation(teacher.pruned(bypasses(REMOVED)), teacher, cls, tmp_path / "failure", **options)
        run.module = module  # for tests in which the fit ends with an error
        fit(module, schema.build(cfg.data), cfg.trainer, tmp_path, "distil", callbacks=callbacks)
        return module

    return run


def checkpoint(run: Path, step: int) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "distil" / f"step={step:07d}.ckpt", weights_only=True)


def test_training_neither_changes_nor_saves_the_teacher(train_tiny, tmp_path):
    recorder = Recorder()
    module = train_tiny(Distillation, [recorder, WarmedUpEMA(0.999)], taps="units", normalization="running")
    teacher = tiny_backbone("UNet2DModel")
    assert same_tensors(module.teacher.state_dict(), teacher.state_dict())
    assert not any(part.training for part in module.teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())
    assert not same_tensors(recorder.weights[0], recorder.weights[-1])  # the student has changed

    expected = {f"student.{name}" for name in module.student.state_dict()} | {"weights.energy"}
    saved = checkpoint(tmp_path, 4)
    assert set(saved["state_dict"]) == set(saved["current_model_state"]) == set(module.state_dict()) == expected
    assert len(saved["optimizer_states"][0]["state"]) == len(list(module.student.parameters()))

    for network in (module.teacher, module.student):
        for name, part in network.named_modules():
            assert not part._forward_hooks and not part._forward_pre_hooks and not part._backward_hooks, name


@pytest.mark.usefixtures("quick_end")
@pytest.mark.slow
def test_only_the_student_of_a_pipeline_is_saved(configure, text_job, tmp_path):
    run_pipeline(configure(*text_job, "criterion=magnitude"))
    run = the_run(tmp_path / "runs")
    weights = "diffusion_pytorch_model.pruned.safetensors"
    for folder in ("networks/pruned", "networks/distilled"):
        assert {path.name for path in (run / folder).iterdir()} == {"config.json", weights}
    student, saved = load_file(run / "networks" / "pruned" / weights), checkpoint(run, 4)
    expected = {f"student.network.{name}" for name in student} | {"weights.energy"}
    assert set(saved["state_dict"]) == set(saved["current_model_state"]) == expected
    sizes = {name: value.numel() for name, value in tensors_by_path(saved).items()}
    optimizer = [size for name, size in sizes.items() if name.startswith("optimizer_states/")]
    learnt = [tensor.numel() for tensor in student.values()]
    assert sorted(optimizer) == sorted([*learnt, *learnt, *(1 for _ in learnt)])  # two moments, and a count of steps
    networks = ("state_dict/", "current_model_state/", "optimizer_states/")
    assert all(size == 1 for name, size in sizes.items() if not name.startswith(networks))


def test_every_term_is_logged_per_level_with_and_without_its_weight(train_tiny, tmp_path):
    train_tiny(Distillation)
    history = pd.read_csv(tmp_path / "history" / "distil.csv")
    kept = [stage for stage in STAGES if stage != "down_blocks.0"]
    levels = [f"{kind}/{name}".replace(".", "_") for kind in ("feature", "weighted_feature") for name in kept]
    terms = {"loss", "task", "output", "learning_rate", "gradient_norm", *MEASURED, *levels}
    for term in terms:
        rows = history[history["name"] == f"train/{term}"]
        assert list(rows["step"]) == [0, 1, 2, 3], term
        assert (rows["value"] > 0).all(), term
    assert {name for name in history["name"] if name.startswith("train/")} == {f"train/{term}" for term in terms}


@pytest.mark.parametrize("decay", [0.999, 0.2, 0.0])
def test_the_moving_average_warms_up(train_tiny, tmp_path, decay):
    """It starts as the weights of the first step; update k keeps the share min(decay, (1 + k) / (10 + k)) of it."""
    recorder = Recorder()
    module = train_tiny(Distillation, [recorder, WarmedUpEMA(decay)])
    average = recorder.weights[0]
    for k, weights in enumerate(recorder.weights[1:], start=1):
        kept = min(decay, (1 + k) / (10 + k))
        average = {key: average[key].lerp(weights[key], 1 - kept) for key in weights}
    assert len(recorder.weights) == 4
    assert same_tensors(module.student.state_dict(), average)  # the weights after the fit
    saved = checkpoint(tmp_path, 4)
    assert same_tensors(
        {f"student.{key}": value for key, value in average.items()} | {"weights.energy": module.weights.energy},
        saved["state_dict"],
    )
    assert same_tensors(average, recorder.weights[-1]) == (decay == 0)


def test_without_a_moving_average_the_result_has_the_last_weights(train_tiny):
    recorder = Recorder()
    assert same_tensors(train_tiny(Distillation, [recorder]).student.state_dict(), recorder.weights[-1])


class LossBreaks(Distillation):
    def losses(self, batch):
        losses = super().losses(batch)
        return losses | {"loss": losses["loss"] * float("nan")} if self.global_step == 2 else losses


class GradientBreaks(Distillation):
    """The loss is finite, and its derivative is not."""

    def losses(self, batch):
        losses = super().losses(batch)
        zero = (self.student.network.conv_in.bias.sum() * 0).sqrt() if self.global_step == 2 else 0
        return losses | {"loss": losses["loss"] + zero}


@pytest.mark.parametrize(
    ("cls", "quantity"), [(LossBreaks, "loss"), (GradientBreaks, "gradient of student.network.conv_in.bias")]
)
def test_no_step_is_taken_with_a_non_finite_loss_or_gradient(train_tiny, tmp_path, cls, quantity):
    recorder = Recorder()
    with pytest.raises(NonFiniteLoss) as caught:
        train_tiny(cls, [recorder])
    (path,) = (tmp_path / "failure").iterdir()
    message = str(caught.value)
    assert f"the {quantity} is not finite at optimiser step 2 " in message and str(path) in message
    assert message.endswith(". A lower optimizer.lr usually helps")  # not 32-true, which it is already
    assert len(recorder.weights) == 2
    assert same_tensors(train_tiny.module.student.state_dict(), recorder.weights[-1])
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "distil").iterdir()) == [
        "step=0000001.ckpt",
        "step=0000002.ckpt",
    ]
    saved = load_file(path)
    assert (int(saved["step"]), int(saved["batch_counter"])) == (2, 2)
    assert saved["image"].shape == saved["inputs/sample"].shape == (4, 3, 8, 8)
    assert saved["index"].shape == saved["inputs/timestep"].shape == (4,)
    assert torch.isnan(saved["losses/loss"]) == (cls is LossBreaks) and torch.isfinite(saved["losses/task"])


def test_captions_are_saved_with_a_batch_whose_loss_is_not_finite(tmp_path, monkeypatch):
    teacher = tiny_backbone("sd")
    module, batch = distillation(teacher.pruned(bypasses([])), teacher, dump=tmp_path), tiny_batch(teacher)
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(module, "losses", lambda batch: {"loss": torch.tensor(float("nan"))})
    with pytest.raises(NonFiniteLoss):
        module.training_step(batch, 0)
    (path,) = tmp_path.iterdir()
    saved = load_file(path)
    assert saved.keys() == batch.keys() - {"caption"} | {"losses/loss", "step", "batch_counter"}
    assert torch.equal(saved["image"], batch["image"])
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["caption"]) == batch["caption"]


RATE = "A lower optimizer.lr"
WIDER = "trainer.precision=32-true"


@pytest.mark.parametrize(
    ("step", "precision", "advised"),
    [(0, "32-true", []), (0, "bf16-mixed", [WIDER]), (3, "32-true", [RATE]), (3, "bf16-mixed", [RATE, WIDER])],
)
def test_advice_on_a_non_finite_loss_fits_step_and_precision(step, precision, advised):
    advice = advise_on_non_finite(step, precision, "optimizer.lr", "trainer.precision", "something else")
    assert [part for part in (RATE, WIDER) if part in advice] == advised
    assert ("No step was taken before" in advice) == ("something else" in advice) == (step == 0)


def test_non_finite_samples_are_named_as_the_cause():
    teacher = tiny_backbone("UNet2DModel")
    module = distillation(teacher.pruned(bypasses([])), teacher)
    advice = module.advise({"image": torch.tensor([1.0, float("inf")]), "index": torch.tensor([3])})
    assert advice.startswith("The samples themselves are not finite (image): look at them")


# Choices

FIXED = {"bk_sdm": ["selection=bk_sdm"], "bk_sdm_tiny": ["selection=bk_sdm", "selection.variant=tiny"]}
"""Further overrides for distillations that fit only students of four stages."""
MORE = {"lora": ["distillation.lora.targets=[to_q,to_v]"]}  # the default names layers of language models


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "distillation").glob("*.yaml")))
@pytest.mark.usefixtures("quick_end")
def test_every_distillation_config_runs(configure, overrides, text_job, tmp_path, name):
    job = [*text_job, *FIXED[name]] if name in FIXED else overrides
    cfg = configure(*job, f"distillation={name}", *MORE.get(name, []))
    assert cfg.distillation.name == name
    run_pipeline(cfg)
    run = the_run(tmp_path / "runs")
    metrics = read_json(run / "metrics.json")
    trains = name != "none"
    assert metrics["eval/weights"] == ("ema" if trains else "pruned")
    assert (run / "networks" / "distilled").exists() == (run / "checkpoints").exists() == trains
    assert ("distilled/output_loss" in metrics) == trains
    assert metrics["eval/output_loss"] == metrics["distilled/output_loss" if trains else "pruned/output_loss"]
    weights = f"diffusion_pytorch_model{'' if name in FIXED else '.pruned'}.safetensors"
    exported = load_file(run / "export" / "unet" / weights)
    assert same_tensors(exported, load_file(run / "networks" / ("distilled" if trains else "pruned") / weights))
