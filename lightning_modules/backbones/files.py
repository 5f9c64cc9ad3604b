"""Teachers from folders and hub ids: which files, of which class, read how."""

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
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import nn

from datamodules.latents import TextTable
from datamodules.sources import MissingData
from lightning_modules.backbones import transformer, unet
from lightning_modules.backbones.conditions import TEXT_FOLDER, Surroundings, quietly
from lightning_modules.backbones.diffusion import DiffusionBackbone, is_flow

log = logging.getLogger(__name__)

CLASSES: dict[str, Any] = unet.CLASSES | transformer.CLASSES
COMPONENTS = ("unet", "transformer")
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.th")
"""Endings of weights; all but the first are pickles, which are read with weights_only=True alone."""


def find_pipeline(path: str) -> Path:
    """The local folder of a pipeline or a network: `path` itself, or a hub id, downloaded or from the cache.

    Raises MissingData at once where it is neither here nor to be had, saying what to download and how.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    if local.is_absolute() or path.count("/") != 1:
        raise MissingData(
            f"teacher.path={path!r} does not exist: it names a folder with config.json and *.safetensors, or a hub id"
        )
    try:
        return Path(DiffusionPipeline.download(path, safety_checker=None, local_files_only=not on_the_hub(path)))
    except Exception as error:
        raise MissingData(
            f"teacher.path={path!r} is not a folder here, and could not be downloaded ({type(error).__name__}); "
            f"where there is a network, run `hf download {path} --local-dir FOLDER`, then set teacher.path to FOLDER"
        ) from error


def on_the_hub(path: str) -> bool:
    """Can the hub be asked for this model? Says so in seconds, where a download would try for half a minute."""
    try:
        HfApi().model_info(path, timeout=5)
    except Exception:
        return False
    return True


def network_folder(pipeline: Path) -> Path:
    """The folder of the denoiser: its own in a pipeline, or the pipeline's where everything lies side by side."""
    for folder in (*(pipeline / name for name in COMPONENTS), pipeline):
        if (folder / "config.json").exists():
            if not any(file for ending in WEIGHTS for file in folder.glob(ending)):
                raise MissingData(f"{folder} has a config.json but no weights (*.safetensors)")
            return folder
    raise MissingData(
        f"{pipeline} has no config.json (nor has its folder {' or '.join(COMPONENTS)}/): teacher.path names a folder "
        "saved by diffusers"
    )


def weight_files(path: str) -> list[Path]:
    """The files that make a teacher what it is: for its fingerprint, without reading a weight."""
    pipeline = find_pipeline(path)
    network_folder(pipeline)
    if not (pipeline / "model_index.json").exists():
        pipeline = network_folder(pipeline)
    wanted = (*WEIGHTS, "*.json", "*.txt", "*.model")
    return sorted(file for ending in wanted for file in pipeline.rglob(ending) if "safety_checker" not in file.parts)


def load_network(folder: Path) -> nn.Module:
    """The denoiser in a folder, float32 and in eval mode; safetensors first, pickles with weights_only=True only.

    Raises ValueError for an architecture that is none of CLASSES, for a damaged file, and for weights that are not
    finite, naming the tensor.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder}/config.json is not readable JSON ({error})") from error
    name = remapped(config)
    if name not in CLASSES:
        raise ValueError(f"{folder}/config.json says _class_name={name!r}; choose one of: {', '.join(CLASSES)}")
    safe = not say_if_pickled(folder)
    try:
        network, info = CLASSES[name].from_pretrained(
            folder, use_safetensors=safe, dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:  # damaged, cut off, of another shape, unsafe
        raise ValueError(f"the weights in {folder} cannot be read: {error}") from error
    wrong = [
        f"{kind}: {', '.join(sorted(map(str, info[kind]))[:3])}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[kind]
    ]
    if wrong:
        raise ValueError(f"the weights in {folder} do not fit its config.json ({'; '.join(wrong)})")
    for key, tensor in network.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the weights in {folder} are not finite: {key}")
    network.register_to_config(_name_or_path="")  # where it lay here is nobody's business in an export
    return network.eval()


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
    folder = find_pipeline(path)
    network = load_network(network_folder(folder))
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
