"""Networks from folders and hub ids: which files, of which class, read how; and the teachers of diffusion."""

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    PixArtTransformer2DModel,
    UNet2DModel,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from datamodules.hub import hub_files, hub_folder, or_missing
from datamodules.latents import TextTable
from datamodules.sources import MissingData, located
from datamodules.tokenizers import ENDINGS, tokenizer_files
from lightning_modules.backbones import image_networks, transformer, unet
from lightning_modules.backbones.conditions import TEXT_FOLDER, Surroundings, quietly
from lightning_modules.backbones.diffusion import DiffusionBackbone, is_flow

log = logging.getLogger(__name__)

CLASSES: dict[str, Any] = unet.CLASSES | transformer.CLASSES
COMPONENTS = ("unet", "transformer")
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.th")
"""Endings of weights; all but the first are pickles, which are read with weights_only=True alone."""


def find_model(path: str, get: str | None = None) -> Path:
    """The folder of a pipeline or a network, or the file of a network: as given, in $SECATEUR_DATA, or by a hub id.

    What a hub id names is downloaded, or taken from the cache. Raises MissingData at once where it is neither here nor
    to be had, saying what to download and how: `get`, where it is given.
    """
    for name in (path, f"shared/resnet_cifar10/{path}"):
        with contextlib.suppress(MissingData):
            return located(name)
    if get is not None:
        return located(path, get)
    if Path(path).expanduser().is_absolute() or path.count("/") != 1:
        raise MissingData(
            f"teacher.path={path!r} does not exist, nor in $SECATEUR_DATA: it names a folder with config.json and "
            "*.safetensors, a hub id, the file of a language model (.gguf, .bin) or of a classifier (.th, .pt, .pth)"
        )
    with or_missing("teacher.path", path):
        names = hub_files(path)
        index = hub_folder(path, ["model_index.json"], names)
        if (index / "model_index.json").exists():
            return Path(DiffusionPipeline.download(path, safety_checker=None, local_files_only=names is None))
        safe = any(name.endswith(".safetensors") for name in names or ())
        return hub_folder(path, [*ENDINGS, ".safetensors" if safe else ".bin"], names)


def network_folder(pipeline: Path) -> Path:
    """The folder of the denoiser: its own in a pipeline, or the pipeline's where everything lies side by side."""
    for folder in (*(pipeline / name for name in COMPONENTS), pipeline):
        if (folder / "config.json").exists():
            if not any(file for ending in WEIGHTS for file in folder.glob(ending)):
                raise MissingData(f"{folder} has a config.json but no weights (*.safetensors)")
            return folder
    raise MissingData(
        f"{pipeline} has no config.json (nor has its folder {' or '.join(COMPONENTS)}/): teacher.path names a folder "
        "saved by diffusers or transformers"
    )


def weight_files(path: str, tokenizer: str | None = None, get: str | None = None) -> list[Path]:
    """The files that make a teacher what it is: for its fingerprint, without reading a weight.

    `tokenizer` is where that of a language model lies, if not beside its weights; `get` says how to get what is absent.
    """
    place, others = find_model(path, get), tokenizer_files(tokenizer) if tokenizer not in (None, path) else []
    if place.is_file():
        return sorted([place, *others])
    network = network_folder(place)
    if not (place / "model_index.json").exists():
        place = network
    wanted = (*WEIGHTS, *(f"*{ending}" for ending in ENDINGS))
    found = [file for ending in wanted for file in place.rglob(ending) if "safety_checker" not in file.parts]
    return sorted([*found, *others])


def load_network(folder: Path) -> nn.Module:
    """The denoiser, language model or image classifier in a folder, float32 and in eval mode.

    Safetensors first, pickles with weights_only=True only. Raises ValueError for an architecture that is none of
    CLASSES nor a causal language model of transformers, for a damaged file, and for weights that are not finite, naming
    the tensor.
    """
    config = read_config(folder)
    if is_image_network(folder):
        return load_image_network(folder)
    name = remapped(config)
    if is_language := "_class_name" not in config and "architectures" in config:
        kind: Any = AutoModelForCausalLM
        # Sizes that do not fit are named below.
        options = {"trust_remote_code": False, "local_files_only": True, "ignore_mismatched_sizes": True}
    elif name in CLASSES:
        kind, options = CLASSES[name], {"low_cpu_mem_usage": False}
    else:
        raise ValueError(f"{folder}/config.json says _class_name={name!r}; choose one of: {', '.join(CLASSES)}")
    safe = not say_if_pickled(folder)
    try:
        network, info = kind.from_pretrained(
            folder, use_safetensors=safe, dtype=torch.float32, output_loading_info=True, **options
        )
    except Exception as error:  # damaged, cut off, of another shape, unsafe: readers raise almost anything
        raise ValueError(f"the weights in {folder}{damaged(folder)} cannot be read: {error}") from error
    check_weights(network, info, folder)
    if is_language:
        network.config.name_or_path = ""
    else:
        network.register_to_config(_name_or_path="")  # where it lay here is nobody's business in an export
    return network.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """What a folder's config.json says. Raises ValueError where it cannot be read."""
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except ValueError as error:
        raise ValueError(f"{folder}/config.json is not readable JSON ({error})") from error


def is_image_network(folder: Path) -> bool:
    """Does a folder hold an image classifier as `image_networks.save` writes it?"""
    return "image_size" in (config := read_config(folder)) and "architecture" in config


def load_image_network(folder: Path) -> image_networks.ImageNetwork:
    """The image classifier in a folder, at the widths of its weights."""
    try:
        return image_networks.load(folder)
    except (ValueError, SafetensorError, OSError) as error:
        raise ValueError(f"the weights in {folder}{damaged(folder)} cannot be read: {error}") from error


def damaged(folder: Path) -> str:
    """The names of a folder's safetensors that cannot be opened, in parentheses; "" where there is none."""
    names = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError):
            names.append(file.name)
    return f" ({', '.join(names)})" if names else ""


def check_weights(network: nn.Module, info: dict[str, Any], place: Path) -> None:
    """Raise ValueError for weights that do not fit their configuration (see a loader's `info`) or are not finite."""
    wrong = [
        f"{kind}: {', '.join(sorted(map(str, info[kind]))[:3])}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[kind]
    ]
    if wrong:
        raise ValueError(f"the weights in {place} do not fit its config.json ({'; '.join(wrong)})")
    for key, tensor in network.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the weights in {place} are not finite: {key}")


def say_if_pickled(folder: Path) -> bool:
    """Has a folder weights, and none of them in safetensors? Then the log says so."""
    pickled = any(file for ending in WEIGHTS[1:] for file in folder.glob(ending))
    if found := pickled and not any(folder.glob("*.safetensors")):
        log.warning("%s has no safetensors: its pickled weights are read with weights_only=True", folder)
    return found


def remapped(config: dict[str, Any]) -> str:
    """The class of a configuration; older ones say Transformer2DModel for what has a class of its own by now."""
    by_norm = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": PixArtTransformer2DModel.__name__}
    name = config.get("_class_name", "")
    return by_norm.get(config.get("norm_type", ""), name) if name == "Transformer2DModel" else name


def load_teacher(
    path: str,
    noise_scheduler: Any = None,
    transformers: str = "block",
    pointwise: str = "sum",
    sample_size: int | None = None,
) -> DiffusionBackbone:
    """A pretrained network with what surrounds it in its pipeline, from a folder or a hub id.

    The noise schedule and the prediction type are the pipeline's, unless `noise_scheduler` is given. `transformers`
    (block | module) is what one transformer unit of a U-Net is; `pointwise` (sum | centre) how 1x1 convolutions in
    the place of operators begin; `sample_size` another size of latents than the configuration's. Raises MissingData
    and ValueError as the functions above.
    """
    for field, value, valid in (
        ("transformers", transformers, ("block", "module")),
        ("pointwise", pointwise, ("sum", "centre")),
    ):
        if value not in valid:
            raise ValueError(f"teacher.{field}={value!r} is unknown; choose one of: {', '.join(valid)}")
    folder = find_model(path)
    network = load_network(network_folder(folder))
    for kind, choice in (
        (PreTrainedModel, "a language model, such as teacher=llama_7b"),
        (image_networks.ImageNetwork, "an image classifier, such as teacher=resnet56"),
    ):
        if isinstance(network, kind):
            raise ValueError(
                f"teacher.path={path!r} is a {type(network).__name__}: choose the configuration of {choice}, and give "
                "it this path"
            )
    family: Any = transformer.family(network) if type(network).__name__ in transformer.CLASSES else unet.UNetBackbone
    if family is unet.UNetBackbone:
        unet.check_channels(network.config, path)
    pipeline = open_pipeline(folder, network, family.component, noise_scheduler)
    if noise_scheduler is None:
        noise_scheduler = training_schedule(pipeline.scheduler)
    else:
        pipeline.register_modules(scheduler=noise_scheduler)  # an export samples as it was trained and evaluated
    options = {"transformers": transformers, "pointwise": pointwise} if family is unet.UNetBackbone else {}
    if not options and (transformers, pointwise) != ("block", "sum"):
        raise ValueError(
            f"teacher.transformers={transformers!r}, teacher.pointwise={pointwise!r}: these are for U-Nets; "
            f"a {type(network).__name__} has no such choice"
        )
    table = TextTable(folder / TEXT_FOLDER) if (folder / TEXT_FOLDER).is_dir() else None
    surroundings = Surroundings(pipeline, family.component, table)
    return family(network, noise_scheduler, surroundings, sample_size=sample_size, **options)


def open_pipeline(folder: Path, network: nn.Module, component: str, noise_scheduler: Any) -> Any:
    """The pipeline in a folder around a network that is loaded already; a bare network gets a DDPMPipeline."""
    if not (folder / "model_index.json").exists():
        if not isinstance(network, UNet2DModel):
            raise ValueError(
                f"{folder} holds a {type(network).__name__} without its pipeline, which has what it is conditioned on; "
                "teacher.path names the pipeline's folder, with model_index.json"
            )
        if noise_scheduler is None and not (folder / "scheduler_config.json").exists():
            raise ValueError(
                f"{folder} holds a network without its pipeline, so its noise schedule is not known; "
                "say it: noise_scheduler=linear (or another of that group)"
            )
        return DDPMPipeline(network, noise_scheduler or DDPMScheduler.from_pretrained(folder))
    try:
        index = json.loads((folder / "model_index.json").read_text())
        absent: dict[str, None] = dict.fromkeys(key for key, value in index.items() if value == [None, None])
        absent |= {"safety_checker": None, "feature_extractor": None} if "safety_checker" in index else {}
        absent[component] = None  # it comes afterwards: diffusers would look up its class, and knows none of an export
        with quietly():  # diffusers warns of every class it does not know, among them the pruned one
            pipeline = DiffusionPipeline.from_pretrained(folder, **absent, dtype=torch.float32)
        pipeline.register_modules(**{component: network})
        mend_scaling(pipeline, folder)
        for part in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != component):
            say_if_pickled(part)
        return pipeline
    except Exception as error:
        raise ValueError(f"{folder}: the rest of the pipeline cannot be read: {error}") from error


def mend_scaling(pipeline: Any, folder: Path) -> None:
    """A VQModel whose file gives no scaling factor has none: diffusers' default is that of Stable Diffusion's VAE."""
    vae = getattr(pipeline, "vqvae", None)
    if vae is not None and "scaling_factor" not in json.loads((folder / "vqvae" / "config.json").read_text()):
        vae.register_to_config(scaling_factor=1.0)


def training_schedule(scheduler: Any) -> Any:
    """The noise schedule behind a pipeline's sampler: the same betas and prediction type, or the same flow."""
    if is_flow(scheduler):
        return scheduler
    # Where its file does not say it, samples are not clipped: they may be latents.
    return DDPMScheduler.from_config(scheduler.config, clip_sample=scheduler.config.get("clip_sample", False))
