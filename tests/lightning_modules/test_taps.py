"""Taps: which feature maps of teacher and student are compared, and which pairs are refused."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support.classification import tiny_classifier
from support.distillation import REMOVED, STAGES, distillation, losses_of, outputs_of
from support.networks import TRANSFORMERS, bypasses, tiny_backbone, tiny_batch

from lightning_modules.backbones.diffusion.load import load_teacher
from lightning_modules.backbones.diffusion.pruned_unet import list_depth_units
from lightning_modules.losses.level_weights import features
from lightning_modules.modules.distillation import WEIGHTS, Distillation, tap_names

UNITS = list(list_depth_units(tiny_backbone("UNet2DModel").network))


def taps_of(removed: list[str], **options: Any) -> list[str]:
    teacher = tiny_backbone("UNet2DModel")
    levels = distillation(teacher.pruned(bypasses(removed)), teacher, **options).levels
    assert all(theirs == ours for theirs, ours in levels.items())
    return list(levels)


def test_taps_are_the_stages_the_surviving_units_or_a_list():
    assert taps_of([], taps="stages") == STAGES
    assert set(taps_of(REMOVED, taps="units")) == set(UNITS) - set(REMOVED)
    assert taps_of(REMOVED, taps=["conv_in", "up_blocks.1.resnets.1"]) == ["conv_in", "up_blocks.1.resnets.1"]
    assert taps_of(REMOVED, w_feat=0.0) == []


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(UNITS), unique=True), st.sampled_from(STAGES))
def test_exactly_the_stages_that_lost_all_their_units_are_skipped(removed, emptied):
    removed = sorted({*removed, *(name for name in UNITS if name.startswith(emptied))})
    kept = [stage for stage in STAGES if any(u.startswith(stage + ".") and u not in removed for u in UNITS)]
    assert emptied not in kept
    assert taps_of(removed) == kept
    assert taps_of(removed, skip_emptied=False) == STAGES
    assert taps_of(removed, taps=[*STAGES, "conv_in"]) == [*kept, "conv_in"]


def test_an_unknown_tap_is_named_with_the_choices():
    with pytest.raises(
        ValueError, match=r"distillation\.taps: 'mid_blok' is not a module of this network; stages are: "
    ) as caught:
        taps_of([], taps=["mid_block", "mid_blok"])
    assert str(caught.value).partition("stages are: ")[2].split(", ") == STAGES
    with pytest.raises(ValueError, match=r"distillation\.taps='blocks' is unknown; choose stages, units, or a list"):
        taps_of([], taps="blocks")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict.fromkeys(WEIGHTS, 0.0),
            "distillation: w_task=0.0, w_out=0.0, w_feat=0.0, so that there is no loss to train",
        ),
        ({"taps": []}, "distillation.taps=[] names no feature maps to compare; choose stages, units, a list"),
        ({"taps": {}}, "distillation.taps={} names no feature maps to compare; choose stages, units, a list"),
        ({"taps": None}, "distillation.taps=null names no feature maps to compare; choose stages, units, a list"),
        ({"taps": 3}, "distillation.taps=3 names no feature maps to compare; choose stages, units, a list"),
        ({"taps": ["mid_block", None]}, "distillation.taps=['mid_block', None] names no feature maps to compare"),
        ({"taps": {"mid_block": None}}, "distillation.taps={'mid_block': None} names no feature maps to compare"),
    ],
)
def test_settings_that_train_on_nothing_are_refused_by_name(configure, changes, message):
    settings = OmegaConf.merge(configure().distillation, changes)
    for key, value in changes.items():
        settings[key] = value  # an empty list or mapping leaves nothing when it is merged
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Distillation.check_settings(settings, tiny_backbone("UNet2DModel"), narrower=False)


def test_taps_are_not_looked_at_where_features_have_no_weight(configure):
    settings = OmegaConf.merge(configure().distillation, {"w_feat": 0.0})
    settings.taps = None
    Distillation.check_settings(settings, tiny_backbone("UNet2DModel"), narrower=False)


def test_a_student_without_any_tap_is_refused_if_features_are_all_it_would_learn_from():
    emptied = [name for name in UNITS if name.startswith("mid_block")]
    with pytest.raises(
        ValueError,
        match=r"^distillation\.w_feat=1\.0 is the only weight above 0, .* distillation\.taps=\['mid_block'\]",
    ):
        taps_of(emptied, w_task=0.0, w_out=0.0, taps=["mid_block"])


def test_units_of_a_network_that_has_none_of_depth_are_no_taps():
    with pytest.raises(ValueError, match=r"distillation\.taps='units': this network has no units of depth"):
        tap_names(tiny_classifier(), "units")


def test_a_mapping_gives_the_students_module_for_each_of_the_teachers():
    teacher = tiny_backbone("UNet2DModel")
    student, batch = teacher.pruned(bypasses(REMOVED)), tiny_batch(teacher)
    taps = {"conv_in": "conv_in", "mid_block": "down_blocks.1"}
    module = distillation(student, teacher, taps=taps)
    assert module.levels == taps
    losses = losses_of(module, batch)
    s, t = outputs_of(student, list(taps.values()), batch), outputs_of(teacher, list(taps), batch)
    for theirs, ours in taps.items():
        assert torch.equal(losses[f"feature/{theirs}"], F.mse_loss(s[ours], t[theirs]))
    assert float(losses["feature/mid_block"].detach()) > 0


def test_a_mapping_to_or_from_what_is_not_there_is_refused_with_the_stages():
    stages = ", ".join(STAGES)
    with pytest.raises(ValueError, match=rf"'mid' is not a module of this network; stages are: {stages}"):
        taps_of([], taps={"mid": "mid_block"})
    with pytest.raises(ValueError, match=rf"'mid' is not a module of the student; its stages are: {stages}"):
        taps_of([], taps={"mid_block": "mid"})


FOUR_STAGES = ["down_blocks.0", "down_blocks.1", "down_blocks.2", "down_blocks.3"]


@pytest.fixture
def restaged(text_teacher):
    """restaged(variant, **options) -> the pairs of taps of one of BK-SDM's students."""

    def pairs(variant: str, **options: Any) -> dict[str, str]:
        teacher = load_teacher(str(text_teacher))
        return distillation(teacher.pruned([{"kind": "restage", "variant": variant}]), teacher, **options).levels

    return pairs


def test_the_stages_of_a_student_with_fewer_of_them_are_those_they_came_from(restaged):
    ups = {"up_blocks.1": "up_blocks.0", "up_blocks.2": "up_blocks.1", "up_blocks.3": "up_blocks.2"}
    assert restaged("tiny", taps="stages") == {name: name for name in FOUR_STAGES[:2]} | ups


def test_a_list_is_refused_for_a_student_whose_modules_moved(restaged):
    with pytest.raises(ValueError, match=r"distillation\.taps: .* other paths .* choose stages, or a mapping"):
        restaged("tiny", taps=["down_blocks.0", "up_blocks.1"])
    teacher = tiny_backbone("pixart")
    first, *_, last = teacher.survivors()
    with pytest.raises(ValueError, match=r"distillation\.taps: .* other paths .* choose stages, or a mapping"):
        distillation(teacher.pruned(bypasses([first])), teacher, taps=["transformer_blocks.1"])
    # Where nothing moved, both have the same paths.
    module = distillation(teacher.pruned(bypasses([last])), teacher, taps=["transformer_blocks.1"])
    assert module.levels == {"transformer_blocks.1": "transformer_blocks.1"}
    assert restaged("base", taps=FOUR_STAGES) == {name: name for name in FOUR_STAGES}


def test_a_listed_module_that_the_student_lost_is_refused(restaged):
    assert list(restaged("base", taps=["down_blocks.0", "mid_block"])) == ["down_blocks.0", "mid_block"]
    with pytest.raises(ValueError, match=r"'mid_block' is not a module of the student; its stages are: "):
        restaged("small", taps=["down_blocks.0", "mid_block"], skip_emptied=False)
    assert list(restaged("small", taps=["down_blocks.0", "mid_block"])) == ["down_blocks.0"]


@pytest.mark.parametrize("variant", ["base", "tiny"])
def test_units_are_refused_for_a_student_that_has_others_under_their_names(restaged, variant):
    with pytest.raises(ValueError, match=r"distillation\.taps='units': .* choose stages, or a mapping"):
        restaged(variant, taps="units")


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_block_of_a_transformer_is_compared_with_the_one_it_came_from(family):
    teacher = tiny_backbone(family)
    removed = teacher.units()[0].name
    student, batch = teacher.pruned(bypasses([removed])), tiny_batch(teacher)
    kept = [name for name in teacher.survivors() if name != removed]
    module = distillation(student, teacher, w_feat=0.25)
    assert module.levels == dict(zip(kept, student.survivors(), strict=True))
    assert any(theirs != ours for theirs, ours in module.levels.items())
    losses = losses_of(module, batch)
    # Joint blocks give the text stream before the image's; single ones have both in one.
    s, t = (outputs_of(network, network.survivors(), batch, which=-1) for network in (student, teacher))
    torch.testing.assert_close(losses["output"], F.mse_loss(s["output"], t["output"]), rtol=1e-5, atol=0)
    for theirs, ours in module.levels.items():
        torch.testing.assert_close(losses[f"feature/{theirs}"], F.mse_loss(s[ours], t[theirs]), rtol=1e-5, atol=0)
    assert float(losses["output"].detach()) > 1e-6


def test_features_are_taken_from_the_first_of_several_outputs_and_hooks_are_gone_after_an_error():
    backbone = tiny_backbone("UNet2DConditionModel")
    inputs = backbone.calibration_inputs(tiny_batch(backbone), 0)
    modules = {name: backbone.network.get_submodule(name) for name in ("down_blocks.1.attentions.0", "down_blocks.0")}
    with pytest.raises(ZeroDivisionError), features(modules) as found:
        backbone.predict(inputs)
        assert found["down_blocks.0"].shape == (4, 8, 4, 4)  # the map that goes on, not the skip connections
        assert found["down_blocks.1.attentions.0"].shape == (4, 16, 4, 4)
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in backbone.modules())
