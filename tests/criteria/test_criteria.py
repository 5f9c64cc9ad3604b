"""The contract of every criterion in conf/criterion/ on every kind of network, and what some of them measure."""

import contextlib
import copy
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.resnet import ResnetBlock2D
from omegaconf import DictConfig
from support.networks import last_layers, part, same_tensors, tiny_backbone, tiny_batch, tiny_seeds
from support.pipelines import tiny_pipeline
from torch import nn
from torch.utils.data import DataLoader

from conf import schema
from conf.schema import ROOT
from criteria.base import Criterion
from criteria.scores.output_loss import OutputLoss
from experiments.engine.pipeline import run_pipeline
from lightning_modules.backbones.diffusion.pruned_unet import Bypass
from lightning_modules.backbones.diffusion.unet import UNetBackbone
from lightning_modules.modules.scoring import score
from lightning_modules.training.trainer import make_trainer

GATES = ("bottleneck", "bottleneck_fast", "bottleneck_imagenet")
"""They are trained, and have a contract of their own in test_bottleneck.py."""
CRITERIA = sorted({path.stem for path in (ROOT / "conf" / "criterion").glob("*.yaml")} - {*GATES})
OTHER_LEVELS = ("ld_pruner depth", "magnitude operator", "taylor channel")
DIFFUSION = ("UNet2DModel", "sd", "sdxl", "dit")
FAMILIES = (*DIFFUSION, "llama")
NO_TEXT = "it takes no text to compare its images with"
BLOCKS_ONLY = "operators and channels can be removed from U-Nets only"
LAYERS_ONLY = "of a LlamaForCausalLM choose criterion.level="
OF_INPUTS = "it scores heads and channels of language models by the inputs of linear layers"
NO_LANGUAGE = "it is no language model; choose criterion=task_loss"
UNSUPPORTED = {
    ("clip_score", "UNet2DModel"): NO_TEXT,
    ("clip_score", "dit"): NO_TEXT,
    ("ld_pruner", "dit"): BLOCKS_ONLY,
    ("magnitude operator", "dit"): BLOCKS_ONLY,
    ("taylor channel", "dit"): BLOCKS_ONLY,
    ("diff_pruning", "dit"): BLOCKS_ONLY,
    ("diff_pruning", "llama"): "criterion.threshold=0.05 is for networks with timesteps; choose null",
    **{(name, "llama"): "it generates nothing" for name in ("clip_score", "ld_pruner", "ld_pruner depth")},
    ("magnitude operator", "llama"): LAYERS_ONLY,
    **{("perplexity", family): NO_LANGUAGE for family in DIFFUSION},
    **dict.fromkeys(product(("wanda", "flap"), DIFFUSION), OF_INPUTS),
    **{("bn_scale", family): "it has no batch norms, whose scales are compared" for family in FAMILIES},
}
"""{(criterion, family): what is said of the pair}"""
PAIRS = [pair for pair in product((*CRITERIA, *OTHER_LEVELS), FAMILIES) if pair not in UNSUPPORTED]
SAMPLES, SEEDS = 5, 2
CPU = SimpleNamespace(accelerator="cpu", devices=1, num_nodes=1, strategy="auto", options={})


NODES: dict[str, DictConfig] = {}
"""Composed once for the whole file."""


@pytest.fixture
def make(request, configure):
    """make(name) -> a new criterion of conf/criterion/, perhaps at another level: "name" or "name level"."""

    def one(name: str) -> Criterion:
        if name not in NODES:
            given = ["sampler.steps=2", *overrides_of(name)]
            if name == "clip_score":
                given.append(f"criterion.path={request.getfixturevalue('clip')}")
            NODES[name] = configure(*given).criterion
        return schema.build(NODES[name])

    return one


def overrides_of(name: str) -> list[str]:
    criterion, _, level = name.partition(" ")
    return [f"criterion={criterion}", *([f"criterion.level={level}"] if level else [])]


@pytest.fixture
def backbone(family: str) -> Any:
    return tiny_backbone(family)


each_family = pytest.mark.parametrize("family", FAMILIES)


def batches(criterion: Criterion, backbone: Any, size: int) -> list[dict[str, Any]]:
    of_seeds = criterion.needs == "seeds"
    count = SEEDS if of_seeds else SAMPLES
    whole = tiny_seeds(backbone, count) if of_seeds else tiny_batch(backbone, count)
    return [part(whole, i, i + size) for i in range(0, count, size)]


def bare(criterion: Criterion, backbone: Any, size: int = 2, seed: int = 0) -> dict[str, dict[str, float]]:
    criterion.start(backbone, backbone.units(criterion.level), seed)
    with torch.enable_grad() if criterion.needs_grad else torch.no_grad():
        for number in range(criterion.passes):
            if number:
                criterion.end_pass()
            for batch in batches(criterion, backbone, size):
                criterion.update(batch)
    return criterion.finish()


def under_trainer(criterion: Criterion, backbone: Any, size: int = 2, seed: int = 0) -> dict[str, dict[str, float]]:
    trainer = make_trainer(CPU, "score units", "32-true", inference_mode=not criterion.needs_grad)
    loader = DataLoader(batches(criterion, backbone, size), batch_size=None)
    return score(criterion, backbone, backbone.units(criterion.level), loader, trainer, seed)


def values(scores: dict[str, dict[str, float]], column: str = "score") -> np.ndarray:
    return np.array([entry[column] for entry in scores.values()])


# The contract

ROUNDING = {"clip_score": 0.1}
"""{criterion: how far its scores may move with the size of batches}. Images have 256 levels: a rounding error of 1e-4,
which is that of a GPU, turns some pixels to the next level, and a pixel of these small images moves a CLIP score, which
has 100 points, by 0.02."""


@contextlib.contextmanager
def untouched(backbone: Any) -> Iterator[None]:
    """Nothing inside may change the network: its weights, modes, flags, gradients, parts or hooks."""
    modules, parameters = dict(backbone.named_modules()), dict(backbone.named_parameters())
    for module in list(modules.values())[::3]:  # a mixture of modes, to be found again
        module.training = not isinstance(module, ResnetBlock2D)  # which rounds otherwise in training
    for parameter in list(parameters.values())[::4]:
        parameter.requires_grad_(False)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    modes = {name: module.training for name, module in modules.items()}
    state, flags = copy.deepcopy(backbone.state_dict()), [p.requires_grad for p in backbone.parameters()]
    assert len(set(modes.values())) == len(set(flags)) == 2

    yield

    assert dict(backbone.named_modules()) == modules  # the same objects
    assert same_tensors(backbone.state_dict(), state)
    assert {name: module.training for name, module in modules.items()} == modes
    assert [p.requires_grad for p in backbone.parameters()] == flags
    for name, parameter in backbone.named_parameters():
        assert parameter is parameters[name]
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, torch.ones_like(parameter)), name
        else:
            assert parameter.grad is None, name
        assert not parameter._backward_hooks, name
    for name, module in modules.items():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks, name
        assert "forward" not in vars(module), name
    pipeline_parts = getattr(backbone, "pipeline_parts", None)
    for around in pipeline_parts.modules() if pipeline_parts else ():
        assert not around.training and not any(p.requires_grad or p.grad is not None for p in around.parameters())


CONTRACTS = [pytest.param(*pair, marks=pytest.mark.slow if pair[1] == "sdxl" else ()) for pair in PAIRS]
"""SDXL has the blocks of SD, and more of them."""


@pytest.mark.parametrize(("name", "family"), CONTRACTS)
def test_every_criterion_keeps_the_contract(make, backbone, name):
    """Every unit once, finite, repeatable, the same however it is driven, and the network is as it was."""
    assert make(name).supports(backbone) is None, "a pair that cannot be belongs into UNSUPPORTED, with its reason"
    with untouched(backbone):
        scores = bare(make(name), backbone)
        torch.rand(3)  # the global generator plays no part
        again = bare(make(name), backbone)
        one_by_one = bare(make(name), backbone, size=1)
    with untouched(backbone):
        trained = under_trainer(make(name), backbone)
    assert list(scores) == [unit.name for unit in backbone.units(make(name).level)]
    assert np.isfinite(values(scores)).all()
    assert len(set(values(scores))) > 1, "a criterion that tells no unit from another"
    assert again == scores
    np.testing.assert_allclose(values(trained), values(scores), rtol=1e-12)
    relative = 1e-2 if make(name).needs == "seeds" else 1e-4  # of sums over denoising steps, and over one pass
    for column in next(iter(scores.values())):
        expected = values(scores, column)
        rounding = max(relative * np.abs(expected).max(), ROUNDING.get(name, 0))
        np.testing.assert_allclose(values(one_by_one, column), expected, 1e-3, rounding)


NO_HARM_IS_NOT_ZERO = {
    "random": "it draws an order",
    "magnitude": "weights count whatever they do",
    "magnitude operator": "weights count whatever they do",
    "bn_scale": "scales count whatever is behind them",
    "perplexity": "it is the perplexity that is left, not its increase",
}
"""{criterion whose scores are an order, not additive harms: why}"""


@torch.no_grad()
def make_harmless(backbone: Any, level: str) -> str:
    """Change the weights so that the network computes the same without a certain unit; return the unit's name."""
    units = backbone.units(level)
    if level == "channel":  # nothing reads them
        weights, name = backbone.weights(), units[0].name
        for (layer, side), indices in backbone.channels.cuts[name].items():
            if side == "in":
                weights[f"{layer}.weight"].index_fill_(1, indices, 0)
        return name
    modules = {unit.name: backbone.network.get_submodule(unit.name) for unit in units}
    if level == "operator":  # a convolution that passes on what it is given
        same = [name for name, part in modules.items() if isinstance(part, nn.Conv2d) and part.in_channels == 16]
        name = next(name for name in same if modules[name].out_channels == 16 and modules[name].stride == (1, 1))
        nn.init.dirac_(modules[name].weight)
        nn.init.zeros_(modules[name].bias)
        return name
    name = units[0].name
    for layer in last_layers(modules[name]):
        for parameter in layer.parameters():
            parameter.zero_()
    return name


def check_no_harm_is_zero(criterion: Criterion, family: str) -> None:
    backbone = tiny_backbone(family)
    name = make_harmless(backbone, criterion.level)
    scores = bare(criterion, backbone, size=SAMPLES)
    assert abs(scores[name]["score"]) <= 1e-6 * np.abs(values(scores)).max()  # of rounding


@pytest.mark.parametrize("name", [name for name in (*CRITERIA, *OTHER_LEVELS) if name not in NO_HARM_IS_NOT_ZERO])
def test_a_unit_whose_removal_changes_nothing_scores_zero(make, name):
    family = next(family for family in FAMILIES if (name, family) in PAIRS)
    check_no_harm_is_zero(make(name), family)


class Shifted(OutputLoss):
    """Harms with a constant added to each."""

    def compute(self):
        return {name: {"score": entry["score"] + 1} for name, entry in super().compute().items()}


def test_a_constant_added_to_every_score_is_noticed():
    with pytest.raises(AssertionError):
        check_no_harm_is_zero(Shifted(), "UNet2DModel")


@pytest.mark.parametrize(("name", "family"), UNSUPPORTED)
def test_an_unsupported_pair_has_its_reason(make, backbone, name, family):
    assert UNSUPPORTED[name, family] in make(name).supports(backbone)


@pytest.mark.parametrize(("name", "family"), [pair for pair in UNSUPPORTED if pair[1] in ("UNet2DModel", "dit")])
def test_an_unsupported_pair_ends_the_job_before_scoring(
    make, configure, overrides, backbone, name, family, tmp_path, monkeypatch
):
    reason = make(name).supports(backbone)
    given = overrides_of(name)
    if family == "dit":
        given.append(f"teacher.path={tiny_pipeline('dit', tmp_path / 'dit')}")
    monkeypatch.setattr("experiments.engine.stages.score.score", lambda *_: pytest.fail("it is scored"))
    with pytest.raises(ValueError) as caught:
        run_pipeline(configure(*overrides, *given))
    assert str(caught.value) == f"criterion={name.split()[0]} cannot score teacher=ddpm_cifar10: {reason}"
    assert not list(tmp_path.rglob("scores.json"))


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "bn_scale"])
def test_the_network_can_be_trained_after_scoring(make, name):
    """Tensors made under a Trainer's inference mode would break the backward pass."""
    backbone = tiny_backbone("llama" if (name, "sd") in UNSUPPORTED else "sd")
    under_trainer(make(name), backbone)
    backbone.loss(backbone.calibration_inputs(tiny_batch(backbone), 0)).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


# Output loss


@each_family
@torch.no_grad()
def test_output_loss_and_its_standard_error_equal_a_plain_loop(backbone):
    found = bare(OutputLoss(), backbone)
    for unit in backbone.units():
        losses = []
        for batch in batches(OutputLoss(), backbone, 2):
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


@pytest.mark.parametrize("family", DIFFUSION)
def test_output_loss_depends_on_the_calibration_seed(backbone):
    assert (values(bare(OutputLoss(), backbone, seed=0)) != values(bare(OutputLoss(), backbone, seed=1))).all()


@torch.no_grad()
def test_a_unit_that_adds_nothing_has_an_output_loss_of_exactly_zero():
    """Its last layer is zero. Attentions are left to the test of bypassing: their strides change later roundings."""
    backbone = tiny_backbone("UNet2DConditionModel")
    dead = ["down_blocks.0.resnets.0", "mid_block.attentions.0", "up_blocks.0.resnets.1"]
    for name in dead:
        for layer in last_layers(backbone.network.get_submodule(name)):
            layer.weight.zero_()
            layer.bias.zero_()
    scores = bare(OutputLoss(), backbone)
    assert [name for name, entry in scores.items() if entry["score"] == 0] == dead
    assert [name for name, entry in scores.items() if entry["standard_error"] == 0] == dead
    assert all(entry["score"] >= 0 for entry in scores.values())


class Breaks(UNetBackbone):
    """Its output is not finite without one certain unit."""

    def predict(self, inputs):
        output = super().predict(inputs)
        return output * float("nan") if isinstance(self.network.mid_block.resnets[1], Bypass) else output


@pytest.mark.parametrize("drive", [bare, under_trainer])
def test_an_output_that_is_not_finite_without_a_unit_names_the_unit(drive):
    backbone = Breaks(tiny_backbone("UNet2DModel").network, DDPMScheduler())
    with pytest.raises(ValueError, match=r"the score of unit 'mid_block\.resnets\.1' is nan: .* not finite without it"):
        drive(OutputLoss(), backbone)


@each_family
def test_activations_that_are_not_finite_are_an_error(backbone):
    with torch.no_grad():
        next(backbone.network.parameters())[0] = float("nan")  # of the first layer
    first = backbone.units()[0].name
    with pytest.raises(ValueError, match=rf"the score of unit '{first}' is nan"):
        bare(OutputLoss(), backbone)


# Magnitude


@each_family
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_magnitude_counts_the_removed_weights_only(configure, backbone, reduction):
    found = bare(schema.build(configure("criterion=magnitude", f"criterion.reduction={reduction}").criterion), backbone)
    for unit in backbone.units():
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


def test_random_differs_between_its_seeds_and_not_between_calibrations(configure):
    backbone, orders = tiny_backbone("UNet2DModel"), []
    for seed in range(4):
        node = configure("criterion=random", f"criterion.seed={seed}").criterion
        scores = bare(schema.build(node), backbone, seed=0)
        assert bare(schema.build(node), backbone, seed=1) == scores
        orders.append(tuple(np.argsort(values(scores))))
    assert len(set(orders)) == 4


def test_random_is_taken_as_an_order(configure):
    assert configure("criterion=random").selection.name == "ranked"


@pytest.mark.parametrize(
    ("family", "field"),
    [
        ("UNet2DConditionModel", "conditions"),
        *((family, "caption") for family in ("sd", "sdxl", "pixart", "sd3", "flux")),
        ("dit", "label"),
    ],
)
@torch.no_grad()
def test_the_conditions_of_a_batch_reach_the_network(backbone, field):
    batch = tiny_batch(backbone, 3)
    turned = part(batch, 1, 3)[field], part(batch, 0, 2)[field]
    a, b = (backbone.predict(backbone.calibration_inputs(part(batch, 0, 2) | {field: each}, 0)) for each in turned)
    assert not torch.equal(a, b)
