"""The parts of pipelines around networks: how they are called, that they are frozen, and how they are loaded."""

import copy
import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.networks import same_tensors
from support.pipeline_parts import TEXT, calls_of, load_tiny_teacher, named, tensors, training_batch
from support.pipelines import FACTOR, KINDS, LATENT, tiny_pipeline
from test_backbone import Bomb
from torch import Tensor

from datamodules.readers.base import MissingData
from datamodules.seeding import torch_rng
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.backbones.diffusion.load import load_parts, load_teacher, read_index
from lightning_modules.backbones.diffusion.text_states import store_texts
from lightning_modules.backbones.files import find_model, list_weight_files

PIXELS = LATENT * FACTOR
CAPTIONS = ["a cat at the door", "the hat"]
LABELS = [1, 7]
SEEDS = [3, 4]
STEPS = 2
CALL: dict[str, dict[str, Any]] = {
    "dit": {"class_labels": LABELS},
    "ldm": {"batch_size": 2},
    "ddpm": {"batch_size": 2},
    "pixart": {"prompt": CAPTIONS, "use_resolution_binning": False, "height": PIXELS, "width": PIXELS},
    "flux": {"prompt": CAPTIONS, "height": PIXELS, "width": PIXELS},
}
"""Arguments of stock pipelines that take more or less than prompts"""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of the tiny pipelines, which no test may change."""
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: tiny_pipeline(kind, root / kind) for kind in KINDS}


def wanted(backbone: DiffusionBackbone, kind: str) -> dict[str, Any]:
    """Return a batch of two images to generate."""
    batch: dict[str, Any] = {"seed": torch.tensor(SEEDS)}
    if kind == "dit":
        batch["label"] = torch.tensor(LABELS)
    return batch | ({"caption": CAPTIONS} if backbone.takes_text else {})


# The network's arguments


def joined(calls: list[dict[str, Tensor]], kind: str) -> list[dict[str, Tensor]]:
    """Return our two passes per step joined as the stock pipelines' single one: [empty, text], or [class, empty]."""
    order = 1 if kind == "dit" else -1
    pairs = [calls[at : at + 2][::order] for at in range(0, len(calls), 2)]
    return [{key: torch.cat([one[key], other[key]]) for key in one} for one, other in pairs]


def stock_images(
    pipeline: DiffusionPipeline, kind: str, noise: Tensor, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> np.ndarray:
    """Return the images, in [0,1], that a stock pipeline generates from this noise."""
    options: dict[str, Any] = dict(CALL.get(kind, {"prompt": CAPTIONS}))
    if "batch_size" not in options:
        options["guidance_scale"] = guidance
    if kind == "flux":
        options["latents"] = FluxPipeline._pack_latents(noise, *noise.shape)
    elif "prompt" in options:
        options["latents"] = noise
    else:  # it draws its noise itself
        monkeypatch.setattr(sys.modules[type(pipeline).__module__], "randn_tensor", lambda *_, **__: noise.clone())
    if kind == "ddpm":  # its sampler draws noise in every step
        options["generator"] = [torch_rng("sampler", seed) for seed in SEEDS]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**options, num_inference_steps=STEPS, output_type="np").images


def compare_with_stock(folder: Path, kind: str, guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless generation and the stock pipeline call the network alike and make the same images."""
    backbone, pipeline = load_tiny_teacher(folder), DiffusionPipeline.from_pretrained(folder)
    sampler = type(pipeline.scheduler).from_config
    with torch.no_grad(), calls_of(backbone.network) as ours:
        samples = backbone.generate(wanted(backbone, kind), sampler, STEPS, guidance)
    noise = torch.stack([torch.randn(backbone.data_shape(), generator=torch_rng("sample", seed)) for seed in SEEDS])
    with calls_of(getattr(pipeline, backbone.component)) as theirs:
        images = stock_images(pipeline, kind, noise, guidance, monkeypatch)

    if guidance > 1 and kind not in ("flux", "ldm", "ddpm") and not backbone.embeds_guidance:
        ours = joined(ours, kind)
    assert len(ours) == len(theirs) >= STEPS
    for step, (found, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert found.keys() == expected.keys()
        for key, value in found.items():
            # Two passes of N round unlike one of 2 N, and one empty caption unlike N of them.
            exact = guidance == 1 and (step == 0 or key not in ("sample", "hidden_states"))
            atol = 0 if exact else 5e-6 * float(value.abs().max())
            torch.testing.assert_close(value, expected[key].expand_as(value), rtol=0, atol=atol, msg=named(key))

    seen = samples if backbone.pipeline_parts.vae is None else backbone.pipeline_parts.decode(samples)
    torch.testing.assert_close(
        ((seen + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1), torch.tensor(images), rtol=0, atol=1e-5
    )
    decoded = backbone.decode(samples)
    assert decoded.shape == (2, PIXELS, PIXELS, 3) and decoded.dtype == torch.uint8
    assert np.abs(decoded.numpy() - 255 * images).max() <= 0.51


@pytest.mark.parametrize("guidance", [1.0, 5.0], ids=["plain", "guided"])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_calls_the_network_as_the_stock_pipeline_does(folders, kind, guidance, monkeypatch):
    compare_with_stock(folders[kind], kind, guidance, monkeypatch)


@pytest.mark.parametrize("kind", TEXT)
def test_captions_reach_the_network(folders, kind):
    """Their states differ from each other and from those of no caption, so that comparing arguments means something."""
    backbone = load_tiny_teacher(folders[kind])
    with torch.no_grad(), calls_of(backbone.network) as calls:
        backbone.generate(wanted(backbone, kind), type(backbone.pipeline_parts.pipeline.scheduler).from_config, 1, 5.0)
    states = [call["encoder_hidden_states"] for call in calls]
    assert len(states) == (1 if kind == "flux" else 2)
    assert not torch.equal(states[0][0], states[0][1])
    if kind != "flux":
        assert torch.equal(states[1][0], states[1][1]) and not torch.equal(states[0][0], states[1][0])


def test_pixart_at_1024_pixels_gets_size_and_aspect_ratio(folders, tmp_path, monkeypatch):
    pipeline = DiffusionPipeline.from_pretrained(folders["pixart"])
    config = dict(pipeline.transformer.config) | {"sample_size": 128, "use_additional_conditions": True}
    config |= {"num_attention_heads": 3, "cross_attention_dim": 24}  # a third each for height, width, aspect ratio
    pipeline.register_modules(transformer=PixArtTransformer2DModel.from_config(config))
    pipeline.save_pretrained(tmp_path)
    compare_with_stock(tmp_path, "pixart", 5.0, monkeypatch)
    backbone = load_tiny_teacher(tmp_path)
    sizes = backbone.calibration_inputs(training_batch(backbone, [1]), 0)["conditions"]["added_cond_kwargs"]
    assert sizes["resolution"].tolist() == [[31, 41]]  # before it was cropped
    assert sizes["aspect_ratio"].tolist() == [[1]]


def test_flux_without_guidance_and_with_a_fixed_shift_is_flux_schnell(folders, tmp_path, monkeypatch):
    pipeline = DiffusionPipeline.from_pretrained(folders["flux"])
    config = dict(pipeline.transformer.config) | {"guidance_embeds": False}
    pipeline.register_modules(
        transformer=type(pipeline.transformer).from_config(config), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0)
    )
    pipeline.save_pretrained(tmp_path)
    compare_with_stock(tmp_path, "flux", 5.0, monkeypatch)


@pytest.mark.parametrize("guidance", [1.0, 5.0], ids=["plain", "guided"])
def test_a_guidance_embedding_is_fed_as_by_the_stock_pipeline(folders, tmp_path, guidance, monkeypatch):
    pipeline = DiffusionPipeline.from_pretrained(folders["sdxl"])
    config = dict(pipeline.unet.config) | {"time_cond_proj_dim": 7}
    pipeline.register_modules(
        unet=UNet2DConditionModel.from_config(config), scheduler=DDIMScheduler.from_config(pipeline.scheduler.config)
    )
    pipeline.save_pretrained(tmp_path)
    compare_with_stock(tmp_path, "sdxl", guidance, monkeypatch)
    backbone, batch = load_tiny_teacher(tmp_path), training_batch(load_tiny_teacher(tmp_path), [0, 1])
    expected = pipeline.get_guidance_scale_embedding(torch.tensor([backbone.GUIDANCE - 1]), embedding_dim=7)
    for inputs in (backbone.calibration_inputs(batch, 0), backbone.training_inputs(batch)):
        torch.testing.assert_close(inputs["conditions"]["timestep_cond"], expected.expand(2, 7), rtol=0, atol=1e-6)


def test_a_learned_variance_reaches_the_sampler_that_takes_it(tmp_path, monkeypatch):
    pipeline = DiffusionPipeline.from_pretrained(tiny_pipeline("ddpm", tmp_path / "stock"))
    unet = UNet2DModel.from_config(dict(pipeline.unet.config) | {"out_channels": 6})
    DDPMPipeline(unet, DDPMScheduler(variance_type="learned_range")).save_pretrained(tmp_path / "learned")
    compare_with_stock(tmp_path / "learned", "ddpm", 1.0, monkeypatch)


# The parts are frozen, and not in the module tree


@pytest.mark.parametrize("kind", ["sdxl", "flux", "ldm"])
def test_pipeline_parts_are_frozen_and_absent_from_checkpoints(folders, kind):
    backbone = load_tiny_teacher(folders[kind])
    network = load_file(next((folders[kind] / backbone.component).glob("*.safetensors")))
    assert set(backbone.state_dict()) == {f"network.{key}" for key in network}
    assert len(list(backbone.parameters())) == len(list(backbone.network.parameters()))
    assert copy.deepcopy(backbone).pipeline_parts is backbone.pipeline_parts
    others = backbone.train().pipeline_parts.modules()
    assert len(others) == {"sdxl": 3, "flux": 3, "ldm": 1}[kind]
    for part in others:
        assert part is not backbone.network and not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_captions_encoded_during_scoring_can_be_used_for_training(folders, kind):
    """Scoring runs in inference mode, and possibly in another precision."""
    backbone = load_tiny_teacher(folders[kind])
    batch = training_batch(backbone, [0, 1])
    expected = tensors(load_tiny_teacher(folders[kind]).conditions(batch, torch.device("cpu")))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        scored = backbone.calibration_inputs(batch, 0)
        backbone.decode(backbone.latents(batch, None))
    assert all(torch.equal(value, expected[key]) for key, value in tensors(scored["conditions"]).items())
    backbone.loss(backbone.training_inputs(batch)).backward()
    assert all(p.grad.isfinite().all() for p in backbone.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in backbone.parameters())


# Loading


def test_an_inpainting_network_is_refused(tmp_path):
    folder = tiny_pipeline("sd", tmp_path / "inpainting")
    config = json.loads((folder / "unet" / "config.json").read_text()) | {"in_channels": 9}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match=r"takes 9 channels and gives 4: an inpainting, .* choose a teacher") as caught:
        load_tiny_teacher(folder)
    assert f"teacher.path={str(folder)!r}" in str(caught.value)


def test_an_unreachable_pipeline_is_reported_with_how_to_download_it(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for read in (
        load_teacher,
        list_weight_files,
    ):  # the weights' files are looked up first, for the teacher's fingerprint
        wanted = r"run `hf download nobody/no-pipeline --local-dir FOLDER`, then set teacher\.path to FOLDER"
        with pytest.raises(MissingData, match=wanted):
            read("nobody/no-pipeline")


@torch.no_grad()
def test_a_vqmodel_without_a_stored_scaling_factor_does_not_scale(folders, tmp_path):
    """As in early latent diffusion models; diffusers would take the factor of Stable Diffusion's VAE."""
    folder = tiny_pipeline("ldm", tmp_path / "ldm")
    file = folder / "vqvae" / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("scaling_factor") == 0.18215
    file.write_text(json.dumps(config))
    scaled, plain = load_tiny_teacher(folders["ldm"]), load_tiny_teacher(folder)
    images = training_batch(plain, [0, 1])["image"]
    vqvae = DiffusionPipeline.from_pretrained(folder).vqvae.requires_grad_(False)  # else convolutions round otherwise
    latents = vqvae.encode(images).latents
    assert torch.equal(plain.pipeline_parts.encode(images, None), latents)
    assert torch.equal(plain.pipeline_parts.decode(latents), vqvae.decode(latents).sample)
    assert torch.equal(scaled.pipeline_parts.encode(images, None), latents * 0.18215)


@pytest.fixture(scope="module")
def sd(folders) -> DiffusionBackbone:
    """Return the tiny Stable Diffusion, which no test may change."""
    return load_tiny_teacher(folders["sd"])


@pytest.fixture
def copied_sd(folders, tmp_path) -> Path:
    """Return a copy of the tiny Stable Diffusion to damage."""
    return shutil.copytree(folders["sd"], tmp_path / "sd")


@pytest.mark.parametrize(
    ("kind", "part", "key", "value", "message"),
    [
        ("sd", "vae", "decoder.conv_in.weight", torch.nan, "are not finite: decoder.conv_in.weight"),
        ("sd", "vae", "encoder.conv_in.bias", torch.inf, "are not finite: encoder.conv_in.bias"),
        ("ldm", "vqvae", "quantize.embedding.weight", torch.nan, "are not finite: quantize.embedding.weight"),
        ("sd", "text_encoder", "final_layer_norm.weight", torch.nan, "are not finite: final_layer_norm.weight"),
        ("sd", "vae", "quant_conv.weight", None, "missing_keys: quant_conv.weight"),
        ("sd", "text_encoder", "encoder.layers.1.mlp.fc1.bias", None, "missing_keys: encoder.layers.1.mlp.fc1.bias"),
    ],
)
def test_a_part_with_damaged_or_missing_weights_is_refused(folders, tmp_path, kind, part, key, value, message):
    folder = shutil.copytree(folders[kind], tmp_path / "damaged")
    (file,) = (folder / part).glob("*.safetensors")
    state = load_file(file)
    stored_key = next(name for name in state if f".{name}".endswith(f".{key}"))
    if value is None:
        del state[stored_key]
    else:
        state[stored_key].view(-1)[0] = value
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"the weights in {folder / part} .*{message}"):
        load_parts(folder, {part: read_index(folder)[part]})


def test_a_variant_is_read_where_there_are_no_other_weights(sd, copied_sd, caplog):
    for file in copied_sd.rglob("*.safetensors"):
        save_file({key: value.half() for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
        file.rename(file.with_suffix(".fp16.safetensors"))
    found = load_tiny_teacher(copied_sd)
    pairs = [
        (found.network, sd.network),
        *zip(found.pipeline_parts.modules(), sd.pipeline_parts.modules(), strict=True),
    ]
    for ours, theirs in pairs:
        halved = {key: value.half().to(value.dtype) for key, value in theirs.state_dict().items()}
        assert same_tensors(ours.state_dict(), halved)
    for part in ("unet", "vae", "text_encoder"):
        assert f"{copied_sd / part} has its weights only as the variant fp16" in caplog.text

    (copied_sd / "vae" / "diffusion_pytorch_model.ema.safetensors").touch()
    with pytest.raises(ValueError, match=r"vae has weights of several variants and none without one: ema, fp16"):
        load_parts(copied_sd, {"vae": read_index(copied_sd)["vae"]})


def test_a_pipeline_with_only_fp16_weights_is_downloaded_as_fp16(monkeypatch, tmp_path):
    names = ["model_index.json", "vae/config.json", "unet/config.json"]
    half, whole = "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"
    chosen = []

    def download(path: str, variant: str | None, **options: Any) -> Path:
        chosen.append(variant)
        return tmp_path

    (tmp_path / "model_index.json").touch()
    monkeypatch.setattr("lightning_modules.backbones.files.DiffusionPipeline.download", download)
    monkeypatch.setattr("lightning_modules.backbones.files.hub_folder", lambda *_: tmp_path)
    for vae, unet in (
        ([half], [half]),
        ([half], [half, whole]),
        ([whole], [half]),  # a variant would be taken of all parts that have it
        ([half], ["diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "diffusion_pytorch_model.bin"]),
    ):
        hub_files = [*names, *(f"vae/{name}" for name in vae), *(f"unet/{name}" for name in unet)]
        monkeypatch.setattr("lightning_modules.backbones.files.hub_files", lambda path, files=hub_files: files)
        assert find_model("somebody/pipeline") == tmp_path
    assert chosen == ["fp16", None, None, "fp16"]


def test_an_adapter_beside_the_weights_of_a_text_encoder_is_refused(copied_sd):
    (copied_sd / "text_encoder" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"text_encoder holds an adapter \(adapter_config\.json\)"):
        load_tiny_teacher(copied_sd)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_pickled_weights_of_a_part_are_read_without_executing_them(sd, copied_sd, tmp_path, part):
    index = {part: read_index(copied_sd)[part]}
    expected = getattr(sd.pipeline_parts.pipeline, part).state_dict()
    (safe,) = (copied_sd / part).glob("*.safetensors")
    pickled = safe.with_name({"vae": "diffusion_pytorch_model.bin", "text_encoder": "pytorch_model.bin"}[part])
    torch.save(load_file(safe), pickled)
    safe.unlink()
    assert same_tensors(load_parts(copied_sd, index)[part].state_dict(), expected)

    pickled.write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(ValueError, match=rf"{pickled} is pickled .* refused\. Convert it to safetensors") as caught:
        load_parts(copied_sd, index)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "boom").exists()

    pickled.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match=rf"{pickled} is a pointer of Git LFS"):
        load_parts(copied_sd, index)


@torch.no_grad()
def test_values_of_the_vae_that_are_not_finite_are_refused(sd):
    images = training_batch(sd, [0])["image"]
    latents = sd.latents({"image": images}, None)
    with pytest.raises(FloatingPointError, match=r"images decoded from latents are not finite: .* AutoencoderKL"):
        sd.decode(latents * torch.nan)
    with pytest.raises(FloatingPointError, match=r"latents of images are not finite: .* AutoencoderKL"):
        sd.latents({"image": images * torch.inf}, None)


def test_stored_text_states_that_are_not_finite_are_named(sd, copied_sd):
    store_texts(sd.pipeline_parts, ["a cat", "the hat"], copied_sd / "text")
    file = copied_sd / "text" / "text-00000.safetensors"
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    state = load_file(file)
    state["encoder_hidden_states"][2, 1, 0] = torch.nan
    save_file(state, file, metadata)
    with pytest.raises(ValueError, match=rf"{file} has .* not finite: encoder_hidden_states, of the caption 'the hat'"):
        load_tiny_teacher(copied_sd)

    with pytest.raises(FloatingPointError, match=r"text states .* are not finite as torch\.float16, .* \['a cat'\]"):
        store_texts(Overflowing(sd.pipeline_parts), ["a cat"], copied_sd / "again")


class Overflowing:
    """Makes text states that are too large for half precision."""

    def __init__(self, parts: Any) -> None:
        self.encode_empty_text = parts.encode_empty_text
        self.states = parts.encode_text

    def encode_text(self, captions: list[str], device: torch.device) -> dict[str, Any]:
        return {key: value * 1e6 for key, value in self.states(captions, device).items()}
