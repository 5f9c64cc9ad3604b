"""The contract of every criterion in conf/criterion/, and what each of them measures."""

import copy
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from helpers_networks import FAMILIES, last_layer, same_tensors, tiny_backbone, tiny_batch
from torch import Tensor
from torch.utils.data import DataLoader

from conf import schema
from conf.schema import ROOT
from criteria.base import Criterion, Unit
from lightning_modules.backbones.pruned_unet import Bypass
from lightning_modules.backbones.unet import UNetBackbone
from lightning_modules.scoring import score
from lightning_modules.training import make_trainer

CRITERIA = sorted(path.stem for path in (ROOT / "conf" / "criterion").glob("*.yaml"))
SAMPLES = 5  # no multiple of any batch size below but 1
CPU = SimpleNamespace(accelerator="cpu", devices=1, num_nodes=1, strategy="auto")


@pytest.fixture(params=FAMILIES)
def backbone(request) -> UNetBackbone:
    return tiny_backbone(request.param)


@functools.cache
def units_of(family: str) -> list[Unit]:
    return tiny_backbone(family).units()


def units(backbone: UNetBackbone) -> list[Unit]:
    """What backbone.units() says, counted once per family."""
    return units_of(type(backbone.network).__name__)


def batches(backbone: UNetBackbone, size: int = 2) -> list[dict[str, Tensor]]:
    whole = tiny_batch(backbone, SAMPLES)
    return [{key: value[i : i + size] for key, value in whole.items()} for i in range(0, SAMPLES, size)]


def bare(criterion: Criterion, backbone: UNetBackbone, size: int = 2, seed: int = 0) -> dict[str, dict[str, float]]:
    criterion.start(backbone, units(backbone), seed)
    with torch.enable_grad() if criterion.needs_grad else torch.no_grad():
        for batch in batches(backbone, size):
            criterion.update(batch)
    return criterion.finish()


def under_trainer(
    criterion: Criterion, backbone: UNetBackbone, size: int = 2, seed: int = 0
) -> dict[str, dict[str, float]]:
    trainer = make_trainer(CPU, "score units", "32-true", inference_mode=not criterion.needs_grad)
    loader = DataLoader(batches(backbone, size), batch_size=None)
    return score(criterion, backbone, units(backbone), loader, trainer, seed)


def values(scores: dict[str, dict[str, float]], column: str = "score") -> np.ndarray:
    return np.array([entry[column] for entry in scores.values()])


@pytest.fixture(params=CRITERIA)
def make(request, configure):
    """A new instance of one of the criteria of conf/criterion/."""
    node = configure(f"criterion={request.param}").criterion
    assert node.name == request.param
    return lambda: schema.build(node)


# The contract


@pytest.mark.parametrize("drive", [bare, under_trainer])
def test_scores_name_every_unit_once_are_finite_and_repeatable(make, backbone, drive):
    scores = drive(make(), backbone)
    assert list(scores) == [unit.name for unit in units(backbone)]
    assert np.isfinite(values(scores)).all()
    assert len(set(values(scores))) > 1, "a criterion that tells no unit from another"
    torch.rand(3)  # the global generator plays no part
    assert drive(make(), backbone) == scores


def test_scores_are_the_same_bare_and_under_a_trainer(make, backbone):
    np.testing.assert_allclose(values(under_trainer(make(), backbone)), values(bare(make(), backbone)), rtol=1e-12)


@pytest.mark.parametrize("drive", [bare, under_trainer])
def test_a_criterion_leaves_the_network_untouched(make, backbone, drive):
    backbone.network.mid_block.train()  # a mixture of modes, to be found again
    backbone.network.conv_in.requires_grad_(False)
    for parameter in backbone.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    modules = dict(backbone.named_modules())
    modes = {name: module.training for name, module in modules.items()}
    state, flags = copy.deepcopy(backbone.state_dict()), [p.requires_grad for p in backbone.parameters()]

    drive(make(), backbone)

    assert dict(backbone.named_modules()) == modules  # the same objects
    assert same_tensors(backbone.state_dict(), state)
    assert {name: module.training for name, module in modules.items()} == modes
    assert [p.requires_grad for p in backbone.parameters()] == flags
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, torch.ones_like(parameter)), name
        else:
            assert parameter.grad is None, name
    for name, module in modules.items():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks, name
        assert "forward" not in vars(module), name


@pytest.mark.parametrize("name", CRITERIA)
def test_the_network_can_be_trained_after_scoring(name, configure):
    """Tensors made under a Trainer's inference mode would break the backward pass."""
    backbone = tiny_backbone("UNet2DModel")
    under_trainer(schema.build(configure(f"criterion={name}").criterion), backbone)
    backbone.loss(backbone.calibration_inputs(tiny_batch(backbone), 0)).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


# Output loss


def output_loss() -> Criterion:
    return schema.build(schema.OmegaConf.create({"_target_": "criteria.output_loss.OutputLoss"}))


@torch.no_grad()
def test_output_loss_and_its_standard_error_equal_a_plain_loop(backbone):
    found = bare(output_loss(), backbone)
    for unit in units(backbone):
        losses = []
        for batch in batches(backbone):
            inputs = backbone.calibration_inputs(batch, 0)
            dense = backbone.predict(inputs).double().numpy()
            with backbone.without([unit.name]):
                pruned = backbone.predict(inputs).double().numpy()
            losses += [np.mean((a - b) ** 2) for a, b in zip(pruned, dense, strict=True)]
        assert len(losses) == SAMPLES
        entry = found[unit.name]
        assert set(entry) == {"score", "standard_error"}
        np.testing.assert_allclose(entry["score"], np.mean(losses), rtol=1e-12)
        np.testing.assert_allclose(entry["standard_error"], np.std(losses, ddof=1) / np.sqrt(SAMPLES), rtol=1e-9)


@pytest.mark.parametrize("size", [1, 3, SAMPLES])
def test_output_loss_does_not_depend_on_the_batch_size(backbone, size):
    for column in ("score", "standard_error"):
        expected = values(bare(output_loss(), backbone, 2), column)
        np.testing.assert_allclose(values(bare(output_loss(), backbone, size), column), expected, rtol=1e-4)


def test_output_loss_depends_on_the_calibration_seed(backbone):
    assert (values(bare(output_loss(), backbone, seed=0)) != values(bare(output_loss(), backbone, seed=1))).all()


@torch.no_grad()
def test_a_unit_that_adds_nothing_has_an_output_loss_of_exactly_zero():
    """Its last layer is zero. Attentions are left to the test of bypassing: their strides change later roundings."""
    backbone = tiny_backbone("UNet2DConditionModel")
    dead = ["down_blocks.0.resnets.0", "mid_block.attentions.0", "up_blocks.0.resnets.1"]
    for name in dead:
        for parameter in last_layer(backbone.network.get_submodule(name)).parameters():
            parameter.zero_()
    scores = bare(output_loss(), backbone)
    assert [name for name, entry in scores.items() if entry["score"] == 0] == dead
    assert [name for name, entry in scores.items() if entry["standard_error"] == 0] == dead
    assert all(entry["score"] >= 0 for entry in scores.values())


class Breaks(UNetBackbone):
    """Its output is not finite without one certain unit."""

    def predict(self, inputs):
        output = super().predict(inputs)
        return output * float("nan") if isinstance(self.network.mid_block.resnets[1], Bypass) else output


@pytest.mark.parametrize("drive", [bare, under_trainer])
def test_an_output_that_is_not_finite_without_a_unit_is_an_error_naming_the_unit(drive):
    backbone = Breaks(tiny_backbone("UNet2DModel").network, DDPMScheduler())
    with pytest.raises(ValueError, match=r"the score of unit 'mid_block\.resnets\.1' is nan: .* not finite without it"):
        drive(output_loss(), backbone)


def test_activations_that_are_not_finite_are_an_error(backbone):
    with torch.no_grad():
        backbone.network.conv_in.bias[0] = float("nan")
    first = units(backbone)[0].name
    with pytest.raises(ValueError, match=rf"the score of unit '{first}' is nan"):
        bare(output_loss(), backbone)


# Magnitude


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_magnitude_is_that_of_the_weights_that_go(configure, backbone, reduction):
    found = bare(schema.build(configure("criterion=magnitude", f"criterion.reduction={reduction}").criterion), backbone)
    for unit in units(backbone):
        module = backbone.network.get_submodule(unit.name)
        gone = torch.cat(
            [
                w.detach().double().flatten()
                for key, w in module.state_dict().items()
                if not key.startswith("conv_shortcut")
            ]
        )
        assert len(gone) == unit.params
        expected = float(gone.abs().sum()) if reduction == "sum" else float(gone.abs().mean())
        np.testing.assert_allclose(found[unit.name]["score"], expected, rtol=1e-12)


def test_an_unknown_reduction_lists_the_choices(configure):
    with pytest.raises(Exception, match=r"criterion\.reduction='max' is unknown; choose one of: sum, mean"):
        schema.build(configure("criterion=magnitude", "criterion.reduction=max").criterion)


# Random


def test_random_differs_between_its_seeds_and_not_between_calibrations(configure, backbone):
    orders = []
    for seed in range(4):
        node = configure("criterion=random", f"criterion.seed={seed}").criterion
        scores = bare(schema.build(node), backbone, seed=0)
        assert bare(schema.build(node), backbone, seed=1) == scores
        orders.append(tuple(np.argsort(values(scores))))
    assert len(set(orders)) == 4


def test_random_is_taken_as_an_order(configure):
    assert configure("criterion=random").selection.name == "ranked"


def test_the_conditions_of_a_batch_reach_the_network():
    backbone = tiny_backbone("UNet2DConditionModel")
    assert isinstance(backbone.network, UNet2DConditionModel)
    batch = tiny_batch(backbone)
    other = batch | {"encoder_hidden_states": batch["encoder_hidden_states"].flip(0)}
    with torch.no_grad():
        a, b = (backbone.predict(backbone.calibration_inputs(each, 0)) for each in (batch, other))
    assert not torch.equal(a, b)
