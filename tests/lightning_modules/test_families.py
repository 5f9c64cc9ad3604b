"""Every family of networks as a backbone: what removing units means, in place and for good, and what comes back."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.downsampling import Downsample2D
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import (
    FAMILIES,
    SMALLER,
    TINY,
    TRANSFORMERS,
    UNETS,
    bypasses,
    replacements,
    same_tensors,
    tiny_backbone,
    tiny_batch,
    with_zeroed,
)
from torch import nn

from conf.schema import ROOT
from criteria.scores.output_loss import OutputLoss
from lightning_modules.backbones.diffusion.load import load_teacher
from lightning_modules.backbones.diffusion.pruned_unet import Pointwise
from lightning_modules.backbones.diffusion.sd3 import SD3Backbone
from lightning_modules.backbones.diffusion.unet import UNetBackbone
from lightning_modules.backbones.loading import load_network
from lightning_modules.export.export import make_dense_twin

WITH_OPERATORS = (*UNETS, *SMALLER)
LEVELS = [(family, "depth") for family in FAMILIES] + [(family, "operator") for family in WITH_OPERATORS]
PLANS = {"depth": bypasses, "operator": replacements}
few_examples = settings(max_examples=5, deadline=None, derandomize=True, database=None)
each_level = pytest.mark.parametrize(("family", "level"), LEVELS)


@pytest.fixture
def backbone(family: str) -> Any:
    return tiny_backbone(family)


@pytest.fixture
def inputs(backbone: Any) -> dict:
    return calibration(backbone)


def calibration(backbone: Any) -> dict:
    return backbone.calibration_inputs(tiny_batch(backbone, 2), seed=0)


def names_of(backbone: Any, level: str = "depth") -> list[str]:
    return [unit.name for unit in backbone.units(level)]


def some(backbone: Any, level: str) -> list[str]:
    """Every third unit, none inside another; of an SDXL also all basic blocks of one Transformer2D."""
    every, shared = backbone.units(level), backbone.shared(level)
    chosen = {unit.name for unit in every[::3]} | set(shared[0].units if shared else ())
    return [unit.name for unit in every if unit.name in chosen and unit.inside not in chosen]


def subset(data: st.DataObject, backbone: Any, level: str) -> list[str]:
    """Any units, none inside another, in any order."""
    chosen = data.draw(st.lists(st.sampled_from(backbone.units(level)), unique=True))
    names = {unit.name for unit in chosen}
    return [unit.name for unit in chosen if unit.inside not in names]


# What a bypass is


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bypassing_any_one_unit_equals_zeroing_its_last_layers(backbone, inputs):
    dense = backbone.predict(inputs)
    for name in names_of(backbone):
        expected = with_zeroed(backbone, [name]).predict(inputs)
        with backbone.without([name]):
            found = backbone.predict(inputs)
        assert torch.equal(found, expected), name
        assert not torch.equal(found, dense), f"{name} does nothing in this network: the test says nothing about it"


@pytest.mark.parametrize("family", FAMILIES)
@few_examples
@given(data=st.data())
@torch.no_grad()
def test_bypassing_any_subset_equals_zeroing_the_last_layers(family, data):
    backbone = tiny_backbone(family)
    inputs, names = calibration(backbone), subset(data, backbone, "depth")
    with backbone.without(names):
        found = backbone.predict(inputs)
    assert torch.equal(found, with_zeroed(backbone, names).predict(inputs))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bypassing_every_unit_equals_zeroing_the_last_layers(backbone, inputs):
    names = names_of(backbone)
    with backbone.without(names):
        found = backbone.predict(inputs)
    assert torch.equal(found, with_zeroed(backbone, names).predict(inputs))
    assert torch.equal(found, backbone.pruned(bypasses(names)).predict(inputs))


@torch.no_grad()
def test_an_attention_whose_processor_adds_its_input_leaves_the_input():
    """As in the SimpleCrossAttn blocks of DeepFloyd IF and Kandinsky 2."""
    config = UNETS["UNet2DConditionModel"][1] | {
        "down_block_types": ("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone: Any = UNetBackbone(UNet2DConditionModel(**config).eval(), DDPMScheduler())
    inputs = calibration(backbone)
    names = [unit.name for unit in backbone.units() if unit.kind == "attention"]
    assert len(names) == 4
    for chosen in (*([name] for name in names), names):
        expected = with_zeroed(backbone, chosen).predict(inputs)
        with backbone.without(chosen):
            assert torch.equal(backbone.predict(inputs), expected)
        assert torch.equal(backbone.pruned(bypasses(chosen)).predict(inputs), expected)


def test_blocks_that_the_stock_network_needs_are_not_units():
    """DiT embeds timestep and class for its output with block 0; the last joint block of SD3 gives no text stream."""
    found = {family: names_of(tiny_backbone(family)) for family in TRANSFORMERS}
    assert found == {
        "dit": [f"transformer_blocks.{i}" for i in (1, 2, 3)],
        "pixart": [f"transformer_blocks.{i}" for i in (0, 1, 2, 3)],
        "sd3": [f"transformer_blocks.{i}" for i in (0, 1)],
        "flux": ["transformer_blocks.0", "transformer_blocks.1"]
        + [f"single_transformer_blocks.{i}" for i in (0, 1, 2)],
    }
    for family, needed in {"dit": "transformer_blocks.0", "sd3": "transformer_blocks.2"}.items():
        with pytest.raises(ValueError, match=rf"plan\.units: '{needed}' is not a unit of this network"):
            tiny_backbone(family).pruned(bypasses([needed]))


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("level", ["operator", "channel"])
def test_transformers_have_neither_operators_nor_channels_to_remove(backbone, level):
    with pytest.raises(ValueError, match=rf"criterion\.level='{level}': .* choose criterion\.level=depth"):
        backbone.units(level)
    with pytest.raises(ValueError, match=r"can only lose whole blocks; the plan says \['replace'\]"):
        backbone.pruned(replacements(["transformer_blocks.1"]))


# In place and for good


@each_level
@few_examples
@given(data=st.data())
@torch.no_grad()
def test_without_some_units_equals_the_pruned_network(family, level, data):
    backbone = tiny_backbone(family)
    inputs, names = calibration(backbone), subset(data, backbone, level)
    with backbone.without(names):
        found = backbone.predict(inputs)
    assert torch.equal(found, backbone.pruned(PLANS[level](names)).predict(inputs))


@each_level
@torch.no_grad()
def test_without_restores_every_bit_also_after_an_error_inside(backbone, inputs, level):
    modules, state = dict(backbone.named_modules()), {k: v.clone() for k, v in backbone.state_dict().items()}
    dense = backbone.predict(inputs)
    names = names_of(backbone, level)
    with backbone.without(some(backbone, level)):
        assert not torch.equal(backbone.predict(inputs), dense)
    with pytest.raises(ZeroDivisionError), backbone.without(some(backbone, level)), backbone.without(names[1:2]):
        raise ZeroDivisionError
    assert dict(backbone.named_modules()) == modules  # the same objects
    assert list(dict(backbone.named_modules())) == list(modules)
    assert same_tensors(backbone.state_dict(), state)
    assert torch.equal(backbone.predict(inputs), dense)


@each_level
@torch.no_grad()
def test_a_network_pruned_twice_loads_with_the_same_bits(backbone, inputs, level, tmp_path):
    plan, names = PLANS[level], some(backbone, level)
    *others, last = names
    once, together = backbone.pruned(plan(others)), backbone.pruned(plan(names))
    twice = once.pruned(plan([at(once, last)]))
    assert same_tensors(twice.state_dict(), together.state_dict())
    assert torch.equal(twice.predict(inputs), together.predict(inputs))
    twice.save(tmp_path)
    loaded = twice.adopt(load_network(tmp_path))
    assert type(loaded.network) is type(twice.network)
    assert same_tensors(loaded.state_dict(), twice.state_dict())
    assert torch.equal(loaded.predict(inputs), twice.predict(inputs))
    assert not loaded.network.training


def at(student: Any, name: str) -> str:
    """Where a block of the teacher is in a student."""
    return student.moved.get(name, name)


@pytest.mark.parametrize("family", WITH_OPERATORS)
def test_the_units_of_a_student_are_those_that_were_kept(backbone):
    gone = some(backbone, "depth")
    assert names_of(backbone.pruned(bypasses(gone))) == [name for name in names_of(backbone) if name not in gone]
    with pytest.raises(ValueError, match=rf"plan\.units: '{gone[0]}' is not a unit of this network; the nearest are"):
        backbone.pruned(bypasses(gone)).pruned(bypasses(gone[:1]))
    operators = some(backbone, "operator")
    left = names_of(backbone.pruned(replacements(operators)), "operator")
    whole = {name for name in operators if backbone.network.get_submodule(name) in kept_by_itself(backbone)}
    assert whole and left == [
        unit.name
        for unit in backbone.units("operator")
        if (unit.name not in operators and unit.inside not in operators) or unit.name in whole
    ]


def kept_by_itself(backbone: Any) -> set[nn.Module]:
    """The convolutions in whose place nothing is cheaper: 1x1, between other numbers of channels."""
    convolutions = [m for m in backbone.network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    return {m for m in convolutions if m.in_channels != m.out_channels}


@each_level
@torch.no_grad()
def test_pruning_copies_the_weights(backbone, level):
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    for parameter in backbone.pruned(PLANS[level](some(backbone, level))).parameters():
        parameter.add_(1)
    assert same_tensors(backbone.state_dict(), before)


@torch.no_grad()
def test_dual_attentions_stay_with_their_renumbered_blocks():
    """Stable Diffusion 3.5 has a second attention in some blocks, listed by number."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=5,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=6,
            caption_projection_dim=16,
            pooled_projection_dim=6,
            pos_embed_max_size=8,
            dual_attention_layers=(0, 2, 3),
            qk_norm="rms_norm",
        )
    backbone = SD3Backbone(network.eval(), FlowMatchEulerDiscreteScheduler())
    conditions = {"encoder_hidden_states": torch.randn(2, 5, 6), "pooled_projections": torch.randn(2, 6)}
    inputs = backbone.calibration_inputs(tiny_batch(backbone, 2) | {"conditions": conditions}, 0)
    gone = ["transformer_blocks.1", "transformer_blocks.2"]
    student = backbone.pruned(bypasses(gone))
    assert student.network.config.dual_attention_layers == [0, 1]
    assert student.network.config.num_layers == 3
    with backbone.without(gone):
        assert torch.equal(backbone.predict(inputs), student.predict(inputs))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_dense_twin_equals_the_student(backbone, inputs):
    student = backbone.pruned(bypasses(some(backbone, "depth")))
    twin = backbone.adopt(make_dense_twin(backbone, student))
    assert type(twin.network) is type(backbone.network) and not twin.network.training
    expected = student.predict(inputs)
    torch.testing.assert_close(twin.predict(inputs), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(backbone.predict(inputs), expected, rtol=1e-2)


# Prefix reuse


@each_level
@torch.no_grad()
def test_prefix_reuse_equals_running_the_network_anew_for_each_unit(backbone, inputs, level):
    names = names_of(backbone, level)
    expected = {name: anew(backbone, inputs, name) for name in (None, *names)}
    order = [*reversed(names), names[1]]  # any order, also twice
    found = list(backbone.predict_without_each(inputs, order))
    assert [name for name, _ in found] == [None, *order]
    for name, output in found:
        assert torch.equal(output, expected[name]), name


@each_level
@torch.no_grad()
def test_prefix_reuse_in_a_pruned_network(backbone, inputs, level):
    """Stand-ins are parts of a network like any other."""
    once = backbone.pruned(PLANS[level](some(backbone, level)))
    for name, output in list(once.predict_without_each(inputs, names_of(once, level))):
        assert torch.equal(output, anew(once, inputs, name)), name


def anew(backbone: Any, inputs: dict, name: str | None) -> torch.Tensor:
    with backbone.without([name] if name else []):
        return backbone.predict(inputs)


@each_level
@torch.no_grad()
def test_prefix_reuse_restores_the_network_when_it_is_abandoned(backbone, inputs, level):
    modules, dense = dict(backbone.named_modules()), backbone.predict(inputs)
    for taken in (1, 2, 3):
        outputs = backbone.predict_without_each(inputs, names_of(backbone, level))
        for _ in range(taken):
            next(outputs)
            assert torch.equal(backbone.predict(inputs), dense)  # whole between two outputs
        outputs.close()
        assert dict(backbone.named_modules()) == modules
        assert not any("forward" in vars(module) for module in backbone.modules())
        assert torch.equal(backbone.predict(inputs), dense)


# Operators


def unpadded() -> UNetBackbone:
    """Its downsampling pads by itself, on two sides only."""
    backbone = UNetBackbone(UNet2DModel(**TINY, downsample_padding=0).eval(), DDPMScheduler())
    (down,) = [module for module in backbone.network.modules() if isinstance(module, Downsample2D)]
    assert down.padding == 0 and down.conv.padding == (0, 0)
    return backbone


@pytest.mark.parametrize("pointwise", ["sum", "centre"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: load_teacher(str(ROOT / "assets" / "teacher")),
        unpadded,
        *(lambda f=f: tiny_backbone(f) for f in WITH_OPERATORS),
    ],
    ids=["embedded", "unpadded", *WITH_OPERATORS],
)
@torch.no_grad()
def test_the_stand_in_of_an_operator_keeps_the_shape(make, pointwise):
    backbone = make()
    backbone.options["pointwise"] = pointwise
    names = names_of(backbone, "operator")
    with backbone.watching(names) as seen:
        backbone.predict(calibration(backbone))
    assert seen.keys() == set(names)
    for name, (output, other) in seen.items():
        assert output.shape == other.shape, name


@pytest.mark.parametrize(("stride", "padding", "size"), [(1, 1, 8), (2, 1, 8), (2, 0, 9), (1, 0, 8)])
@torch.no_grad()
def test_a_pointwise_convolution_has_the_kernels_centre_or_its_sum(stride, padding, size):
    conv = nn.Conv2d(3, 5, 3, stride, padding)
    x = torch.randn(2, 3, size, size)
    centre = Pointwise(conv, "centre")(x)
    constant = torch.randn(2, 3, 1, 1)
    total = Pointwise(conv, "sum")(constant.expand(2, 3, size, size))
    inner = slice(1, -1)  # where no zeros of the padding are seen
    expected = conv(constant.expand(2, 3, size, size))
    torch.testing.assert_close(total[:, :, inner, inner], expected[:, :, inner, inner], rtol=1e-4, atol=1e-5)
    assert total.shape == expected.shape
    mask = torch.zeros(3, 3)
    mask[1, 1] = 1
    conv.weight.mul_(mask)
    torch.testing.assert_close(centre, conv(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", WITH_OPERATORS)
@torch.no_grad()
def test_an_irreplaceable_1x1_convolution_scores_and_frees_nothing(backbone):
    units, criterion = backbone.units("operator"), OutputLoss()
    criterion.start(backbone, units, 0)
    criterion.update(tiny_batch(backbone, 2))
    harmless = [name for name, entry in criterion.finish().items() if entry["score"] == 0]
    itself = kept_by_itself(backbone)
    assert itself and harmless == [u.name for u in units if backbone.network.get_submodule(u.name) in itself]
    assert [unit.name for unit in units if unit.params == 0] == harmless
