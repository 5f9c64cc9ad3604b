"""Trained gates (AutoBot) by hand and on every kind of network, and the scales of batch norms."""

import contextlib
import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.classification import tiny_classifier
from support.networks import part, tiny_backbone, tiny_batch
from support.ranks import two_ranks
from test_criteria import CPU, under_trainer, untouched, values
from torch import nn
from torch.utils.data import DataLoader

from criteria.base import Unit
from criteria.scores.bn_scale import BnScale
from criteria.scores.bottleneck import Bottleneck, binary_loss, budget_loss
from experiments.engine.artefacts import read_json
from experiments.engine.pipeline import run_pipeline
from experiments.engine.stages.export import Export
from lightning_modules.backbones.classification.backbone import ClassifierBackbone
from lightning_modules.backbones.classification.image_networks import build
from lightning_modules.modules.gate_training import BottleneckTraining
from lightning_modules.modules.non_finite import NonFiniteLoss
from lightning_modules.modules.scoring import score
from lightning_modules.training.trainer import make_trainer

FAMILIES = ("UNet2DModel", "sdxl", "dit", "llama", "classifier")
"""classifiers lose channels, the others blocks"""


def gated(**fields: Any) -> Bottleneck:
    """The criterion as its configuration makes it."""
    return Bottleneck(**fields, module=BottleneckTraining)


class Gated(nn.Module):
    """y = two * (3 one_0 - one_1) x under gates, a loss of (y - target)^2, 10 parameters, one of them in no unit."""

    COSTS = {"one:0": 4, "one:1": 2, "two": 3}

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0, -1.0]))
        self.gates = {"one": torch.ones(2), "two": torch.ones(1)}

    def units(self, level):
        return [Unit(name, "channel", cost, 0) for name, cost in self.COSTS.items()]

    def totals(self):
        return {"params": 10, "macs": 7}

    @contextlib.contextmanager
    def gated(self, gates, level):
        whole, self.gates = self.gates, gates
        yield
        self.gates = whole

    def soft_cost(self, gates, budget, level):
        return 1 + (torch.cat([gates["one"], gates["two"]]) * torch.tensor([4.0, 2.0, 3.0])).double().sum()

    def calibration_inputs(self, batch, seed):
        return batch

    def predict(self, inputs):
        return (self.gates["one"] * self.weight).sum() * self.gates["two"] * inputs["x"]

    def losses(self, output, inputs):
        return (output - inputs["target"]).square()


def loader(*batches: tuple[list[float], float]) -> DataLoader:
    """Batches of (samples, their target)."""
    content = [{"x": torch.tensor(x), "target": torch.full((len(x),), target)} for x, target in batches]
    return DataLoader(content, batch_size=None)


def trained(criterion: Bottleneck, batches: DataLoader, backbone: Any = None) -> dict[str, float]:
    backbone = backbone or Gated()
    trainer = make_trainer(CPU, "score units", "32-true", inference_mode=not criterion.needs_grad)
    scores = score(criterion, backbone, backbone.units(criterion.level), batches, trainer, 0)
    return {name: entry["score"] for name, entry in scores.items()}


def sigmoid(alpha: float) -> float:
    return 1 / (1 + math.exp(-alpha))


def by_hand(one_0: float, one_1: float, two: float, x2: float) -> dict[str, float]:
    """Loss and parts at these gates, a target of 5 parameters and samples of mean square `x2`."""
    task, cost = (two * (3 * one_0 - one_1)) ** 2 * x2, 1 + 4 * one_0 + 2 * one_1 + 3 * two
    l_g = (cost - 5) / (10 - 5) if cost > 5 else 1 - cost / 5
    open_or_not = [min(gate, 1 - gate) for gate in (one_0, one_1, two)]
    l_h = ((open_or_not[0] + open_or_not[1]) / 2 + open_or_not[2]) / 2
    return {"loss": task + 6 * l_g + 0.2 * l_h, "task": task, "L_g": l_g, "L_h": l_h, "cost": cost}


# Two steps by hand


def test_the_losses_and_the_first_adam_step_by_hand():
    """Adam's first step is `lr` against the sign of the gradient, which with these weights is positive but for one_1:
    2 * 1.62 * (-0.9) of the task, 6 * 2 / 5 of the cost, and -0.2 / 4."""
    criterion = gated(ratio=0.5, level="channel")
    scores = trained(criterion, loader(([1.0, 1.0], 0.0), ([2.0, 0.0], 0.0)))
    down, up = sigmoid(math.log(9) - 0.5), sigmoid(math.log(9) + 0.5)
    first, second = criterion.history
    assert first == pytest.approx(by_hand(0.9, 0.9, 0.9, 1), rel=1e-6)
    assert first["loss"] == pytest.approx(1.62**2 + 6 * 4.1 / 5 + 0.2 * 0.1, rel=1e-6)
    assert second == pytest.approx(by_hand(down, up, down, 2), rel=1e-6)
    assert scores == pytest.approx({"one:0": down, "one:1": up, "two": down}, rel=1e-6)


@pytest.mark.parametrize(
    ("cost", "expected"), [(10, 1), (7.5, 0.5), (5, 0), (4, 0.2), (0, 1)], ids=["whole", "above", "at", "below", "0"]
)
def test_the_distance_to_the_cost_that_is_wanted(cost, expected):
    assert float(budget_loss(torch.tensor(float(cost)), 5, 10)) == pytest.approx(expected)


def test_the_distance_of_gates_to_open_or_closed_counts_groups_alike():
    gates = {"a": torch.tensor([0.0, 1.0, 0.4, 0.8]), "b": torch.tensor([0.5])}
    assert float(binary_loss(gates)) == pytest.approx(((0.4 + 0.2) / 4 + 0.5) / 2)


def test_the_gates_of_the_lowest_late_loss_are_kept():
    criterion = gated(ratio=0.5, keep_after=0.6)
    criterion.start(Gated(), Gated().units("channel"), 0)
    for place, loss in enumerate([0.1, 0.2, 0.3, 0.4, 0.4, 0.5, 0.5, 0.7, 0.6, 0.6]):  # behind the seventh
        gates = {"one": torch.tensor([place / 10, 0.5]), "two": torch.ones(1)}
        criterion.record({"loss": loss}, gates, 10)
    assert criterion.finish()["one:0"]["score"] == pytest.approx(0.8)
    assert len(criterion.history) == 10


def test_a_target_is_the_same_as_the_ratio_that_comes_to_it():
    batches = loader(([1.0], 0.5), ([2.0], 0.5), ([0.5], 0.5))
    ratio, target = gated(ratio=0.6), gated(target=4)
    assert trained(ratio, batches) == trained(target, batches)
    assert ratio.history == target.history


def test_gates_trained_for_many_steps_close_the_harmful_channel():
    """one_0 does harm (the target is -1 = one_1 alone) and frees what is wanted."""
    scores = trained(gated(target=6), loader(*[([1.0], -1.0)] * 100))
    assert scores["one:0"] < 0.1 < 0.9 < min(scores["one:1"], scores["two"])


# What is said of what cannot be


@pytest.mark.parametrize("iteration", [1, 2, 3])
def test_a_loss_that_is_not_finite_names_the_iteration(iteration):
    batches = loader(*[([1.0], float("nan") if place == iteration else 0.0) for place in (1, 2, 3)])
    criterion = gated(ratio=0.5)
    with pytest.raises(NonFiniteLoss, match=rf"not finite at iteration {iteration} of 3 \(loss=nan, task=nan"):
        trained(criterion, batches)
    assert len(criterion.history) == iteration - 1


def test_one_batch_is_no_training():
    with pytest.raises(ValueError, match=r"calibration has 1 batch, .* raise calibration\.samples or lower"):
        trained(gated(ratio=0.5), loader(([1.0], 0.0)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "criterion.ratio=None, criterion.target=None: .* exactly one of selection.ratio and selection.target"),
        ({"ratio": 0.5, "target": 4}, "criterion.ratio=0.5, criterion.target=4: .* exactly one"),
        ({"ratio": 1.0}, "selection.ratio=1.0 is out of range; choose 0 < ratio < 1"),
        ({"target": 0}, "selection.target=0 is out of range; choose more than 0"),
        ({"ratio": 0.5, "gamma": -1}, "criterion.beta=6.0, criterion.gamma=-1: choose 0 or more"),
        ({"ratio": 0.5, "lr": 0}, "criterion.lr=0 is out of range; choose more than 0"),
        ({"ratio": 0.5, "init": 1}, "criterion.init=1 is out of range; choose 0 < init < 1"),
        ({"ratio": 0.5, "keep_after": 1}, "criterion.keep_after=1 is out of range; choose 0 <= keep_after < 1"),
        ({"ratio": 0.5, "level": "layer"}, "criterion.level='layer' is unknown; choose one of: depth, operator, chan"),
    ],
)
def test_a_field_out_of_range_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        gated(**fields)


def test_a_budget_that_is_not_counted_is_refused():
    backbone: Any = Gated()
    reason = gated(ratio=0.5, budget="latency").supports(backbone)
    assert reason == "gates are trained for a cost that is counted; choose selection.budget from: params, macs"
    assert gated(ratio=0.5, budget="macs").supports(backbone) is None


# The contract on every kind of network


@pytest.fixture(params=FAMILIES)
def backbone(request):
    return tiny_classifier() if request.param == "classifier" else tiny_backbone(request.param)


def test_every_criterion_keeps_the_contract(backbone):
    """Every unit once, between 0 and 1, the same again bit for bit, and the network is as it was."""
    level = "channel" if "flops" in backbone.totals() else "depth"
    with untouched(backbone):
        scores = under_trainer(gated(ratio=0.5, level=level), backbone)
        torch.rand(3)  # the global generator plays no part
        again = under_trainer(gated(ratio=0.5, level=level), backbone)
    assert scores == again
    assert list(scores) == [unit.name for unit in backbone.units(level)]
    assert all(0 < value < 1 for value in values(scores)) and len(set(values(scores))) > 1


def test_an_error_on_the_way_leaves_the_network_as_it_was():
    backbone = tiny_backbone("UNet2DModel")
    broken = copy.deepcopy(tiny_batch(backbone, 4))
    broken["image"][3] = float("nan")
    batches = DataLoader([part(broken, 0, 2), part(broken, 2, 4)], batch_size=None)
    with untouched(backbone), pytest.raises(NonFiniteLoss, match="iteration 2 of 2"):
        trained(gated(ratio=0.5, level="depth"), batches, backbone)


@pytest.mark.parametrize("budget", ["params", "macs", "flops"])
def test_gates_of_a_classifier_meet_their_budget(budget):
    backbone = tiny_classifier()
    whole = tiny_batch(backbone, 8)
    batches = DataLoader([part(whole, i % 8, i % 8 + 2) for i in range(0, 120, 2)], batch_size=None)
    criterion = gated(ratio=0.5, budget=budget, level="channel")
    trained(criterion, batches, backbone)
    assert criterion.wanted == backbone.totals()[budget] / 2
    kept = criterion.history[[entry["loss"] for entry in criterion.history].index(criterion.lowest)]
    assert kept["cost"] == pytest.approx(criterion.wanted, rel=0.05)
    assert float(backbone.soft_cost(criterion.kept, budget, "channel")) == pytest.approx(kept["cost"], rel=1e-12)


def test_a_job_trains_gates_for_the_ratio_of_its_selection(configure, overrides, tmp_path, monkeypatch):
    """Its samples come spread: in the order of their numbers the last steps would see but late timesteps."""
    numbers = []

    def watched(criterion, backbone, units, batches, *arguments):
        numbers.extend(int(number) for batch in batches for number in batch["number"])
        return score(criterion, backbone, units, batches, *arguments)

    monkeypatch.setattr("experiments.engine.stages.score.score", watched)
    monkeypatch.setattr(Export, "run", lambda *_: None)  # other tests', and long
    job = ("criterion=bottleneck", "selection.ratio=0.4", "distillation=none", "calibration.samples=8")
    run_pipeline(configure(*overrides, *job))
    assert sorted(numbers) == list(range(8)) != numbers
    (stored,) = (read_json(path) for path in tmp_path.glob("runs/.cache/scores/*.json"))
    given = stored["key"]["criterion"]
    assert (given["ratio"], given["target"], given["budget"]) == (0.4, None, "params")
    (folder,) = (tmp_path / "runs" / "debug").iterdir()
    removed = read_json(folder / "metrics.json")["plan/achieved_ratio"]
    assert 0.4 <= removed <= 0.5


# Several ranks


def on_ranks(ranks: int) -> tuple[dict[str, dict[str, float]], list[dict[str, float]]]:
    """Scores and history on batches that cannot be shared out evenly."""
    conf = copy.copy(CPU)
    conf.devices, conf.strategy = ranks, "ddp" if ranks > 1 else "auto"
    criterion, backbone = gated(ratio=0.5, level="channel"), tiny_classifier()
    whole = tiny_batch(backbone, 13)
    batches = DataLoader([part(whole, 0, 5), part(whole, 5, 10), part(whole, 10, 13)], batch_size=None)
    trainer = make_trainer(conf, "score units", "32-true", inference_mode=False)
    return score(criterion, backbone, backbone.units("channel"), batches, trainer, 0), criterion.history


def one_rank(rank: int, folder: Path) -> None:
    (folder / f"{rank}.json").write_text(json.dumps(on_ranks(2)))


@pytest.mark.slow
def test_two_ranks_share_every_batch_and_come_to_the_same_gates(tmp_path):
    """Adam makes a step of the sign of a gradient at first, so that these are compared by what comes of them."""
    with two_ranks(one_rank, tmp_path):
        pass
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second  # both ranks have all of it
    scores, history = on_ranks(1)
    np.testing.assert_allclose(values(first[0]), values(scores), rtol=1e-4)
    assert [entry["loss"] for entry in first[1]] == pytest.approx([entry["loss"] for entry in history], rel=1e-5)


# Scales of batch norms


def test_bn_scale_is_the_mean_absolute_gamma_of_a_channel():
    backbone = tiny_classifier()
    scores = under_trainer(BnScale(), backbone)
    network = backbone.network
    for name, norm in (("stages.1.0.conv1", network.stages[1][0].bn1), ("stages.2.0.conv2", network.stages[2][0].bn2)):
        for i in (0, 5):
            assert scores[f"{name}:{i}"]["score"] == pytest.approx(abs(float(norm.weight.detach()[i])), rel=1e-6)
    assert list(scores) == [unit.name for unit in backbone.units("channel")]


def test_norms_in_front_of_several_consumers_count_alike():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build({"architecture": "densenet", "layers": 2, "growth": 4, "image_size": 8}).eval()
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.normal_(norm.weight)
    scores = under_trainer(BnScale(), ClassifierBackbone(network))
    # The third channel of the first convolution goes through the norms of the first block and of what follows it.
    through = [network.dense1[0].bn1, network.dense1[1].bn1, network.trans1.bn1]
    expected = sum(abs(float(norm.weight.detach()[2])) for norm in through) / 3
    assert scores["conv1:2"]["score"] == pytest.approx(expected, rel=1e-6)


def test_a_network_without_batch_norms_has_no_scales():
    assert BnScale().supports(tiny_backbone("UNet2DModel")) == "it has no batch norms, whose scales are compared"
    with pytest.raises(ValueError, match=r"criterion.level='depth' is unknown; choose one of: channel"):
        BnScale(level="depth")
