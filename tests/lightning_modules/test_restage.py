"""BK-SDM's students: their size, the source of each weight, and that they are stock networks."""

import json
from itertools import product
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from support.process import ROOT
from torch import Tensor, nn

from criteria.selection import bk_sdm
from criteria.selection.bk_sdm import BkSdm
from lightning_modules.backbones.diffusion import restage as restaging
from lightning_modules.backbones.diffusion.restage import VARIANTS, find_source, make_student_config, restage
from lightning_modules.backbones.removal import record_features
from lightning_modules.metrics.cost import count_macs

SD1 = {"sample_size": 64, "cross_attention_dim": 768}
SD2 = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
TINY = {"sample_size": 16, "block_out_channels": (4, 8, 16, 16), "norm_num_groups": 2}
TEXT = UNet2DConditionModel, TINY | {"cross_attention_dim": 6, "attention_head_dim": (1, 2, 4, 4)}
IMAGE = (
    UNet2DModel,
    TINY
    | {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
    },
)
FAMILIES = {"text": TEXT, "image": IMAGE}

SAME = [  # in all variants
    "conv_in.weight",
    "time_embedding.linear_2.bias",
    "conv_norm_out.weight",
    "conv_out.weight",
    "down_blocks.0.resnets.0.conv1.weight",
    "down_blocks.1.downsamplers.0.conv.weight",
    "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k.weight",
]
UNSHIFTED = [
    ("down_blocks.2.downsamplers.0.conv.bias", "down_blocks.2.downsamplers.0.conv.bias"),
    ("down_blocks.3.resnets.0.conv2.weight", "down_blocks.3.resnets.0.conv2.weight"),
    ("up_blocks.0.resnets.0.conv_shortcut.weight", "up_blocks.0.resnets.0.conv_shortcut.weight"),
    ("up_blocks.0.resnets.1.conv1.weight", "up_blocks.0.resnets.2.conv1.weight"),
    ("up_blocks.0.upsamplers.0.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
    ("up_blocks.2.attentions.0.proj_in.weight", "up_blocks.2.attentions.0.proj_in.weight"),
    ("up_blocks.2.attentions.1.proj_in.weight", "up_blocks.2.attentions.2.proj_in.weight"),
    ("up_blocks.3.resnets.1.norm1.weight", "up_blocks.3.resnets.2.norm1.weight"),
    (
        "up_blocks.3.attentions.1.transformer_blocks.0.attn1.to_out.0.bias",
        "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0.bias",
    ),
]
SHIFTED = [
    ("up_blocks.0.resnets.0.conv_shortcut.weight", "up_blocks.1.resnets.0.conv_shortcut.weight"),
    ("up_blocks.0.resnets.1.conv1.weight", "up_blocks.1.resnets.2.conv1.weight"),
    ("up_blocks.0.attentions.0.norm.bias", "up_blocks.1.attentions.0.norm.bias"),
    ("up_blocks.0.upsamplers.0.conv.weight", "up_blocks.1.upsamplers.0.conv.weight"),
    ("up_blocks.1.attentions.1.proj_in.weight", "up_blocks.2.attentions.2.proj_in.weight"),
    ("up_blocks.1.upsamplers.0.conv.bias", "up_blocks.2.upsamplers.0.conv.bias"),
    ("up_blocks.2.resnets.0.norm1.weight", "up_blocks.3.resnets.0.norm1.weight"),
    (
        "up_blocks.2.attentions.1.transformer_blocks.0.attn1.to_out.0.bias",
        "up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0.bias",
    ),
]
MIDDLE = [("mid_block.attentions.0.proj_out.weight", "mid_block.attentions.0.proj_out.weight")]
PAIRS = {"base": UNSHIFTED + MIDDLE, "small": UNSHIFTED, "tiny": SHIFTED}
TABLE = [(variant, *pair) for variant in VARIANTS for pair in [*((key, key) for key in SAME), *PAIRS[variant]]]


def network(family: str, **changed: Any) -> Any:
    """Return a network with random weights, the same in every call."""
    cls, config = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(**config | changed).eval()


def inputs(unet: nn.Module) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    given = {"sample": torch.randn(2, unet.config.in_channels, 16, 16, generator=rng), "timestep": torch.tensor(7)}
    if isinstance(unet, UNet2DConditionModel):
        given["encoder_hidden_states"] = torch.randn(2, 5, 6, generator=rng)
    return given


@torch.no_grad()
def output(unet: nn.Module) -> Tensor:
    return unet(**inputs(unet)).sample


def on_meta(cls: type, **config: Any) -> Any:
    with torch.device("meta"):
        return cls(**config)


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# Size


@pytest.fixture(scope="module", params=["1.x", "2.1"])
def stable_diffusion(request) -> tuple[str, UNet2DConditionModel]:
    return request.param, on_meta(UNet2DConditionModel, **{"1.x": SD1, "2.1": SD2}[request.param])


PUBLISHED = {
    ("1.x", "base"): (579_384_964, 223.67),
    ("1.x", "small"): (482_346_884, 217.65),
    ("1.x", "tiny"): (323_384_964, 204.95),
    ("2.1", "base"): (583_480_964, 223.99),
    ("2.1", "small"): (485_787_524, 217.91),
    ("2.1", "tiny"): (326_825_604, 205.22),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_student_of_stable_diffusion_has_the_published_size(stable_diffusion, variant):
    """Compare parameters, and MACs of convolutions and linear layers for a 64x64 latent with 77 tokens."""
    version, teacher = stable_diffusion
    student = restage(teacher, variant)
    with torch.device("meta"):
        given = torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, teacher.config.cross_attention_dim)
    macs = count_macs(student, lambda: student(*given))
    assert (params(student), round(macs.linear / 1e9, 2)) == PUBLISHED[version, variant]
    assert all(p.is_meta for p in student.parameters())


def test_a_student_configuration_lacks_only_what_is_removed(stable_diffusion):
    teacher = stable_diffusion[1].config
    heads = {"1.x": 8, "2.1": [5, 10, 20]}[stable_diffusion[0]]
    base = {"layers_per_block": 1}
    small = base | {"mid_block_type": None}
    tiny = small | {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": heads,
    }
    public = {key: value for key, value in teacher.items() if not key.startswith("_")}
    assert make_student_config(teacher, "base") == public | base
    assert make_student_config(teacher, "small") == public | small
    assert make_student_config(teacher, "tiny") == public | tiny


def test_each_list_of_stages_loses_the_innermost():
    lists = {
        "layers_per_block": [2, 2, 2, 2],
        "only_cross_attention": [True, False, False, False],
        "cross_attention_dim": [4, 5, 6, 7],
        "transformer_layers_per_block": [1, 2, 3, 4],
        "reverse_transformer_layers_per_block": [4, 3, 2, 1],
    }
    teacher = on_meta(UNet2DConditionModel, **TEXT[1] | lists)
    found = make_student_config(teacher.config, "tiny")
    assert {key: found[key] for key in lists} == {
        "layers_per_block": 1,
        "only_cross_attention": [True, False, False],
        "cross_attention_dim": [4, 5, 6],
        "transformer_layers_per_block": [1, 2, 3],
        "reverse_transformer_layers_per_block": [3, 2, 1],
    }
    restage(teacher, "tiny")  # each of its tensors is found, in the same shape


SECOND = [
    *(f"down_blocks.{stage}.resnets.1" for stage in range(4)),
    *(f"up_blocks.{stage}.resnets.1" for stage in range(4)),
    *("down_blocks.1.attentions.1", "up_blocks.2.attentions.1"),
]
INNERMOST = ["down_blocks.3.resnets.0", "down_blocks.2.downsamplers", "up_blocks.0.resnets.0", "up_blocks.0.resnets.2"]
REMOVED = {
    "base": SECOND,
    "small": [*SECOND, "mid_block"],
    "tiny": [*SECOND, "mid_block", *INNERMOST, "up_blocks.0.upsamplers"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_embedded_teacher_loses_the_parameters_of_what_is_removed(variant):
    teacher = on_meta(UNet2DModel, **json.loads((ROOT / "assets" / "teacher" / "config.json").read_text()))
    lost = sum(params(teacher.get_submodule(name)) for name in REMOVED[variant])
    assert params(restage(teacher, variant)) == params(teacher) - lost


# Weights


@pytest.mark.parametrize(("variant", "key", "source"), TABLE)
def test_weights_start_where_the_paper_says(variant, key, source):
    assert find_source(key, variant) == source


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_student_holds_copies_of_the_named_tensors(variant):
    teacher = network("text")
    student = restage(teacher, variant)
    theirs, ours = teacher.state_dict(), student.state_dict()
    for name, key, source in TABLE:
        if name == variant:
            assert torch.equal(ours[key], theirs[source]), key
    assert {t.data_ptr() for t in ours.values()}.isdisjoint(t.data_ptr() for t in theirs.values())
    assert not student.training
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize(("family", "variant"), product(FAMILIES, VARIANTS))
def test_each_tensor_of_a_student_copies_another_one_of_the_teacher(family, variant):
    teacher = network(family)
    theirs, ours = teacher.state_dict(), restage(teacher, variant).state_dict()
    sources = [find_source(key, variant) for key in ours]
    assert len(set(sources)) == len(ours)
    assert all(torch.equal(ours[key], theirs[source]) for key, source in zip(ours, sources, strict=True))


@pytest.mark.parametrize(("family", "variant"), product(FAMILIES, VARIANTS))
def test_a_student_runs_and_reloads_as_a_stock_network(tmp_path, family, variant):
    teacher = network(family)
    before = output(teacher)
    student = restage(teacher, variant)
    student.save_pretrained(tmp_path)
    loaded = FAMILIES[family][0].from_pretrained(tmp_path)
    assert type(loaded) is type(student) is FAMILIES[family][0]
    assert output(student).shape == before.shape
    assert torch.equal(output(loaded), output(student))
    assert not torch.equal(output(student), before)
    assert torch.equal(output(teacher), before)


def test_a_student_keeps_the_teachers_precision():
    student = restage(network("image").to(torch.bfloat16), "base")
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}


# Distillation


@pytest.mark.parametrize(("choice", "variant"), [("bk_sdm", "base"), ("bk_sdm", "small"), ("bk_sdm_tiny", "tiny")])
def test_the_compared_feature_maps_exist_and_have_equal_shapes(configure, choice, variant):
    taps = configure(f"distillation={choice}").distillation.taps
    pairs = dict(taps) if variant == "tiny" else {name: name for name in taps}
    assert len(pairs) == {"tiny": 6}.get(variant, 8)
    teacher = network("text")
    shapes = []
    for unet, names in ((teacher, pairs.keys()), (restage(teacher, variant), pairs.values())):
        with record_features({name: unet.get_submodule(name) for name in names}) as found:
            output(unet)
        shapes.append([found[name].shape for name in names])
    assert shapes[0] == shapes[1]


# Selection


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_selection_is_one_change_and_needs_no_scores(configure, variant):
    cfg = configure("selection=bk_sdm", f"selection.variant={variant}", "distillation=bk_sdm")
    assert cfg.label == f"bk_sdm_{variant}-bk_sdm-seed0"
    selection = BkSdm(variant)
    selection.check(None)
    assert selection.changes(None, None) == [{"kind": "restage", "variant": variant}]
    assert (selection.needs_scores, selection.budget) == (False, "params")


def test_selection_and_restaging_have_the_same_variants():
    assert bk_sdm.VARIANTS == restaging.VARIANTS


# Mistakes


@pytest.mark.parametrize("ask", [BkSdm, lambda variant: restage(network("image"), variant)])
def test_an_unknown_variant_is_refused_with_the_choices(ask):
    with pytest.raises(ValueError, match=r"selection\.variant='large' is unknown; choose one of: base, small, tiny"):
        ask("large")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_student_cannot_be_restaged_again(variant):
    with pytest.raises(ValueError, match=r"teacher\.layers_per_block=1: .* choose a teacher of layers_per_block=2"):
        restage(restage(network("text"), variant), "base")


@pytest.mark.parametrize(
    ("changed", "variant", "message"),
    [
        ({"layers_per_block": (2, 2, 2, 1)}, "base", r"teacher\.layers_per_block=\(2, 2, 2, 1\)"),
        ({"mid_block_type": None}, "base", r"teacher\.mid_block_type=None"),
        ({"block_out_channels": (4, 8, 8, 16)}, "tiny", r"block_out_channels=\[4, 8, 8, 16\].*one of: base, small"),
        (
            {"reverse_transformer_layers_per_block": (1, 1, 1, (1, 2, 1))},
            "base",
            r"student without one in the teacher: \['up_blocks\.3\.attentions\.1\.transformer_blocks\.1\.",
        ),
        (
            {"reverse_transformer_layers_per_block": (1, 1, 1, (1, 1, 2))},
            "base",
            r"teacher without one in the student: \['up_blocks\.3\.attentions\.2\.transformer_blocks\.1\.",
        ),
    ],
)
def test_a_network_of_another_structure_is_refused(changed, variant, message):
    teacher = on_meta(UNet2DConditionModel, **TEXT[1] | changed)
    with pytest.raises(ValueError, match=message):
        restage(teacher, variant)


def test_a_network_with_removed_units_cannot_be_restaged():
    config = dict(network("text").config) | {"removed_units": ["up_blocks.1.resnets.1"]}
    with pytest.raises(ValueError, match=r"teacher\.removed_units=\['up_blocks\.1\.resnets\.1'\]: "):
        make_student_config(config, "base")
