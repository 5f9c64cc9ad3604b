"""Gates in the place of units: what they do to the output, what is left of a cost under them."""

import functools
from typing import Any

import pytest
import torch
from support.networks import UNETS, bypasses, replacements, tiny_backbone, tiny_batch
from torch import Tensor, nn

from criteria.selection.base import group
from lightning_modules.backbones.classification.backbone import ClassifierBackbone
from lightning_modules.backbones.classification.image_networks import build

CLASSIFIERS = {
    "cifar_resnet": {"blocks": 1, "image_size": 8},
    "vgg16_bn": {"image_size": 16},
    "densenet": {"layers": 2, "growth": 4, "image_size": 8},
    "googlenet": {"image_size": 8},
    "torchvision": {"name": "resnet18", "classes": 5, "image_size": 32},
}
DEPTH = ("UNet2DModel", "sdxl", "dit", "sd3", "flux", "llama")


@functools.cache
def classifier(architecture: str) -> ClassifierBackbone:
    """Random weights and statistics of norms."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build({"architecture": architecture, **CLASSIFIERS[architecture]}).eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for tensor, mean in ((module.weight, 1), (module.bias, 0), (module.running_mean, 0)):
                    nn.init.normal_(tensor, mean, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return ClassifierBackbone(network.requires_grad_(False))


def images(backbone: ClassifierBackbone, count: int = 3) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {"sample": torch.rand(count, *backbone.image_shape(), generator=rng) * 2 - 1, "target": torch.arange(count)}


def grouped(backbone: Any, level: str) -> dict[str, int]:
    """{group: how many units it has}."""
    names = [group(unit.name) for unit in backbone.units(level)]
    return {name: names.count(name) for name in names}


def drawn(backbone: Any, level: str, share: float, seed: int = 0) -> tuple[dict[str, Tensor], list[str]]:
    """Gates of 0 and 1, `share` of them 0, and the units of gate 0; a group of channels keeps its first."""
    rng = torch.Generator().manual_seed(seed)
    gates = {name: (torch.rand(n, generator=rng) >= share).float() for name, n in grouped(backbone, level).items()}
    gone = []
    for name, gate in gates.items():
        if level == "channel":
            gate[0] = 1
        gone += [f"{name}:{i}" if level == "channel" else name for i in range(len(gate)) if not gate[i]]
    return gates, gone


def slices(names: list[str]) -> list[dict[str, str]]:
    return [{"unit": name, "kind": "slice"} for name in names]


@pytest.fixture(params=CLASSIFIERS)
def network(request) -> ClassifierBackbone:
    return classifier(request.param)


def test_a_classifier_under_gates_of_zero_and_one_is_the_pruned_network(network):
    gates, gone = drawn(network, "channel", share=0.6)
    student = network.pruned(slices(gone))
    inputs = images(network)
    with torch.no_grad():
        with network.gated(gates, "channel"):
            masked = network.predict(inputs)
        pruned, dense = student.predict(inputs), network.predict(inputs)
    assert (masked - pruned).abs().max() <= 2e-6 * dense.abs().max()
    assert (dense - pruned).abs().max() > 1e-3 * dense.abs().max()
    # Soft costs, the counting of sliced layers and, for MACs, what is counted as the network runs: the same numbers.
    for budget, total in student.totals().items():
        assert float(network.soft_cost(gates, budget, "channel")) == total
        assert network.totals()[budget] - network.cost(gone, budget) == total
    assert student.channels.total_cost("macs") == student.macs().linear
    assert student.channels.total_cost("params") == student.params()


def test_open_gates_of_channels_change_no_bit_and_others_are_not_touched(network):
    gates = {name: torch.ones(n) for name, n in grouped(network, "channel").items()}
    inputs = images(network)
    first = next(iter(gates))
    with torch.no_grad():
        dense = network.predict(inputs)
        with network.gated(gates, "channel"):
            assert torch.equal(network.predict(inputs), dense)
        with network.gated({first: torch.zeros(len(gates[first]))}, "channel"):
            assert not torch.equal(network.predict(inputs), dense)
        assert torch.equal(network.predict(inputs), dense)
    assert float(network.soft_cost(gates, "flops", "channel")) == network.totals()["flops"]


def test_all_that_write_to_a_stream_share_its_gates():
    cuts = classifier("torchvision").channels.cuts
    first = next(part for part in cuts.values() if ("network.layer2.1.conv2", "out") in part)
    writers = ("0.conv2", "0.bn2", "0.downsample.0", "0.downsample.1", "1.conv2", "1.bn2")
    assert {layer for layer, side in first if side == "out"} == {f"network.layer2.{part}" for part in writers}
    readers = {"network.layer2.1.conv1", "network.layer3.0.conv1", "network.layer3.0.downsample.0"}
    assert {layer for layer, side in first if side == "in"} == readers


def test_soft_costs_have_the_gradient_of_the_product_of_widths():
    network = classifier("cifar_resnet")
    gates = {name: torch.rand(n).requires_grad_() for name, n in grouped(network, "channel").items()}
    network.soft_cost(gates, "macs", "channel").backward()
    # conv1 of the second stage: 16 channels in, 4x4 outputs, 3x3 taps; conv2 takes it in and gives its own soft width.
    expected = 16 * 9 * 16 + float(gates["stages.1.0.conv2"].detach().double().sum()) * 9 * 16
    assert torch.allclose(gates["stages.1.0.conv1"].grad.double(), torch.tensor(expected).double(), rtol=1e-6)


@pytest.mark.parametrize("family", DEPTH)
def test_depth_gates_remove_at_zero_and_keep_at_one(family):
    backbone = tiny_backbone(family)
    inputs = backbone.calibration_inputs(tiny_batch(backbone), seed=0)
    everything = [unit.name for unit in backbone.units()]
    shared = {name for part in backbone.shared() for name in part.units}
    with torch.no_grad():
        dense = backbone.predict(inputs)
        for seed, share in ((0, 0.5), (1, 0.3), (2, 1.0)):
            gates, gone = drawn(backbone, "depth", share, seed)
            gates |= {name: torch.zeros(1) for name in shared if seed == 1}  # what goes with several units goes, too
            gone = [name for name in everything if not gates[name]]
            with backbone.without(gone):
                expected = backbone.predict(inputs)
            with backbone.gated(gates, "depth"):
                assert torch.allclose(backbone.predict(inputs), expected, rtol=1e-5, atol=1e-6)
            student = backbone.pruned(bypasses(gone)) if len(gone) < len(everything) or family != "llama" else None
            for budget, total in (student.totals() if student else {}).items():
                assert float(backbone.soft_cost(gates, budget, "depth")) == total
        with backbone.gated({name: torch.ones(1) for name in everything}, "depth"):
            # U-Nets: an attention turns its output to other strides, in which a convolution may round otherwise.
            whole = backbone.predict(inputs)
            if family in ("UNet2DModel", "sdxl"):
                assert torch.allclose(whole, dense, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(whole, dense)
        assert torch.equal(backbone.predict(inputs), dense)


@pytest.mark.parametrize("family", UNETS)
def test_gates_of_operators_and_channels_of_a_unet(family):
    backbone = tiny_backbone(family)
    inputs = backbone.calibration_inputs(tiny_batch(backbone), seed=0)
    operators = {unit.name: unit for unit in backbone.units("operator")}
    alone = [name for name, unit in operators.items() if unit.inside is None]
    gone = sorted({*alone[::3], *(unit.inside for unit in operators.values() if unit.inside)}, key=alone.index)
    nested = [name for name, unit in operators.items() if unit.inside]
    assert nested or family != "UNet2DModel"
    gates = {name: torch.tensor([float(name not in gone and name not in nested)]) for name in operators}
    with torch.no_grad():
        with backbone.without(gone):
            expected = backbone.predict(inputs)
        with backbone.gated(gates, "operator"):
            assert torch.allclose(backbone.predict(inputs), expected, rtol=1e-5, atol=1e-6)
    assert float(backbone.soft_cost(gates, "params", "operator")) == backbone.pruned(replacements(gone)).params()
    gates, gone = drawn(backbone, "channel", 0.5)
    student = backbone.pruned(slices(gone))
    for budget, total in student.totals().items():
        assert float(backbone.soft_cost(gates, budget, "channel")) == total


@pytest.mark.parametrize("architecture", ["cifar_resnet", "densenet"])
def test_a_network_with_single_channels_left_is_pruned_again(architecture):
    whole = classifier(architecture)
    first = next(iter(grouped(whole, "channel")))
    alone = "stages.0.0.conv2" if architecture == "cifar_resnet" else first
    once = whole.pruned(slices([f"{alone}:{i}" for i in range(1, grouped(whole, "channel")[alone])]))
    assert alone not in grouped(once, "channel")
    gates, gone = drawn(once, "channel", 0.5)
    twice = once.pruned(slices(gone))
    inputs = images(once)
    with torch.no_grad(), once.gated(gates, "channel"):
        masked = once.predict(inputs)
    with torch.no_grad():
        assert torch.allclose(twice.predict(inputs), masked, rtol=1e-4, atol=1e-5 * float(masked.abs().max()))
    assert twice.totals() == {budget: float(once.soft_cost(gates, budget, "channel")) for budget in twice.totals()}


def test_an_unknown_unit_of_channels_is_said():
    with pytest.raises(
        ValueError, match=r"unit 'conv9:0' is no block of channels; choose among: stages\.0\.0\.conv1:0"
    ):
        classifier("cifar_resnet").cost(["conv9:0"], "flops")


def test_gradients_reach_every_gate():
    for backbone, level in ((tiny_backbone("sdxl"), "depth"), (classifier("densenet"), "channel")):
        inputs = images(backbone) if level == "channel" else backbone.calibration_inputs(tiny_batch(backbone), seed=0)
        gates = {name: torch.full((n,), 0.9).requires_grad_() for name, n in grouped(backbone, level).items()}
        with backbone.gated(gates, level):
            backbone.loss(inputs).backward()
        assert all(gate.grad is not None and gate.grad.isfinite().all() for gate in gates.values())
        assert sum(int((gate.grad == 0).all()) for gate in gates.values()) == 0
