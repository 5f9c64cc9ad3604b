"""What units there are and what they free: of the published networks on the meta device, of tiny ones by building."""

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from support.networks import FAMILIES, SMALLER, UNETS, bypasses, replacements, tiny_backbone, tiny_batch
from support.pipelines import published

from conf.schema import ROOT
from criteria.base import Shared, Unit
from criteria.selection.base import InfeasibleBudget, Pool
from criteria.selection.knapsack import Knapsack
from lightning_modules.backbones.diffusion.families import backbone_class as transformer_of
from lightning_modules.backbones.diffusion.load import load_teacher
from lightning_modules.backbones.diffusion.unet import UNetBackbone

LEVELS = [(family, "depth") for family in FAMILIES] + [(family, "operator") for family in (*UNETS, *SMALLER)]
PLANS = {"bypass": bypasses, "replace": replacements}


@functools.cache
def backbone_of(teacher: str, **options: Any) -> Any:
    """A published denoiser without weights: nothing is computed or held in memory."""
    network = published(teacher)
    is_unet = isinstance(network, UNet2DModel | UNet2DConditionModel)
    return (UNetBackbone if is_unet else transformer_of(network))(network, DDPMScheduler(), **options)


def largest_ratio(backbone: Any, shared: list[Shared]) -> str:
    """The largest fraction of the parameters that a plan can remove, as the error of one that asks for more says."""
    pool = Pool(backbone.units(), {"params": backbone.params()}, shared)
    with pytest.raises(InfeasibleBudget) as caught:
        Knapsack(ratio=0.999, tolerance=0).check(pool)
    return str(caught.value).partition("largest achievable ratio is ")[2].partition(",")[0]


@pytest.mark.parametrize(
    ("teacher", "options", "kinds", "params", "ratio", "ratio_without_shared"),
    [
        ("sd15", {}, {"resnet": 22, "transformer": 16}, 859_520_964, "0.909", "0.909"),
        ("sdxl_base", {}, {"resnet": 17, "block": 70}, 2_567_463_684, "0.983", "0.974"),
        ("sdxl_base", {"transformers": "module"}, {"resnet": 17, "transformer": 11}, 2_567_463_684, "0.983", "0.983"),
        ("dit_xl_2_256", {}, {"block": 27}, 749_826_464, "0.961", "0.961"),
        ("pixart", {}, {"block": 28}, 610_856_096, "0.974", "0.974"),
        ("sd3_medium", {}, {"block": 23}, 2_028_328_000, "0.964", "0.964"),
        ("flux_dev", {}, {"block": 57}, 11_901_408_320, "0.995", "0.995"),
    ],
)
def test_a_published_network_has_its_units(teacher, options, kinds, params, ratio, ratio_without_shared):
    backbone = backbone_of(teacher, **options)
    assert Counter(unit.kind for unit in backbone.units()) == kinds
    assert backbone.params() == params
    assert largest_ratio(backbone, backbone.shared()) == ratio
    assert largest_ratio(backbone, []) == ratio_without_shared


def test_sd1_has_the_published_cost():
    """338.6 G multiply-accumulates of convolutions and linear layers, 401.6 G with the products inside attention."""
    macs = backbone_of("sd15").macs()
    assert round(macs.linear / 1e9, 2) == 338.61
    assert round(macs.attention / 1e9, 2) == 63.03


def test_dit_has_the_cost_of_its_paper():
    """118.64 G, which leave out the embedder of timestep and class that each block has here."""
    backbone = backbone_of("dit_xl_2_256")
    macs = backbone.macs()
    embedders = sum(macs.of(f"transformer_blocks.{i}.norm1.emb") for i in range(28))
    assert (macs.linear + macs.attention - embedders) / 1e9 == pytest.approx(118.64, rel=1e-3)


def test_the_embedded_teacher_has_the_units_its_configuration_promises():
    backbone = load_teacher(str(ROOT / "assets" / "teacher"))
    assert Counter(unit.kind for unit in backbone.units()) == {"resnet": 22, "attention": 6}
    assert len(backbone.units("operator")) == 122
    assert backbone.params() == 8_952_067


def freed(backbone: Any, gone: list[Unit], level: str) -> tuple[int, int]:
    """Parameters and multiply-accumulates of some units, and of the shared parts that go with them."""
    names = {unit.name for unit in gone}
    parts = [*gone, *(part for part in backbone.shared(level) if names.issuperset(part.units))]
    return sum(part.params for part in parts), sum(part.macs for part in parts)


def check(backbone: Any, gone: list[Unit], level: str) -> None:
    plan = [change for unit in gone for change in PLANS[unit.change]([unit.name])]
    student = backbone.pruned(plan)
    params, macs = freed(backbone, gone, level)
    assert student.params() == backbone.params() - params
    assert student.macs().linear == backbone.macs().linear - macs


@pytest.mark.parametrize(("family", "level"), LEVELS)
@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_student_has_what_its_plan_leaves(family, level, data):
    backbone = tiny_backbone(family)
    chosen = data.draw(st.lists(st.sampled_from(backbone.units(level)), unique=True))
    names = {unit.name for unit in chosen}
    check(backbone, [unit for unit in chosen if unit.inside not in names], level)


@pytest.mark.parametrize(("family", "level"), LEVELS)
def test_a_student_has_what_a_plan_of_everything_leaves(family, level):
    backbone = tiny_backbone(family)
    names = {unit.name for unit in backbone.units(level)}
    check(backbone, [unit for unit in backbone.units(level) if unit.inside not in names], level)


@pytest.mark.slow
def test_an_sdxl_student_loses_the_shared_part_of_an_emptied_transformer():
    backbone = backbone_of("sdxl_base")
    emptied, kept = backbone.shared()[0], backbone.shared()[5]
    names = {*emptied.units, *kept.units[:-1], "mid_block.resnets.0", "up_blocks.0.resnets.2"}
    gone = [unit for unit in backbone.units() if unit.name in names]
    assert len(emptied.units) == 2 and len(kept.units) == 10 and len(gone) == 13
    assert freed(backbone, gone, "depth")[0] == sum(unit.params for unit in gone) + emptied.params
    check(backbone, gone, "depth")


@pytest.mark.parametrize("family", (*UNETS, *SMALLER))
@pytest.mark.parametrize("level", ["depth", "operator"])
def test_units_come_in_the_order_of_the_forward_pass(family, level):
    backbone = tiny_backbone(family)
    names, called = [unit.name for unit in backbone.units(level)], []
    for name in names:
        unit = backbone.network.get_submodule(name)
        unit.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        backbone.predict(backbone.calibration_inputs(tiny_batch(backbone, 1), 0))
    assert called == names


def test_units_inside_others_are_the_normalisations_of_attentions():
    for family in ("UNet2DModel", "sd"):
        units = tiny_backbone(family).units("operator")
        inside = {unit.name: unit.inside for unit in units if unit.inside}
        attentions = [unit.name for unit in units if unit.kind == "attention"]
        assert inside == ({f"{name}.group_norm": name for name in attentions} if family == "UNet2DModel" else {})
