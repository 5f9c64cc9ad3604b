"""Measures that are published networks, on networks of the same classes with few random weights, and without any."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.images import pictures
from torch import nn
from transformers import BertTokenizer, CLIPModel, CLIPProcessor, Dinov2Config, Dinov2Model

from datamodules.readers.base import MissingData
from experiments.engine.pipeline import run_pipeline
from lightning_modules.metrics.clip import ClipScore, OpenClipScore, PickScore
from lightning_modules.metrics.dino import MEAN, STD, Dino
from lightning_modules.metrics.features import resized
from lightning_modules.metrics.image_reward import REWARD_MEAN, REWARD_STD, ImageReward, encoders
from lightning_modules.metrics.protocol import Samples
from lightning_modules.metrics.published import local_file, local_folder

CPU = torch.device("cpu")
CAPTIONS = ["a cat", "the dog", "ship", "a cat asleep", "one more"]


def randomised(module: nn.Module, std: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return module


# DINOv2


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    layers = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    randomised(Dinov2Model(Dinov2Config(**layers))).save_pretrained(folder)
    return folder


def test_dino_features_are_the_class_token(dino):
    features, images = Dino(str(dino), size=42), pictures(35, 10)
    found = features(images)
    assert (found.shape, found.dtype, features.dimension) == ((35, 8), np.float64, 8)
    pixels = torch.from_numpy(resized(images, 42)).permute(0, 3, 1, 2) / 255
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dino).eval()(pixels).pooler_output.double()
    assert np.allclose(found, expected, atol=1e-5)
    assert features.fingerprint() == Dino(str(dino)).fingerprint() and len(features.fingerprint()) == 64
    assert Dino(str(dino)).transform != features.transform
    with pytest.raises(ValueError, match=r"3 channels, these are \(1, 8, 8\)"):
        features.check((1, 8, 8))


# CLIP and PickScore


def cosines(clip: str, images: np.ndarray) -> torch.Tensor:
    """Return the cosines by transformers' CLIP, one pair at a time."""
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    found = []
    for image, caption in zip(images, CAPTIONS, strict=True):
        inputs = processor(text=[caption], images=[image], return_tensors="pt", truncation=True, max_length=12)
        with torch.no_grad():
            output = model(**inputs)
        found.append(torch.cosine_similarity(output.image_embeds, output.text_embeds))
    return torch.cat(found).double()


def test_the_clip_score_is_100_times_the_mean_cosine(clip, monkeypatch):
    images, measure = pictures(5, 10), ClipScore(clip)
    expected = 100 * cosines(clip, images)
    samples = Samples(images, captions=CAPTIONS)
    assert measure(samples, None) == pytest.approx(float(expected.mean()), abs=1e-3)
    monkeypatch.setattr(ClipScore, "batch_size", 2)
    assert measure(samples, None) == pytest.approx(float(expected.mean()), abs=1e-3)
    assert expected.std() > 1  # so that a mixed-up order would show
    with torch.inference_mode():
        assert torch.allclose(measure.scores(images, CAPTIONS, CPU), expected, atol=1e-3)


def test_pick_score_is_the_cosine_times_the_scale_of_the_model(clip, tmp_path):
    images = pictures(5, 10)
    model = CLIPModel.from_pretrained(clip)
    model.logit_scale.data.fill_(np.log(7.0))
    model.save_pretrained(tmp_path)
    found = PickScore(str(tmp_path), processor=clip).scores(images, CAPTIONS, CPU).detach()
    assert torch.allclose(found, 7 * cosines(clip, images), atol=1e-4)


def test_a_measure_of_captions_is_refused_without_captions(clip):
    measure = ClipScore(clip)
    measure.check((3, 8, 8), CAPTIONS, None)
    with pytest.raises(ValueError, match="it needs captions"):
        measure.check((3, 8, 8), None, np.arange(3))
    with pytest.raises(ValueError, match="3 channels"):
        measure.check((1, 8, 8), CAPTIONS, None)


# open_clip


@pytest.fixture
def open_clip_checkpoint(tmp_path) -> Path:
    """A model `tiny` that open_clip knows, and its weights in a file as HPSv2's authors write it."""
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    (tmp_path / "tiny.json").write_text(json.dumps({"embed_dim": 4, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny.json")
    state = randomised(open_clip.create_model("tiny")).state_dict()
    state = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "w.pt")
    return tmp_path / "w.pt"


def test_an_open_clip_score_is_100_times_the_mean_cosine(open_clip_checkpoint):
    import open_clip

    images = pictures(5, 16)
    measure = OpenClipScore("tiny", str(open_clip_checkpoint))
    found = measure.scores(images, CAPTIONS, CPU).detach()
    model = open_clip.create_model("tiny").eval()
    state = torch.load(open_clip_checkpoint, weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        seen = model.encode_image((pixels - mean) / std)
        read = model.encode_text(open_clip.get_tokenizer("tiny")(CAPTIONS))
    expected = 100 * torch.cosine_similarity(seen, read).double()
    assert torch.allclose(found, expected, atol=1e-3) and expected.std() > 0.1


def test_unknown_open_clip_models_and_pickled_code_are_refused(open_clip_checkpoint):
    with pytest.raises(ValueError, match=r"model='ViT-Z' is unknown to open_clip; it has: .*ViT-H-14"):
        OpenClipScore("ViT-Z", str(open_clip_checkpoint))

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (open_clip_checkpoint.with_name("went_off"),))

    torch.save({"state_dict": Bomb()}, open_clip_checkpoint)
    with pytest.raises(Exception, match=r"[Ww]eights"):
        OpenClipScore("tiny", str(open_clip_checkpoint)).scores(pictures(1, 16), ["a"], CPU)
    assert not open_clip_checkpoint.with_name("went_off").exists()


# ImageReward


def published_reward() -> dict[str, torch.Tensor]:
    """Random weights under the names and in the order of shapes of the published file, 64 wide, one layer each."""
    w, hidden, shapes = 64, 128, {}
    vision = {
        **{"cls_token": (1, 1, w), "pos_embed": (1, 5, w), "patch_embed.proj.weight": (w, 3, 8, 8)},
        **{"patch_embed.proj.bias": (w,), "norm.weight": (w,), "norm.bias": (w,)},
    }
    for name, shape in {
        **{"norm1": (w,), "attn.qkv": (3 * w, w), "attn.proj": (w, w), "norm2": (w,)},
        **{"mlp.fc1": (2 * w, w), "mlp.fc2": (w, 2 * w)},
    }.items():
        vision |= {f"blocks.0.{name}.weight": shape, f"blocks.0.{name}.bias": shape[:1]}
    text = {"embeddings.word_embeddings.weight": (30, hidden), "embeddings.position_embeddings.weight": (40, hidden)}
    layer = {"attention.output.dense": (hidden, hidden), "crossattention.output.dense": (hidden, hidden)}
    layer |= {f"attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
    layer |= {f"crossattention.self.{name}": (hidden, w) for name in ("key", "value")}
    layer |= {"crossattention.self.query": (hidden, hidden), "intermediate.dense": (256, hidden)}
    layer |= {"output.dense": (hidden, 256), "output.LayerNorm": (hidden,)}
    layer |= {f"{name}.output.LayerNorm": (hidden,) for name in ("attention", "crossattention")}
    layers = {"embeddings.LayerNorm": (hidden,), **{f"encoder.layer.0.{k}": v for k, v in layer.items()}}
    for name, shape in layers.items():
        text |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"blip.visual_encoder.{name}": shape for name, shape in vision.items()}
    shapes |= {f"blip.text_encoder.{name}": shape for name, shape in text.items()}
    shapes |= {"blip.vision_proj.weight": (4, w), "blip.text_proj.weight": (4, hidden)}  # of no use here
    for number, (out, into) in zip((0, 2, 4), ((8, hidden), (4, 8), (1, 4)), strict=True):
        shapes |= {f"mlp.layers.{number}.weight": (out, into), f"mlp.layers.{number}.bias": (out,)}
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return state | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}


@pytest.fixture
def reward(tmp_path):
    """make(state) -> the measure with these weights."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "the", "dog", "ship", "asleep", "one", "more"]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    BertTokenizer.from_pretrained(str(tmp_path / "bert")).save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))

    def make(state: dict[str, torch.Tensor]) -> ImageReward:
        torch.save(state, tmp_path / "ImageReward.pt")
        return ImageReward(str(tmp_path / "ImageReward.pt"), str(tmp_path / "bert"))

    return make


def test_a_reward_does_not_depend_on_the_batch(reward):
    measure, images = reward(published_reward()), pictures(5, 16)
    with torch.no_grad():
        found = measure.scores(images, CAPTIONS, CPU)
        assert found.shape == (5,) and torch.isfinite(found).all() and found.std() > 1e-3
        one = [measure.scores(images[k : k + 1], [CAPTIONS[k]], CPU) for k in range(5)]
        assert torch.allclose(torch.cat(one), found, atol=1e-5)
        assert not torch.allclose(measure.scores(images[:1], ["the dog"], CPU), found[:1], atol=1e-4)
        assert not torch.allclose(measure.scores(images[1:2], CAPTIONS[:1], CPU), found[:1], atol=1e-4)


def test_a_reward_is_linear_in_the_first_token(reward):
    """With first-token states h and layers W_k h + b_k one after another, without activations."""
    state = published_reward()
    measure = reward(state)
    vision, text, head, _ = measure.loaded
    assert [tuple(weight.shape) for weight, _ in head] == [(8, 128), (4, 8), (1, 4)]
    with torch.no_grad():
        before = measure.scores(pictures(3, 16), CAPTIONS[:3], CPU)
        state["mlp.layers.4.weight"] = 2 * state["mlp.layers.4.weight"]
        after = reward(state).scores(pictures(3, 16), CAPTIONS[:3], CPU)
        bias = float(state["mlp.layers.4.bias"])
    raw_before, raw_after = before * REWARD_STD + REWARD_MEAN - bias, after * REWARD_STD + REWARD_MEAN - bias
    assert torch.allclose(raw_after, 2 * raw_before, atol=1e-5) and raw_before.abs().min() > 1e-3
    assert (vision.config.image_size, vision.config.patch_size, text.config.encoder_hidden_size) == (16, 8, 64)


def test_missing_weights_of_a_reward_model_are_named():
    state = published_reward()
    vision, text = (
        {name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)}
        for part in ("blip.visual_encoder.", "blip.text_encoder.")
    )
    del vision["norm.bias"]
    with pytest.raises(RuntimeError, match=r"post_layernorm\.bias"):
        encoders(vision, text)


# What is not on this machine


@pytest.mark.parametrize(
    ("make", "command"),
    [
        (lambda: Dino(), "hf download facebook/dinov2-large"),
        (lambda: ClipScore("nobody/no-clip"), "hf download nobody/no-clip"),
        (lambda: PickScore(), "hf download yuvalkirstain/PickScore_v1"),
        (lambda: ImageReward(), "hf download THUDM/ImageReward ImageReward.pt"),
        (lambda: OpenClipScore("ViT-H-14", "xswu/HPSv2/a.pt"), "hf download xswu/HPSv2 a.pt"),
    ],
)
def test_missing_published_weights_are_named_with_the_download_command(make, command, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    with pytest.raises(MissingData, match=re.escape(f"run `{command}`")):
        make()


def test_pickled_weights_are_ignored_and_files_found_in_the_data_folder(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(MissingData, match=r"has no \*\.safetensors"):
        local_folder(str(tmp_path))
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    assert local_file("pytorch_model.bin") == tmp_path / "pytorch_model.bin"


def test_a_job_without_weights_of_a_measure_is_refused_at_once(configure, text_job, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(MissingData, match=r"evaluation\.metrics\.clip_score: path='openai/clip-vit-large-patch14'"):
        run_pipeline(configure(*[o for o in text_job if not o.startswith("evaluation=")], "evaluation=clip_score"))
    assert not list(tmp_path.rglob("scores.json"))


@pytest.mark.slow
def test_a_job_measures_resized_samples_against_their_prompts(configure, text_job, clip, tmp_path, quick_end):
    """Text to image, prompts of a file that go round, samples kept at half their size."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\nthe sea\n")
    given = [override for override in text_job if not override.startswith("evaluation=")]
    given += ["evaluation=clip_score", f"evaluation.metrics.clip_score.path={clip}", "evaluation.resize=8"]
    given += [f"+evaluation.prompts={{_target_: datamodules.texts.prompts.read_prompts, path: {tmp_path}/prompts.txt}}"]
    run_pipeline(configure(*given))
    (run,) = (path.parent for path in tmp_path.rglob("metrics.json"))
    metrics = json.loads((run / "metrics.json").read_text())
    for network in ("teacher", "pruned", "distilled"):
        images = np.load(run / "samples" / network / "images.npy")
        assert images.shape == (4, 8, 8, 3)
        samples = Samples(images, captions=["a cat", "a dog", "the sea", "a cat"])
        assert metrics[f"{network}/clip_score"] == ClipScore(clip)(samples, None)
    assert metrics["eval/clip_score"] == metrics["distilled/clip_score"]
    protocol = metrics["protocol"]
    assert (protocol["size"], protocol["resized"], protocol["prompts"][:3]) == ([3, 8, 8], True, "3 (")
    assert protocol["measures"]["clip_score"]["better"] == "higher"
