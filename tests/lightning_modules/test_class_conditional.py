"""Class-conditional models: DiT at its published sizes, its fresh weights, and the recipes on tiny pipelines."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from omegaconf import OmegaConf
from PIL import Image
from support.pipelines import FACTOR, LATENT, published, tiny_pipeline
from support.results import the_run

from conf.schema import ROOT, build
from criteria.selection.base import Pool
from datamodules.images import image_folder
from datamodules.readers.folder import Folder
from experiments.engine.pipeline import run_pipeline
from experiments.engine.stages.select import Select
from experiments.tools.precompute import load_backbone, precompute
from lightning_modules.backbones.diffusion.dit import DiTBackbone
from lightning_modules.backbones.diffusion.dit_weights import STD, initialise
from lightning_modules.backbones.diffusion.load import load_teacher

SIZES = {"dit_b_2_256": 130_512_416, "dit_l_2_256": 458_102_816, "dit_xl_2_256": 675_129_632}
"""Parameters of the paper's networks (130M, 458M, 675M).

They have one embedder of timestep and class for all blocks, a table of positions, and a variance among the outputs.
"""


published = functools.cache(published)

# Published sizes


@pytest.mark.parametrize("teacher", SIZES)
def test_a_dit_has_the_parameters_of_its_paper(teacher):
    dit = published(teacher)
    width = dit.inner_dim
    embedder = sum(p.numel() for p in dit.transformer_blocks[0].norm1.emb.parameters())
    variance = 4 * (8 - dit.config.out_channels) * (width + 1)  # outputs of a patch of 2x2
    counted = sum(p.numel() for p in dit.parameters()) - (len(dit.transformer_blocks) - 1) * embedder
    assert counted + 16 * 16 * width + variance == SIZES[teacher]


def shape(network: DiTTransformer2DModel) -> dict[str, Any]:
    return {key: value for key, value in network.config.items() if not key.startswith("_")}


@pytest.mark.parametrize("size", ["b", "l"])
def test_the_recipe_trains_the_network_of_the_teacher_file(configure, size):
    network = OmegaConf.to_container(configure(f"experiment=pretrain_imagenet_dit_{size}").pretrain.network)
    with torch.device("meta"):
        made = DiTTransformer2DModel.from_config(network)
    assert shape(made) == shape(published(f"dit_{size}_2_256"))
    header = (ROOT / "conf" / "experiment" / f"pretrain_imagenet_dit_{size}.yaml").read_text()
    assert f"{sum(p.numel() for p in made.parameters()):,} parameters" in header


@pytest.mark.parametrize("size", ["b", "l", "xl"])
def test_the_budget_of_the_recipe_is_half_of_the_blocks_at_full_size(configure, size):
    cfg = configure(f"experiment=laptop_diff_dit_{size}_imagenet", *(["teacher.path=x"] if size != "xl" else []))
    dit = DiTBackbone(published(f"dit_{size}_2_256"), DDPMScheduler())
    pool, blocks = Pool(dit.units(), {"params": dit.params()}, dit.shared()), dit.network.config.num_layers
    selection = build(cfg.selection)
    selection.check(pool)
    scores = {unit.name: float(i) for i, unit in enumerate(pool.units)}
    assert selection.select(pool, scores) == [f"transformer_blocks.{i}" for i in range(1, blocks // 2 + 1)]


def test_the_recipe_is_that_of_the_paper(configure):
    cfg = configure("experiment=pretrain_imagenet_dit_l")
    assert (cfg.optimizer._target_, cfg.optimizer.lr, cfg.optimizer.weight_decay) == ("torch.optim.AdamW", 1e-4, 0)
    assert (cfg.data.name, cfg.data.batch_size, cfg.data.flip, cfg.ema_decay) == ("imagenet", 256, True, 0.9999)
    assert (cfg.trainer.steps, cfg.trainer.gradient_clip_val) == (400_000, None)
    schedule = cfg.noise_scheduler
    assert (schedule.beta_start, schedule.beta_end, schedule.beta_schedule) == (1e-4, 0.02, "linear")
    assert "constant" in cfg.lr_scheduler._target_ and cfg.lr_scheduler.num_warmup_steps == 0


# Fresh weights


def small_dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_layers=2, num_attention_heads=4, attention_head_dim=16, sample_size=8, num_embeds_ada_norm=10
    )
    initialise(dit)
    return dit.eval()


def test_blocks_of_a_fresh_dit_are_the_identity_and_its_output_zero():
    dit = small_dit()
    sample, steps, labels = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999]), torch.tensor([0, 4, 10])
    with torch.no_grad():
        assert not dit(sample, steps, labels).sample.any()
        tokens = dit.pos_embed(sample)
        for block in dit.transformer_blocks:
            assert torch.equal(block(tokens, timestep=steps, class_labels=labels), tokens)


def test_every_layer_of_a_fresh_dit_is_drawn_as_in_its_paper():
    found = {}
    for name, value in small_dit().named_parameters():
        last = name.removeprefix("transformer_blocks.")
        if name.endswith("bias") or "norm1.linear" in name or name.startswith("proj_out"):
            assert not value.any(), name
        elif "norm1.emb" in name:
            assert float(value.std()) == pytest.approx(STD, rel=0.1), name
        else:
            outputs, inputs = len(value), value[0].numel()
            bound = (6 / (inputs + outputs)) ** 0.5
            assert float(value.abs().max()) <= bound and float(value.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        found[last] = value
    assert "pos_embed.proj.weight" in found and "0.norm1.emb.class_embedder.embedding_table.weight" in found


# Labels


def test_labels_are_dropped_with_the_batch_and_nowhere_else(tmp_path):
    dit = load_teacher(str(tiny_pipeline("dit", tmp_path)), sample_size=LATENT)
    batch = {"latent_mean": torch.zeros(300, 4, LATENT, LATENT), "latent_std": torch.zeros(300, 4, LATENT, LATENT)}
    batch |= {"label": torch.arange(300), "posterior": torch.arange(300)}
    torch.manual_seed(7)
    inputs = dit.training_inputs(batch)
    labels = inputs["conditions"]["class_labels"]
    dropped = labels == dit.null_class
    assert torch.equal(labels[~dropped], batch["label"][~dropped]) and 15 < int(dropped.sum()) < 45
    dit.train()
    few = {key: value[:4] for key, value in inputs.items() if key != "conditions"}
    few["conditions"] = {"class_labels": labels[:4]}
    with torch.no_grad():
        assert torch.equal(dit.predict(few), dit.predict(few))


def test_guidance_leads_from_the_null_class_to_the_class(tmp_path):
    """The prediction under guidance w is without + w (with - without), seen in one step of a linear sampler."""
    dit = load_teacher(str(tiny_pipeline("dit", tmp_path)), sample_size=LATENT)
    asked: list[list[int]] = []
    dit.network.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )

    class Keep:
        config, timesteps = dit.noise_scheduler.config, torch.tensor([500])

        def set_timesteps(self, steps, device):
            pass

        def step(self, output, t, sample, return_dict):
            return (output,)

    batch = {"seed": torch.tensor([1001, 5]), "label": torch.tensor([7, 3])}
    with torch.no_grad():
        plain, guided = (dit.generate(batch, lambda config: Keep(), 1, guidance=w) for w in (1.0, 3.0))
        without = dit.generate(batch | {"label": torch.tensor([1000, 1000])}, lambda config: Keep(), 1)
    torch.testing.assert_close(guided, without + 3 * (plain - without))
    assert asked == [[7, 3], [7, 3], [1000, 1000], [1000, 1000]]
    assert dit.conditions({"seed": batch["seed"]}, torch.device("cpu"))["class_labels"].tolist() == [1, 5]


def test_a_label_of_the_data_that_is_the_null_class_is_refused(tmp_path):
    dit = load_teacher(str(tiny_pipeline("dit", tmp_path)), sample_size=LATENT)
    assert dit.conditions({"label": torch.tensor([999])}, torch.device("cpu"))["class_labels"].tolist() == [999]
    with pytest.raises(ValueError, match="class labels from 0 to 999, and the data give 1000; choose labelled data"):
        dit.conditions({"label": torch.tensor([999, 1000])}, torch.device("cpu"))


# Recipes


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of JPEGs in a folder per class, as ImageNet has them."""
    root, rng = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("n01440764", "n01443537", "n01484850"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{name}_{i}.JPEG")
    return root


@pytest.fixture(scope="session")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline("dit", tmp_path_factory.mktemp("dit"))


@pytest.fixture
def job(sampling: list[str], imagenet: Path, tmp_path: Path) -> Callable[[str], list[str]]:
    """job(recipe) -> its arguments on tiny images, with an evaluation that needs no weights."""
    evaluation = [override for override in sampling if override.startswith("evaluation")]

    def make(recipe: str) -> list[str]:
        data = [f"data.{split}.path={imagenet / folder}" for split, folder in (("train", "train"), ("holdout", "val"))]
        data += [f"data.train.size={LATENT * FACTOR}", "data.num_workers=0", "data.batch_size=4"]
        found = [f"experiment={recipe}", "debug=tiny", "trainer=cpu", f"paths.runs={tmp_path}/runs", *data]
        return found if recipe.startswith("pretrain") else [*found, *evaluation]

    return make


def test_a_folder_that_is_no_class_of_a_dit_is_refused(imagenet, tmp_path):
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=3,
        norm_type="ada_norm_zero",
    )
    wnids = ["n01440764", "n01443537", "n01484850"]
    root = tmp_path / "pictures"
    shutil.copytree(imagenet / "train", root)
    for place, names in (([0, 1, 2], wnids), ([2, 0, 1], [wnids[1], wnids[2], wnids[0]]), ([0, 1, 2], [])):
        pipeline = SimpleNamespace(labels={name: place for place, name in enumerate(names)})
        dit = DiTBackbone(transformer, DDPMScheduler(), SimpleNamespace(pipeline=pipeline))
        data = image_folder(str(root), 16, holdout_images=8, batch_size=2)
        data.match_classes(dit.class_names, dit.null_class)
        source = data.source("train")
        expected = [place[wnids.index(source.file(index).parent.name)] for index in range(len(source))]
        assert data.training(0).__getitems__(list(range(len(source))))["label"].tolist() == expected
    shutil.copytree(root / wnids[0], root / "stray")
    data = image_folder(str(root), 16, holdout_images=8, batch_size=2)
    for names, message in ((wnids, "does not have: stray"), ([], r"has 4 classes \(.*stray\), the teacher has 3")):
        pipeline = SimpleNamespace(labels={name: place for place, name in enumerate(names)})
        with pytest.raises(ValueError, match=message):
            DiTBackbone(transformer, DDPMScheduler(), SimpleNamespace(pipeline=pipeline)).check_data(data)


@pytest.mark.parametrize("size", ["b", "l"])
def test_the_recipes_of_the_three_sizes_differ_in_their_teacher_alone(size, configure, dit):
    path = f"teacher.path={dit}"
    small, large = (configure(f"experiment=laptop_diff_dit_{name}_imagenet", path) for name in (size, "xl"))
    assert small.teacher.name == f"dit_{size}_2_256" and small.label.startswith(f"dit_{size}_2_256-imagenet")
    for cfg in (small, large):
        cfg.teacher, cfg.label = None, "same"
    assert small == large


@pytest.mark.slow
def test_laptop_diff_prunes_and_distils_a_dit_by_class(job, dit, configure, tmp_path, quick_end):
    run_pipeline(configure(*job("laptop_diff_dit_xl_imagenet"), f"teacher.path={dit}"))
    run = the_run(tmp_path / "runs")
    metrics = json.loads((run / "metrics.json").read_text())
    plan = json.loads((run / "plan.json").read_text())
    assert [change["kind"] for change in plan["changes"]] == ["bypass"] * 2
    assert "transformer_blocks.0" not in {change["unit"] for change in plan["changes"]}
    assert np.isfinite([metrics["pruned/output_loss"], metrics["distilled/output_loss"]]).all()
    assert (metrics["protocol"]["sampler"], metrics["protocol"]["guidance"]) == ("ddpm", 1.5)
    student = DiTPipeline.from_pretrained(run / "export")
    assert sum(p.numel() for p in student.transformer.parameters()) == metrics["student/params"]
    assert len(student.transformer.transformer_blocks) == 2


def test_scores_depend_on_the_class_labels(job, dit, configure, monkeypatch, tmp_path):
    """Units get other scores where the images have other labels."""
    found, take = [], Folder.take
    monkeypatch.setattr(Select, "run", lambda self, job: found.append(self.score.scores) or 1 / 0)
    for shift in (0, 5):

        def shifted(self, indices, shift=shift):
            record = take(self, indices)
            return record | {"label": record["label"] + shift}

        monkeypatch.setattr(Folder, "take", shifted)
        given = [*job("laptop_diff_dit_xl_imagenet"), f"teacher.path={dit}", f"paths.runs={tmp_path}/{shift}"]
        with pytest.raises(ZeroDivisionError):
            run_pipeline(configure(*given))
    assert found[0].keys() == found[1].keys()
    assert all(found[0][name]["score"] != found[1][name]["score"] for name in found[0])


def test_a_dit_is_trained_from_nothing_on_stored_latents(job, dit, configure, tmp_path):
    small = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 4, "sample_size": LATENT}
    given = [*job("pretrain_imagenet_dit_l"), f"pretrain.vae={dit / 'vae'}", f"latents={tmp_path}/latents"]
    given += [f"pretrain.network.{key}={value}" for key, value in small.items()]
    cfg = configure(*given)
    precompute(cfg)
    run_pipeline(cfg)
    weights = the_run(tmp_path / "runs") / "weights"
    stock, teacher = DiTPipeline.from_pretrained(weights), load_teacher(str(weights))
    stock.set_progress_bar_config(disable=True)
    images = stock(class_labels=[0, 2], guidance_scale=4.0, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, LATENT * FACTOR, LATENT * FACTOR, 3) and np.isfinite(images).all()
    assert (teacher.null_class, len(teacher.units())) == (1000, 1)
    assert not stock.scheduler.config.clip_sample  # latents leave [-1, 1]


# The task


def test_the_task_is_dit_on_imagenet_with_guidance(configure):
    cfg = configure("task=class_conditional")
    found = (cfg.task.name, cfg.teacher.name, cfg.data.name, cfg.evaluation.name)
    assert found == ("class_conditional", "dit_xl_2_256", "imagenet", "fid") and cfg.sampler.guidance > 1


def test_the_cpu_recipe_trains_for_the_classes_of_cifar10(configure):
    backbone = load_backbone(configure("experiment=pretrain_cifar10_dit"))
    assert (backbone.null_class, backbone.image_shape(), len(backbone.units())) == (10, (3, 32, 32), 6)
    labels = backbone.conditions({"seed": torch.arange(25)}, torch.device("cpu"))["class_labels"]
    assert labels.tolist() == [k % 10 for k in range(25)]
