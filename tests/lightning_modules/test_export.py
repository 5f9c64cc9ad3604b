"""Exports of diffusion networks: they open with diffusers alone, equal the student, and can be teachers again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from support.networks import bypasses, replacements, same_tensors
from support.pipeline_parts import load_tiny_teacher
from support.pipelines import FACTOR, LATENT, tiny_pipeline
from test_teachers import CALL

from lightning_modules.backbones.base import Change, run_network
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone, is_stock
from lightning_modules.export.export import export, make_dense_twin
from lightning_modules.export.verify import verify

PIXELS = LATENT * FACTOR
CARD = "---\nlicense: apache-2.0\n---\n# A student\n"
EMPTIED = "mid_block.attentions.0"
"""A Transformer2D of the tiny SDXL with two basic blocks"""
GONE = {
    "sd": ["down_blocks.1.attentions.0", "mid_block.resnets.0", "up_blocks.1.resnets.2"],
    "sdxl": [f"{EMPTIED}.transformer_blocks.{i}" for i in (0, 1)]
    + ["down_blocks.1.resnets.0", "up_blocks.0.attentions.1.transformer_blocks.0"],
    "ldm": ["down_blocks.2.attentions.0", "up_blocks.0.resnets.1"],
    "ddpm": ["mid_block.attentions.0", "up_blocks.1.resnets.2"],
    "dit": ["transformer_blocks.1", "transformer_blocks.3"],
    "pixart": ["transformer_blocks.0"],
    "sd3": ["transformer_blocks.1"],
    "flux": ["transformer_blocks.0", "single_transformer_blocks.1"],
}
"""Blocks to remove from each kind of teacher"""
CUSTOM = ("sd", "sdxl", "ldm", "ddpm")
"""Kinds whose students have a class of this project"""
VARIANTS = ("base", "small", "tiny")


@pytest.fixture(autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers copy the code that it is trusted to run into a temporary folder."""
    cache = tmp_path_factory.getbasetemp() / "modules"
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(cache))


def tiny(kind: str, tmp_path: Path) -> DiffusionBackbone:
    return load_tiny_teacher(tiny_pipeline(kind, tmp_path / "the_teacher"))


def exported(student: DiffusionBackbone, folder: Path) -> Path:
    export(student, folder, CARD)
    return folder


def restaged(variant: str) -> list[Change]:
    return [{"kind": "restage", "variant": variant}]


def image(pipeline: Any, kind: str) -> np.ndarray:
    """Return one image that a pipeline generates in two steps."""
    pipeline.set_progress_bar_config(disable=True)
    given = CALL.get(kind, {"prompt": "a cat at the door"})
    rng = torch.Generator().manual_seed(0)
    return pipeline(**given, num_inference_steps=2, generator=rng, output_type="np").images


def check_equal(network: Any, student: DiffusionBackbone) -> None:
    """Fail unless a network that was loaded from an export has the student's weights and output."""
    assert same_tensors(network.state_dict(), student.network.state_dict())
    arguments = student.random_arguments()
    found, expected = run_network(network, arguments), run_network(student.network, arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def refuses_untrusted_code() -> Any:
    """Return the context in which opening an export with its own class must fail."""
    return pytest.raises(ValueError, match=r"(?s)contains custom code in pruned_unet\.py .*trust_remote_code=True")


# What an export is


@pytest.mark.parametrize("kind", GONE)
def test_an_export_opens_with_diffusers_and_is_the_student(kind, tmp_path):
    teacher = tiny(kind, tmp_path)
    student = teacher.pruned(bypasses(GONE[kind]))
    folder = exported(student, tmp_path / "export")
    assert teacher.pipeline_parts.pipeline.components[teacher.component] is teacher.network

    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert (f"{student.component}/pruned_unet.py" in files) == (kind in CUSTOM) == (not is_stock(student.network))
    assert {Path(file).suffix for file in files} <= {".json", ".safetensors", ".txt", ".md", ".py"}
    assert [file for file in files if file.endswith((".md", ".py"))] == ["README.md"] or kind in CUSTOM
    assert (folder / "README.md").read_text() == CARD
    assert not [file for file in files if b"the_teacher" in (folder / file).read_bytes()]  # where it lay here

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=kind in CUSTOM)
    assert type(pipeline) is type(teacher.pipeline_parts.pipeline)
    check_equal(getattr(pipeline, student.component), student)
    assert pipeline.scheduler.config == teacher.pipeline_parts.pipeline.scheduler.config
    made = image(pipeline, kind)
    teachers = image(DiffusionPipeline.from_pretrained(tmp_path / "the_teacher"), kind)
    assert made.shape == teachers.shape == (1, PIXELS, PIXELS, 3)
    assert np.isfinite(made).all() and made.std() > 0 and not np.array_equal(made, teachers)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "ldm"])
def test_an_export_with_its_own_class_needs_trust_remote_code(kind, tmp_path):
    teacher = tiny(kind, tmp_path)
    folder = exported(teacher.pruned(bypasses(GONE[kind])), tmp_path / "export")
    for cls in (DiffusionPipeline, type(teacher.pipeline_parts.pipeline)):
        with refuses_untrusted_code():
            cls.from_pretrained(folder)
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):  # and not with random numbers in it
        type(teacher.network).from_pretrained(folder / "unet", low_cpu_mem_usage=False)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_restaged_export_is_a_stock_pipeline(variant, tmp_path):
    student = tiny("sd", tmp_path).pruned(restaged(variant))
    folder = exported(student, tmp_path / "export")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert type(pipeline.unet) is UNet2DConditionModel
    assert pipeline.unet.config.layers_per_block == 1
    assert (pipeline.unet.mid_block is None) == (variant != "base")
    assert len(pipeline.unet.down_blocks) == (3 if variant == "tiny" else 4)
    check_equal(pipeline.unet, student)
    assert np.isfinite(image(pipeline, "sd")).all()
    assert not list(folder.rglob("*.py"))


def test_transformers_lose_layers_and_stay_stock(tmp_path):
    for kind, cls, layers in (
        ("dit", DiTTransformer2DModel, {"num_layers": 2}),
        ("flux", FluxTransformer2DModel, {"num_layers": 1, "num_single_layers": 2}),
    ):
        student = load_tiny_teacher(tiny_pipeline(kind, tmp_path / kind)).pruned(bypasses(GONE[kind]))
        folder = exported(student, tmp_path / f"{kind}_export")
        network = cls.from_pretrained(folder / "transformer", low_cpu_mem_usage=False)
        assert {name: network.config[name] for name in layers} == layers


def test_an_emptied_transformer_is_bypassed_as_a_whole_in_an_export(tmp_path):
    student = tiny("sdxl", tmp_path).pruned(bypasses(GONE["sdxl"]))
    folder = exported(student, tmp_path / "export")
    unet = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).unet
    assert not list(unet.get_submodule(EMPTIED).parameters())
    assert unet.config.removed_units == GONE["sdxl"]


@pytest.mark.parametrize(("level", "kind"), [("operator", "replace"), ("channel", "slice")])
def test_other_kinds_of_plans_are_exported_the_same_way(level, kind, tmp_path):
    teacher = tiny("sd", tmp_path)
    names = [unit.name for unit in teacher.units(level)][::7]
    changes = replacements(names) if kind == "replace" else [{"unit": name, "kind": kind} for name in names]
    student = teacher.pruned(changes)
    folder = exported(student, tmp_path / "export")
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    check_equal(pipeline.unet, student)
    assert np.isfinite(image(pipeline, "sd")).all()
    check_equal(load_tiny_teacher(folder).network, student)


# An export is a teacher


@pytest.mark.parametrize("kind", ["sd", "sdxl", "ddpm", "dit", "flux"])
@torch.no_grad()
def test_an_export_can_be_loaded_pruned_and_exported_again(kind, tmp_path):
    student = tiny(kind, tmp_path).pruned(bypasses(GONE[kind]))
    again = load_tiny_teacher(exported(student, tmp_path / "once"))
    assert type(again.network) is type(student.network)
    assert again.noise_scheduler.config == student.noise_scheduler.config
    check_equal(again.network, student)
    batch = {"seed": torch.tensor([1, 2]), "caption": ["a cat", "the hat"], "label": torch.tensor([0, 5])}
    sampler = type(again.pipeline_parts.pipeline.scheduler).from_config
    images = [one.decode(one.generate(batch, sampler, 2, 3.0)).int() for one in (student, again)]
    assert (images[0] - images[1]).abs().max() <= 1 and images[0].float().std() > 1

    twice = again.pruned(bypasses([again.units()[0].name]))
    assert twice.params() < again.params() < load_tiny_teacher(tmp_path / "the_teacher").params()
    folder = exported(twice, tmp_path / "twice")
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=kind in CUSTOM)
    check_equal(getattr(pipeline, twice.component), twice)
    check_equal(load_tiny_teacher(folder).network, twice)


def test_a_restaged_export_can_lose_blocks(tmp_path):
    small = load_tiny_teacher(exported(tiny("sd", tmp_path).pruned(restaged("small")), tmp_path / "small"))
    smaller = small.pruned(bypasses(["up_blocks.2.attentions.0"]))
    folder = exported(smaller, tmp_path / "smaller")
    with refuses_untrusted_code():
        StableDiffusionPipeline.from_pretrained(folder)
    check_equal(StableDiffusionPipeline.from_pretrained(folder, trust_remote_code=True).unet, smaller)
    with pytest.raises(ValueError, match=r"teacher\.layers_per_block=1"):
        smaller.pruned(restaged("base"))


# Verification


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("sdxl", bypasses(GONE["sdxl"])), ("sd", restaged("tiny")), ("flux", bypasses(GONE["flux"]))],
    ids=["sdxl", "restaged", "flux"],
)
@pytest.mark.slow
def test_an_export_is_verified_without_this_project(kind, changes, tmp_path):
    student = tiny(kind, tmp_path).pruned(changes)
    folder = exported(student, tmp_path / "export")
    largest = float(run_network(student.network, student.random_arguments()).abs().max())
    assert 0 <= verify(student, folder) <= 1e-5 * largest


# The dense twin


def test_only_plans_of_whole_blocks_have_a_dense_twin(tmp_path):
    teacher = tiny("sd", tmp_path)
    student = teacher.pruned(bypasses(GONE["sd"]))
    twin = make_dense_twin(teacher, student)
    assert type(twin) is UNet2DConditionModel
    assert twin.state_dict().keys() == teacher.network.state_dict().keys()
    norm = next(unit.name for unit in teacher.units("operator") if unit.kind == "norm")
    conv = next(unit.name for unit in teacher.units("operator") if unit.name.endswith("conv1"))
    channels = [{"unit": teacher.units("channel")[0].name, "kind": "slice"}]
    for changes in (replacements([norm]), replacements([conv]), channels, restaged("base"), restaged("tiny")):
        with pytest.raises(ValueError, match=r"export\.dense_twin=true: no network of the teacher's shape"):
            make_dense_twin(teacher, teacher.pruned(changes))
