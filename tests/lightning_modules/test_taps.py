"""Taps: the feature maps of teacher and student that are compared, and pairs that are refused."""

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
from lightning_modules.backbones.removal import record_features
from lightning_modules.modules.distillation import WEIGHTS, Distillation
from lightning_modules.modules.taps import find_emptied, find_teacher_taps

UNITS = list(list_depth_units(tiny_backbone("UNet2DModel").network))


def taps_of(removed: list[str], **options: Any) -> list[str]:
    teacher = tiny_backbone("UNet2DModel")
    levels = distillation(teacher.pruned(bypasses(removed)), teacher, **options).levels
    assert all(theirs == ours for theirs, ours in levels.items())
    return list(levels)


def test_taps_are_stages_kept_units_or_listed_modules():
    assert taps_of([], taps="stages") == STAGES
    assert set(taps_of(REMOVED, taps="units")) == set(UNITS) - set(REMOVED)
    assert taps_of(REMOVED, taps=["conv_in", "up_blocks.1.resnets.1"]) == ["conv_in", "up_blocks.1.resnets.1"]
    assert taps_of(REMOVED, w_feat=0.0) == []


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(UNITS), unique=True), st.sampled_from(STAGES))
def test_exactly_the_stages_without_any_unit_left_are_skipped(removed, emptied):
    removed = sorted({*removed, *(name for name in UNITS if name.startswith(emptied))})
    kept = [stage for stage in STAGES if any(u.startswith(stage + ".") and u not in removed for u in UNITS)]
    assert emptied not in kept
    assert taps_of(removed) == kept
    assert taps_of(removed, skip_emptied=False) == STAGES
    assert taps_of(removed, taps=[*STAGES, "conv_in"]) == [*kept, "conv_in"]


def test_stages_that_lost_all_their_convolutions_are_left_out_if_chosen():
    attention_left = ["mid_block.resnets.0", "mid_block.resnets.1"]
    assert taps_of(attention_left) == taps_of(attention_left, skip_emptied="units") == STAGES
    left = [stage for stage in STAGES if stage != "mid_block"]
    assert taps_of(attention_left, skip_emptied="convolutions") == left
    assert taps_of(attention_left[:1], skip_emptied="convolutions") == STAGES
    assert taps_of([*attention_left, "mid_block.attentions.0"], skip_emptied="convolutions") == left
    assert taps_of([*attention_left, "mid_block.attentions.0"], skip_emptied="none") == STAGES
    assert taps_of(["mid_block.attentions.0"], skip_emptied="convolutions") == STAGES


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(UNITS), unique=True))
def test_units_without_convolutions_do_not_keep_a_stage(removed):
    teacher = tiny_backbone("UNet2DModel")
    kept = [name for name in UNITS if name not in removed]
    emptied = find_emptied(teacher, kept, "convolutions")
    for stage in STAGES:
        assert (stage in emptied) == (not any(u.startswith(f"{stage}.resnets.") for u in kept))
    assert emptied >= find_emptied(teacher, kept, "units") >= find_emptied(teacher, kept, "none") == set()


def test_an_unknown_skip_lists_the_choices():
    message = r"^distillation\.skip_emptied='all' is unknown; choose one of: units \(or true\), convolutions, none"
    with pytest.raises(ValueError, match=message):
        taps_of([], skip_emptied="all")
    with pytest.raises(ValueError, match=message):
        Distillation.check_settings(OmegaConf.create({"skip_emptied": "all"}), tiny_backbone("llama"), narrower=False)


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
            "distillation: w_task=0.0, w_out=0.0, w_feat=0.0, so there is no loss to train on",
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


def test_taps_are_not_checked_if_features_have_no_weight(configure):
    settings = OmegaConf.merge(configure().distillation, {"w_feat": 0.0})
    settings.taps = None
    Distillation.check_settings(settings, tiny_backbone("UNet2DModel"), narrower=False)


def test_a_student_without_taps_is_refused_if_only_features_have_weight():
    emptied = [name for name in UNITS if name.startswith("mid_block")]
    with pytest.raises(
        ValueError,
        match=r"^distillation\.w_feat=1\.0 is the only weight above 0, .* distillation\.taps=\['mid_block'\]",
    ):
        taps_of(emptied, w_task=0.0, w_out=0.0, taps=["mid_block"])


def test_taps_units_is_refused_for_a_network_without_depth_units():
    with pytest.raises(ValueError, match=r"distillation\.taps='units': this network has no units of depth"):
        find_teacher_taps(tiny_classifier(), "units")


def test_a_mapping_pairs_modules_of_teacher_and_student():
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


def test_a_mapping_with_an_unknown_module_is_refused_with_the_stages():
    stages = ", ".join(STAGES)
    with pytest.raises(ValueError, match=rf"'mid' is not a module of this network; stages are: {stages}"):
        taps_of([], taps={"mid": "mid_block"})
    with pytest.raises(ValueError, match=rf"'mid' is not a module of the student; its stages are: {stages}"):
        taps_of([], taps={"mid_block": "mid"})


FOUR_STAGES = ["down_blocks.0", "down_blocks.1", "down_blocks.2", "down_blocks.3"]


@pytest.fixture
def restaged(text_teacher):
    """Return a function (variant, **options) -> the pairs of taps of one of BK-SDM's students."""

    def pairs(variant: str, **options: Any) -> dict[str, str]:
        teacher = load_teacher(str(text_teacher))
        return distillation(teacher.pruned([{"kind": "restage", "variant": variant}]), teacher, **options).levels

    return pairs


def test_stages_of_a_student_with_fewer_stages_match_their_origins(restaged):
    ups = {"up_blocks.1": "up_blocks.0", "up_blocks.2": "up_blocks.1", "up_blocks.3": "up_blocks.2"}
    assert restaged("tiny", taps="stages") == {name: name for name in FOUR_STAGES[:2]} | ups


def test_a_list_is_refused_for_a_student_with_renamed_modules(restaged):
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


def test_a_listed_module_that_the_student_lacks_is_refused(restaged):
    assert list(restaged("base", taps=["down_blocks.0", "mid_block"])) == ["down_blocks.0", "mid_block"]
    with pytest.raises(ValueError, match=r"'mid_block' is not a module of the student; its stages are: "):
        restaged("small", taps=["down_blocks.0", "mid_block"], skip_emptied=False)
    assert list(restaged("small", taps=["down_blocks.0", "mid_block"])) == ["down_blocks.0"]


@pytest.mark.parametrize("variant", ["base", "tiny"])
def test_taps_units_is_refused_if_names_mean_other_units_in_the_student(restaged, variant):
    with pytest.raises(ValueError, match=r"distillation\.taps='units': .* choose stages, or a mapping"):
        restaged(variant, taps="units")


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_transformer_block_is_compared_with_its_origin(family):
    teacher = tiny_backbone(family)
    removed = teacher.units()[0].name
    student, batch = teacher.pruned(bypasses([removed])), tiny_batch(teacher)
    kept = [name for name in teacher.survivors() if name != removed]
    module = distillation(student, teacher, w_feat=0.25)
    assert module.levels == dict(zip(kept, student.survivors(), strict=True))
    assert any(theirs != ours for theirs, ours in module.levels.items())
    losses = losses_of(module, batch)
    # Joint blocks give the text stream before the image's; single ones have both in one.
    s, t = (outputs_of(network, network.survivors(), batch, index=-1) for network in (student, teacher))
    torch.testing.assert_close(losses["output"], F.mse_loss(s["output"], t["output"]), rtol=1e-5, atol=0)
    for theirs, ours in module.levels.items():
        torch.testing.assert_close(losses[f"feature/{theirs}"], F.mse_loss(s[ours], t[theirs]), rtol=1e-5, atol=0)
    assert float(losses["output"].detach()) > 1e-6


def test_features_are_recorded_and_hooks_removed_after_an_error():
    backbone = tiny_backbone("UNet2DConditionModel")
    inputs = backbone.calibration_inputs(tiny_batch(backbone), 0)
    modules = {name: backbone.network.get_submodule(name) for name in ("down_blocks.1.attentions.0", "down_blocks.0")}
    with pytest.raises(ZeroDivisionError), record_features(modules) as found:
        backbone.predict(inputs)
        assert found["down_blocks.0"].shape == (4, 8, 4, 4)  # the map that goes on, not the skip connections
        assert found["down_blocks.1.attentions.0"].shape == (4, 16, 4, 4)
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in backbone.modules())
