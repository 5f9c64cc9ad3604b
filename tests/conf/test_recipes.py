"""The papers' recipes, from end to end on shrunk pipelines of the real architectures."""

import io
import json
from pathlib import Path

import lmdb
import numpy as np
import pytest
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from support.pipelines import FACTOR, LATENT, tiny_pipeline
from webdataset import TarWriter

from conf.schema import ROOT
from datamodules.readers.base import MissingData
from experiments.engine.pipeline import run_pipeline
from experiments.engine.stages.select import Select

RECIPES = {
    "laptop_diff_sdxl_50": ("sdxl", "bypass"),
    "laptop_diff_sd15_33": ("sd", "bypass"),
    "laptop_diff_sd15_50": ("sd", "bypass"),
    "ld_pruner_sd14": ("sd", "replace"),
    "bk_sdm_base": ("sd", "restage"),
    "bk_sdm_small": ("sd", "restage"),
    "bk_sdm_tiny": ("sd", "restage"),
}
"""{recipe: (kind of pipeline, kind of change)}"""
SHARDS = ("laptop_diff_sdxl_50",)
"""On shards; the others are on BK-SDM's folder."""
STUDIES = ("quickstart", "repair", "students", "three_tasks")
FACES = ("ld_pruner_ldm_celebahq", "laptop_diff_ldm_celebahq")
LATENT_IMAGES = (*FACES, "laptop_diff_ldm_church")
"""Unconditional, on CelebA-HQ's folder and on LSUN's LMDB."""
CLASSES = tuple(f"laptop_diff_dit_{size}_imagenet" for size in ("b", "l", "xl"))
"""Tested in test_class_conditional.py."""
LANGUAGE = ("shortened_llama", "shortened_llama_7b", "shortened_llama_stories15m")
"""Tested in test_language_jobs.py."""
CLASSIFIERS = ("resnet56", "resnet110", "vgg16", "densenet40", "googlenet", "resnet50")
"""Tested in test_classification.py."""
UNCONDITIONAL = ("ld_pruner_uig", "diff_pruning", "criteria")


def picture(number: int, rng: np.random.Generator) -> bytes:
    """A JPEG of some size."""
    height, width = rng.integers(16, 40, 2)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "jpeg")
    return file.getvalue()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """$SECATEUR_DATA with 20 pairs as BK-SDM published its own, and with as many in shards as of img2dataset."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    folder, lines = root / "preprocessed_212k" / "train", ["file_name,text"]
    folder.mkdir(parents=True)
    for i in range(20):
        (folder / f"{i:06d}.jpg").write_bytes(picture(i, rng))
        lines.append(f'{i:06d}.jpg,"the cat, at {i}"')
    (folder / "metadata.csv").write_text("\n".join(lines))
    (root / "laion").mkdir()
    for shard in range(2):
        with TarWriter(str(root / "laion" / f"{shard:05d}.tar")) as tar:
            for i in range(10):
                meta = {"original_width": 1500 + i, "original_height": 1100 + shard}
                tar.write(
                    {"__key__": f"{shard:05d}{i:04d}", "jpg": picture(i, rng), "txt": f"the cat at {i}", "json": meta}
                )
    return root


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: tiny_pipeline(kind, root / kind) for kind in {kind for kind, _ in RECIPES.values()}}


@pytest.fixture
def shrunk(pipelines, data, tmp_path, monkeypatch):
    """Overrides that run one of RECIPES on a tiny pipeline and tiny data of the format that it names."""
    monkeypatch.setenv("SECATEUR_DATA", str(data))

    def make(recipe: str) -> list[str]:
        return [
            *(["data.path=laion"] if recipe in SHARDS else []),
            f"experiment={recipe}",
            "debug=tiny",
            "trainer=cpu",
            f"teacher.path={pipelines[RECIPES[recipe][0]]}",
            f"data.size={LATENT * FACTOR}",
            "data.holdout_images=4",
            "data.num_workers=0",
            "data.batch_size=4",
            "trainer.accumulate_grad_batches=1",
            f"paths.runs={tmp_path}/runs",
        ]

    return make


def run_of(tmp_path: Path) -> Path:
    (finished,) = (tmp_path / "runs").rglob("finished.json")
    return finished.parent


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.slow
def test_a_recipe_runs_end_to_end_on_a_shrunk_pipeline(recipe, shrunk, configure, tmp_path, unverified, monkeypatch):
    extra = ["criterion.seeds=1", "selection.tolerance=0.1"] if recipe == "ld_pruner_sd14" else []
    extra += ["selection.tolerance=0.2"] if recipe.startswith("laptop") else []
    run_pipeline(configure(*shrunk(recipe), *extra))
    run = run_of(tmp_path)
    metrics, plan = json.loads((run / "metrics.json").read_text()), json.loads((run / "plan.json").read_text())
    assert metrics["student/params"] < metrics["teacher/params"]
    assert np.isfinite([metrics["pruned/output_loss"], metrics["distilled/output_loss"]]).all()
    assert {change["kind"] for change in plan["changes"]} == {RECIPES[recipe][1]}
    previews = sorted(path.name for path in (run / "previews" / "distil").iterdir())
    assert previews == ["step=0000000.png", "step=0000004.png"]  # before the first step, and after the last
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    if recipe.startswith("bk_sdm"):  # stock: nothing but diffusers is needed
        exported = StableDiffusionPipeline.from_pretrained(run / "export")
        assert type(exported.unet) is UNet2DConditionModel
    else:
        exported = DiffusionPipeline.from_pretrained(run / "export", trust_remote_code=True)
    assert sum(p.numel() for p in exported.unet.parameters()) == metrics["student/params"]
    size = LATENT * FACTOR
    exported.set_progress_bar_config(disable=True)
    images = exported("the cat", num_inference_steps=2, height=size, width=size, output_type="np").images
    assert images.shape == (1, size, size, 3) and np.isfinite(images).all()


@pytest.mark.parametrize("recipe", UNCONDITIONAL)
@pytest.mark.slow
def test_a_recipe_for_the_embedded_model_runs_on_a_tiny_one(recipe, overrides, configure, tmp_path, unverified):
    extra = ["criterion.seeds=2", "criterion.steps=2"] if recipe == "ld_pruner_uig" else []
    run_pipeline(configure(*overrides, f"experiment={recipe}", *extra))
    metrics = json.loads((run_of(tmp_path) / "metrics.json").read_text())
    assert metrics["plan/requested_ratio"] <= metrics["plan/achieved_ratio"]


@pytest.mark.parametrize("recipe", LATENT_IMAGES)
@pytest.mark.slow
def test_a_recipe_for_unconditional_latents_runs_on_published_data(
    recipe, configure, tmp_path, unverified, monkeypatch
):
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    size, rng = LATENT * FACTOR, np.random.default_rng(0)
    pictures = [picture(i, rng) for i in range(12)]
    if recipe in FACES:
        (tmp_path / "celeba_hq").mkdir()
        for i, content in enumerate(pictures):
            (tmp_path / "celeba_hq" / f"{i}.jpg").write_bytes(content)
        data = [f"data.train.local.size={size}", "data.train.local.start=4"]
    else:
        for part in ("train", "val"):
            folder = tmp_path / "lsun" / f"church_outdoor_{part}_lmdb"
            folder.mkdir(parents=True)
            with lmdb.open(str(folder), map_size=2**24) as environment, environment.begin(write=True) as transaction:
                for i, content in enumerate(pictures):
                    transaction.put(f"{i:08d}".encode(), content)
        data = [f"data.train.size={size}"]
    extra = ["criterion.seeds=2", "criterion.steps=2"] if recipe.startswith("ld_pruner") else []
    teacher = tiny_pipeline("ldm", tmp_path / "teacher")
    small = ["debug=tiny", "trainer=cpu", "evaluation=none", "data.num_workers=0", "selection.tolerance=0.2"]
    cfg = configure(
        f"experiment={recipe}", *small, *data, *extra, f"teacher.path={teacher}", f"paths.runs={tmp_path}/runs"
    )
    run_pipeline(cfg)
    metrics = json.loads((run_of(tmp_path) / "metrics.json").read_text())
    assert cfg.selection.ratio <= metrics["plan/achieved_ratio"] <= cfg.selection.ratio + 0.2
    assert np.isfinite([metrics["pruned/output_loss"], metrics["distilled/output_loss"]]).all()


def test_every_recipe_of_a_paper_is_tested_here():
    there = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    tested = {*RECIPES, *UNCONDITIONAL, *STUDIES, *LATENT_IMAGES, *CLASSES, *LANGUAGE}
    tested |= {f"autobot_{name}" for name in CLASSIFIERS}
    assert {name for name in there if not name.startswith("pretrain_")} == tested


@pytest.mark.parametrize(
    ("recipe", "choice"),
    [
        ("bk_sdm_base", "laion_aesthetics_v2_6.5_2m"),
        ("laptop_diff_sd15_33", "captioned_folder"),
        ("ld_pruner_sd14", "shards"),
    ],
)
def test_a_recipe_runs_on_other_captioned_data(recipe, choice, configure):
    cfg = configure(f"experiment={recipe}", f"data={choice}", "data.path=/elsewhere")
    assert (cfg.data.name, cfg.data.path, cfg.data.flip) == (choice, "/elsewhere", recipe.startswith("bk_sdm"))


def test_a_recipe_without_its_data_says_how_to_get_them(shrunk, configure, monkeypatch, tmp_path):
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    with pytest.raises(MissingData, match=r"preprocessed_212k/train does not exist: fetch and unpack BK-SDM's"):
        run_pipeline(configure(*shrunk("bk_sdm_tiny")))


@pytest.mark.slow
def test_conditions_of_a_text_model_reach_the_teacher(shrunk, configure, monkeypatch, quick_end):
    """Another caption, other scores: the text is not ignored."""
    found = []
    monkeypatch.setattr(Select, "run", lambda self, job: found.append(self.score.scores) or 1 / 0)
    for text in ("the cat", "at 9"):
        monkeypatch.setattr(
            "datamodules.readers.folder.open_captions", lambda folder, *_, text=text: [text] * len(folder)
        )
        with pytest.raises(ZeroDivisionError):
            run_pipeline(configure(*shrunk("laptop_diff_sd15_33"), "force=true"))
    assert found[0].keys() == found[1].keys()
    assert all(found[0][name]["score"] != found[1][name]["score"] for name in found[0])
