"""The tiny pipelines of the tests, and the published teachers: their files, and the size of their denoisers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from omegaconf import OmegaConf
from safetensors.torch import load_file
from support.pipelines import FACTOR, KINDS, LATENT, SAME_SHAPE, published, tiny_pipeline
from support.process import ROOT
from torch import nn

PIXELS = LATENT * FACTOR
CALL = {
    "dit": {"class_labels": [1]},
    "ldm": {},
    "ddpm": {},
    "pixart": {"prompt": "a cat at the door", "use_resolution_binning": False},
    "flux": {"prompt": "a cat at the door", "height": PIXELS, "width": PIXELS},
}
"""What a pipeline is called with, where it is more or less than a prompt."""

TEACHERS = ROOT / "conf" / "teacher"
PARAMETERS = {
    "sd15": 859_520_964,
    "sd21_base": 865_910_724,
    "sd21": 865_910_724,
    "sdxl_base": 2_567_463_684,
    "ssd_1b": 1_331_334_404,
    "bk_sdm_base": 579_384_964,
    "bk_sdm_small": 482_346_884,
    "bk_sdm_tiny": 323_384_964,
    "ldm_celebahq_256": 274_056_163,
    "ddpm_church": 113_673_219,
    "dit_b_2_256": 147_427_600,
    "dit_l_2_256": 511_593_488,
    "dit_xl_2_256": 749_826_464,
    "pixart": 610_856_096,
    "sd3_medium": 2_028_328_000,
    "flux_dev": 11_901_408_320,
}
NOT_IN_DIFFUSERS = "ldm_church"
PUBLISHED = sorted({*PARAMETERS, *SAME_SHAPE})


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_pipeline_loads_and_generates(kind: str, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    folder = tiny_pipeline(kind, tmp_path / "pipeline")
    assert torch.equal(torch.get_rng_state(), before)

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    given = CALL.get(kind, {"prompt": "a cat at the door"})
    rng = torch.Generator().manual_seed(0)
    image = pipeline(**given, num_inference_steps=2, generator=rng, output_type="np").images
    assert image.shape == (1, PIXELS, PIXELS, 3)
    assert np.isfinite(image).all() and image.std() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_pipeline_is_the_same_in_every_call(kind: str, tmp_path: Path) -> None:
    first, second = (tiny_pipeline(kind, tmp_path / name) for name in ("first", "second"))
    files = sorted(file.relative_to(first) for file in first.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(second) for file in second.rglob("*") if file.is_file())
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert weights and not [file for file in files if file.suffix in (".bin", ".pt", ".pkl")]
    assert all(tensor.isfinite().all() for file in weights for tensor in load_file(first / file).values())


def test_an_unknown_kind_is_refused_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kind='sd15' is unknown; choose one of: sd, sd_v, .*, bk"):
        tiny_pipeline("sd15", tmp_path)


@pytest.mark.parametrize("teacher", PARAMETERS)
def test_a_published_configuration_has_the_published_parameters(teacher: str) -> None:
    assert parameters(published(teacher)) == PARAMETERS[teacher]


def test_dit_has_the_parameters_of_its_paper_with_one_embedder() -> None:
    """675M, which count one timestep and class embedder for all blocks, and the fixed table of 16x16 positions."""
    dit = published("dit_xl_2_256")
    blocks = [block for block in dit.modules() if isinstance(block, BasicTransformerBlock)]
    one_embedder = parameters(blocks[0].norm1.emb)
    assert len(blocks) == 28
    assert parameters(dit) - 27 * one_embedder + 16 * 16 * 1152 == 675_129_632


def test_every_configuration_is_counted_here() -> None:
    assert {file.stem for file in (ROOT / "assets" / "architectures").glob("*.json")} == set(PARAMETERS)


@pytest.mark.parametrize("teacher", [*PUBLISHED, NOT_IN_DIFFUSERS])
def test_a_teacher_file_states_name_size_and_download(teacher: str) -> None:
    file = TEACHERS / f"{teacher}.yaml"
    header, cfg = file.read_text(), OmegaConf.load(file)
    assert cfg.name == teacher and cfg._target_ == "lightning_modules.backbones.diffusion.load.load_teacher"
    if teacher != NOT_IN_DIFFUSERS:
        assert f"{PARAMETERS[SAME_SHAPE.get(teacher, teacher)]:,}" in header.replace("\n# ", " ")
    if not OmegaConf.is_missing(cfg, "path"):
        assert f"# hf download {cfg.path}" in header


@pytest.mark.parametrize("teacher", PUBLISHED)
def test_only_unets_with_several_basic_blocks_set_transformers(teacher: str) -> None:
    inside = [
        len(module.transformer_blocks)
        for module in published(teacher).modules()
        if isinstance(module, Transformer2DModel)
    ]
    cfg = OmegaConf.load(TEACHERS / f"{teacher}.yaml")
    assert cfg.get("transformers") == ("block" if max(inside, default=1) > 1 else None)
