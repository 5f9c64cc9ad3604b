"""Repair in closed form: exact where it can be, never worse on its samples, the same on any number of ranks."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.classification import tiny_classifier
from support.networks import FAMILIES, bypasses, part, replacements, same_tensors, tiny_backbone, tiny_batch
from support.ranks import two_ranks
from torch import nn
from torch.utils.data import DataLoader

from conf.schema import Trainer
from criteria.scores.output_loss import OutputLoss
from criteria.scores.repaired_loss import RepairedLoss
from lightning_modules.backbones.diffusion.pruned_unet import Pointwise
from lightning_modules.backbones.repair.fit import Fit, copy_weights, mark_positions
from lightning_modules.backbones.repair.least_squares import NormalEquations, change_layer, list_inputs, list_positions
from lightning_modules.backbones.repair.sites import Site
from lightning_modules.modules.repair import LeastSquares
from lightning_modules.modules.scoring import score
from lightning_modules.training.trainer import make_trainer

RIDGES = (1e-8, 1e-4, 1e-2, 1.0)
SAMPLES = 16


def classifier_batch() -> dict[str, Any]:
    rng = torch.Generator().manual_seed(1)
    images = torch.rand(SAMPLES, *tiny_classifier().image_shape(), generator=rng) * 2 - 1
    return {"image": images, "label": torch.arange(SAMPLES) % 3, "number": torch.arange(SAMPLES)}


def batches_of(backbone: Any) -> DataLoader:
    """Two batches of SAMPLES samples in all."""
    batch = classifier_batch() if backbone.classifies else tiny_batch(backbone, SAMPLES)
    half = SAMPLES // 2
    return DataLoader([part(batch, 0, half), part(batch, half, SAMPLES)], batch_size=None)


def trainer_of(devices: int = 1) -> Any:
    conf = Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", steps=1)
    return make_trainer(conf, "repair", "32-true")


def repaired(reference: Any, changes: list[dict[str, str]], devices: int = 1) -> tuple[Any, dict[str, Any]]:
    """The student of a plan after its repair, and the record of the repair."""
    student = reference.pruned(changes)
    method = LeastSquares(RIDGES, SAMPLES)
    batches, trainer = batches_of(reference), trainer_of(devices)
    return student, method.repair(student, copy.deepcopy(reference), changes, batches, trainer, seed=0)


def measure_output_loss(student: Any, reference: Any) -> float:
    """E ||student - reference||^2 on the samples of the repair."""
    total = 0.0
    for batch in batches_of(reference):
        inputs = reference.calibration_inputs(batch, 0)
        with torch.no_grad():
            outputs = [network.eval().predict(inputs).double() for network in (student, reference)]
        total += float((outputs[0] - outputs[1]).square().flatten(1).mean(1).sum())
    return total / SAMPLES


def plan(reference: Any) -> list[dict[str, str]]:
    """A plan that removes every second unit."""
    if reference.classifies:
        return [{"unit": unit.name, "kind": "slice"} for unit in reference.units()[::2]]
    return bypasses([unit.name for unit in reference.units()][1::2])


def backbone_of(family: str) -> Any:
    return tiny_classifier() if family == "classifier" else tiny_backbone(family)


# Least squares


def test_weights_that_explain_all_errors_are_found():
    rng = torch.Generator().manual_seed(0)
    x, change = torch.randn(12, 7, 5, generator=rng), torch.randn(3, 5, generator=rng)
    for gain in (torch.ones(()), torch.tensor(0.3)):
        equations = NormalEquations(5, 3)
        errors = gain * (x @ change.T)
        equations.add(x, errors, gain.expand_as(errors), torch.arange(12) % 4 == 3)
        assert equations.error(change.double(), [0, 1]) == pytest.approx(0, abs=1e-9)
        ridge, found = equations.fit(RIDGES)
        assert ridge == min(RIDGES)
        torch.testing.assert_close(found, change.double(), rtol=1e-5, atol=1e-5)


def test_gains_that_differ_between_samples_still_lower_the_error():
    """The sums are approximate then, but the step goes downhill: each one repeats on what the last one left."""
    rng = torch.Generator().manual_seed(0)
    x, change = torch.randn(12, 7, 5, generator=rng), torch.randn(3, 5, generator=rng)
    gain = torch.rand(12, 1, 3, generator=rng) + 0.5
    left = gain * (x @ change.T)
    for _ in range(3):
        equations = NormalEquations(5, 3)
        equations.add(x, left, gain.expand_as(left), torch.arange(12) % 4 == 3)
        _, found = equations.fit(RIDGES)
        after = left - gain * (x @ found.float().T)
        assert after.square().sum() < 0.2 * left.square().sum()
        left = after


class Behind(nn.Module):
    """A layer and what is computed from its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.function: Any = None

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.layer(x))


def test_a_gain_that_cannot_be_measured_in_one_batch_gives_the_layer_up():
    """Also where other batches, or other ranks, could measure it."""
    network, rng, gains = Behind(), torch.Generator().manual_seed(0), torch.linspace(1, 2, 4)
    before, fit = copy_weights(network.layer), Fit(Site("layer", "", ""), network)
    for number, function in enumerate((lambda output: gains * output, lambda output: output**2)):
        network.function = function
        x, target = (torch.randn(4, 3, 4, generator=rng) for _ in range(2))
        fit.observe(lambda x=x: network(x), {}, torch.arange(4) + 4 * number, target)
        assert bool(fit.equations.sums["rejected"]) == bool(number)
    fit.refit(RIDGES)
    assert fit.describe()["reason"].startswith("the feature map does not depend")
    assert same_tensors(copy_weights(network.layer), before)


def test_only_tokens_that_predict_a_target_count():
    mask = torch.tensor([[False, True, True, False, False], [True, True, False, False, True]])
    counts = mark_positions({"mask": mask}, torch.zeros(2, 5, 3))
    assert counts[..., 0].tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 1, 0]]
    assert mark_positions({"mask": mask}, torch.zeros(2, 7, 3)).shape == (1, 1, 1)


def test_a_repair_in_half_precision_finds_its_sites():
    """Gains are measured by noise as large as the stream: rounding to bfloat16 is small beside it."""
    reference = tiny_backbone("sd")
    for module in reference.network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            module.weight.data *= 3
    changes = plan(reference)
    student = reference.pruned(changes)
    trainer = make_trainer(Trainer(accelerator="cpu", steps=1), "repair", "bf16-mixed")
    method = LeastSquares(RIDGES, SAMPLES)
    record = method.repair(student, copy.deepcopy(reference), changes, batches_of(reference), trainer, seed=0)
    assert record["sites"] and not [s for s in record["sites"] if "does not depend" in s.get("reason", "")]


def test_a_second_plan_is_made_up_for_without_the_sites_of_the_first():
    reference = tiny_backbone("UNet2DModel")
    units = [unit.name for unit in reference.units()]
    once = reference.pruned(bypasses(units[1:3]))
    twice = once.pruned(bypasses(units[5:6]))
    first = set(reference.repair_sites(once, bypasses(units[1:3])))
    second = set(once.repair_sites(twice, bypasses(units[5:6])))
    assert first and second and not first & second


def test_the_normal_equations_are_those_of_torchs_least_squares():
    rng = torch.Generator().manual_seed(0)
    x, e = torch.randn(8, 6, 4, generator=rng).double(), torch.randn(8, 6, 2, generator=rng).double()
    equations = NormalEquations(4, 2)
    equations.add(x, e, torch.ones_like(e), torch.zeros(8, dtype=torch.bool))
    expected = torch.linalg.lstsq(x.flatten(0, 1), e.flatten(0, 1)).solution.T
    torch.testing.assert_close(equations.solve(1e-12, [0]), expected)
    left = (e - x @ expected.T).square().sum()
    assert equations.error(expected, [0]) == pytest.approx(float(left))


def test_errors_that_no_input_explains_change_nothing():
    rng = torch.Generator().manual_seed(0)
    x, e = torch.randn(8, 6, 4, generator=rng), torch.randn(8, 6, 2, generator=rng)
    equations = NormalEquations(4, 2)
    equations.add(x, e, torch.ones_like(e), torch.arange(8) % 4 == 3)
    assert equations.fit([1e-8, 1e-4]) is None


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 3),
        nn.Linear(4, 3, bias=False),
        nn.Conv2d(4, 3, 1),
        nn.Conv2d(4, 3, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 3, (3, 1), padding=(2, 0), dilation=2),
    ],
    ids=str,
)
def test_the_change_of_a_layer_is_the_change_times_its_inputs(layer):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn((2, 4, 6, 5) if isinstance(layer, nn.Conv2d) else (2, 6, 4), generator=rng)
    rows, before = list_inputs(layer, x), list_positions(layer(x))
    change = torch.randn(3, rows.shape[-1], generator=rng)
    change_layer(layer, change)
    torch.testing.assert_close(list_positions(layer(x)), before + rows @ change.T)


@pytest.mark.parametrize(
    ("ridges", "samples", "message"),
    [((), 256, "repair.ridges"), ((0.0, 1.0), 256, "above 0"), ((1e-3,), 3, "repair.samples=3")],
)
def test_settings_that_cannot_work_are_refused(ridges, samples, message):
    with pytest.raises(ValueError, match=message):
        LeastSquares(ridges, samples)


# Networks


@pytest.mark.parametrize("family", [*FAMILIES, "llama", "classifier"])
def test_a_repair_never_raises_the_output_loss_on_its_samples(family):
    reference = backbone_of(family)
    changes = plan(reference)
    student, record = repaired(reference, changes)
    before, after = measure_output_loss(reference.pruned(changes), reference), measure_output_loss(student, reference)
    assert record["output_loss_before"] == pytest.approx(before, rel=1e-5)
    assert record["output_loss"] == pytest.approx(after, rel=1e-5)
    assert after < before and record["step"] > 0
    assert any("ridge" in site for site in record["sites"])
    assert student.params() == reference.pruned(changes).params()


@pytest.mark.parametrize("family", ["UNet2DModel", "llama"])
def test_a_repair_gives_the_same_bits_again(family):
    reference = backbone_of(family)
    (first, record), (again, record_again) = (repaired(reference, plan(reference)) for _ in range(2))
    assert record == record_again
    assert same_tensors(first.network.state_dict(), again.network.state_dict())


@torch.no_grad()
def make_pointwise_affine(block: Any) -> None:
    """Turn a ResNet block into an affine map of each pixel."""
    for name in ("norm1", "norm2", "nonlinearity"):
        setattr(block, name, nn.Identity())
    for parameter in block.time_emb_proj.parameters():
        parameter.zero_()
    for conv in (block.conv1, block.conv2):
        centre = conv.weight[:, :, 1:2, 1:2].clone()
        conv.weight.zero_()
        conv.weight[:, :, 1:2, 1:2] = centre
        nn.init.normal_(conv.bias)


def test_operators_that_became_pointwise_are_refitted():
    """LD-Pruner's 1x1 convolutions are sites of their own, also beside other kinds of replaced operators."""
    reference = tiny_backbone("UNet2DModel")
    changes = replacements([unit.name for unit in reference.units("operator")][1::3])
    student, record = repaired(reference, changes)
    pointwise = {name for name, module in student.network.named_modules() if isinstance(module, Pointwise)}
    assert pointwise and {f"{name}.conv" for name in pointwise} <= {site["layer"] for site in record["sites"]}
    assert record["output_loss"] < record["output_loss_before"]
    assert record["output_loss"] == pytest.approx(measure_output_loss(student, reference), rel=1e-5)


def test_an_affine_unit_is_replaced_exactly():
    """The 1x1 shortcut that stays in the place of a ResNet block can be all that the block was."""
    reference = tiny_backbone("UNet2DModel")
    name = "down_blocks.1.resnets.0"
    make_pointwise_affine(reference.network.get_submodule(name))
    changes = bypasses([name])
    student, record = repaired(reference, changes)
    assert [site["layer"] for site in record["sites"]] == [f"{name}.conv_shortcut"]
    assert record["output_loss_before"] > 1e-4
    assert record["output_loss"] < 1e-10
    assert record["sites"][0]["error_left"] < 1e-8
    assert measure_output_loss(student, reference) < 1e-10


def test_the_repaired_loss_of_an_affine_unit_is_zero():
    """Its output loss is not."""
    reference = tiny_backbone("UNet2DModel")
    affine = "down_blocks.1.resnets.0"
    make_pointwise_affine(reference.network.get_submodule(affine))
    units = reference.units()
    losses = {}
    for criterion in (OutputLoss(), RepairedLoss(RIDGES)):
        scores = score(criterion, reference, units, batches_of(reference), trainer_of(), seed=0)
        losses[type(criterion)] = {name: entry["score"] for name, entry in scores.items()}
    plain, after_repair = losses[OutputLoss], losses[RepairedLoss]
    assert plain[affine] > 1e-4 and after_repair[affine] < 1e-10
    assert sum(after_repair.values()) < sum(plain.values())


def test_a_unit_that_nothing_can_make_up_for_has_its_output_loss():
    reference = tiny_backbone("llama")
    units = reference.units()
    losses = [
        score(criterion, reference, units, batches_of(reference), trainer_of(), seed=0)["model.layers.0"]
        for criterion in (OutputLoss(), RepairedLoss(RIDGES))
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("family", ["UNet2DModel", "sdxl", "dit", "llama"])
def test_the_repaired_loss_is_that_of_a_repair_of_the_unit_alone(family):
    reference = tiny_backbone(family)
    units = reference.units()
    scores = score(RepairedLoss(RIDGES), reference, units, batches_of(reference), trainer_of(), seed=0)
    compared = 0
    for unit in units[1::3]:
        student, record = repaired(reference, bypasses([unit.name]))
        if len(record["sites"]) == 1 and record["step"] == 1:
            compared += 1
            assert scores[unit.name]["score"] == pytest.approx(measure_output_loss(student, reference), rel=1e-3)
    assert compared


@torch.no_grad()
def test_compiled_parts_have_the_same_repaired_loss(monkeypatch):
    """A compiled part would not notice the hooks that read layers: the first pass is not compiled."""
    monkeypatch.setattr(torch, "compile", lambda forward: lambda *args, **kwargs: forward(*args, **kwargs))
    reference = tiny_backbone("UNet2DModel")
    removals = reference.repaired_removals([reference.units()[1].name], RIDGES)
    reference.compiled = {}
    batch = tiny_batch(reference, SAMPLES)
    removals.observe(reference.calibration_inputs(batch, 0), batch["number"])
    assert reference.compiled == {}
    removals.refit()
    assert len(list(removals.outputs(reference.calibration_inputs(batch, 0)))) == 2 and reference.compiled


def test_channels_that_others_stand_for_are_replaced_exactly():
    """Of two equal channels one is removed: the layers behind can take all from the other."""
    reference = tiny_classifier()
    name = reference.units()[0].name
    root, _, number = name.rpartition(":")
    layer = reference.network.get_submodule(root)
    other = (int(number) + 1) % layer.out_channels
    norm = reference.network.get_submodule(root.replace("conv1", "bn1"))
    for tensor in (*layer.state_dict().values(), *norm.state_dict().values()):
        if tensor.ndim:
            tensor[int(number)] = tensor[other]
    student, record = repaired(reference, [{"unit": name, "kind": "slice"}])
    assert record["output_loss_before"] > 1e-6
    assert record["output_loss"] < 1e-4 * record["output_loss_before"]
    assert measure_output_loss(student, reference) == pytest.approx(record["output_loss"], rel=1e-3)


def test_a_residual_stream_that_a_norm_follows_is_left_alone():
    """A map that is not affine in the layer's output cannot be fitted by that layer, which keeps its weights."""
    reference = tiny_backbone("llama")
    for layer in reference.network.model.layers:
        layer.mlp = nn.Sequential(layer.mlp, nn.LayerNorm(reference.network.config.hidden_size))
    changes = bypasses(["model.layers.1"])
    student, record = repaired(reference, changes)
    assert [site["reason"] for site in record["sites"]] == [
        "the feature map does not depend on the layer's output element by element"
    ]
    assert same_tensors(student.network.state_dict(), reference.pruned(changes).network.state_dict())


def test_without_a_layer_before_it_a_unit_is_not_made_up_for():
    reference = tiny_backbone("llama")
    _, record = repaired(reference, bypasses(["model.layers.0"]))
    assert record == {"sites": [], "step": 0.0}


# Several ranks


def one_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    reference = tiny_backbone("UNet2DModel")
    student, record = repaired(reference, plan(reference), devices=2)
    torch.save(student.network.state_dict(), folder / f"{rank}.pt")
    (folder / f"{rank}.json").write_text(json.dumps(record))


@pytest.mark.slow
def test_two_ranks_share_the_samples_and_come_to_the_same_weights(tmp_path):
    reference = tiny_backbone("UNet2DModel")
    with two_ranks(one_rank, tmp_path):
        student, record = repaired(reference, plan(reference))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert same_tensors(first, second)
    records = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert records[0] == records[1]
    assert records[0]["output_loss"] == pytest.approx(record["output_loss"], rel=1e-4)
    for name, tensor in student.network.state_dict().items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)
