"""Diffusion teachers from folders and hub ids, with the pipeline around them."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers as hf_transformers
from diffusers import DDPMPipeline, DiffusionPipeline, ModelMixin, UNet2DModel
from torch import nn
from transformers import PreTrainedModel

from datamodules.latents import TextTable
from lightning_modules.backbones.classification import image_networks
from lightning_modules.backbones.diffusion import families, unet
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.backbones.diffusion.pipeline_parts import TEXT_FOLDER, Surroundings, quietly
from lightning_modules.backbones.diffusion.schedule import load_schedule, training_schedule
from lightning_modules.backbones.files import check_finite, find_model, network_folder
from lightning_modules.backbones.loading import load_network, read_weights

LIBRARIES: dict[str, Any] = {"diffusers": diffusers, "transformers": hf_transformers}
"""Libraries whose networks are read here, so that what their loaders say of the weights is seen"""
REFUSED_OF_PARTS = ("missing_keys", "mismatched_keys")
"""Misfits that make a part of a pipeline another network; old files have tensors too many, such as position ids"""


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
    family: Any = families.family(network) if type(network).__name__ in families.CLASSES else unet.UNetBackbone
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
    if table is not None:
        table.check_finite()
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
        return DDPMPipeline(network, noise_scheduler or load_schedule(folder))
    index = read_index(folder)
    absent: dict[str, Any] = dict.fromkeys(key for key, value in index.items() if value == [None, None])
    absent |= {"safety_checker": None, "feature_extractor": None} if "safety_checker" in index else {}
    absent[component] = None  # it comes afterwards: diffusers would look up its class, and knows none of an export
    given = absent | load_parts(folder, {name: entry for name, entry in index.items() if name not in absent})
    try:
        with quietly():  # diffusers warns of every class it does not know, among them the pruned one
            pipeline = DiffusionPipeline.from_pretrained(folder, **given, dtype=torch.float32)
        pipeline.register_modules(**{component: network})
        mend_scaling(pipeline, folder)
    except Exception as error:
        raise ValueError(f"{folder}: the rest of the pipeline cannot be read: {error}") from error
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and name not in given:  # of a library that is not in LIBRARIES
            check_finite(part, folder / name)
    return pipeline


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of a pipeline's model_index.json. Raises ValueError where it cannot be read."""
    try:
        return dict(json.loads((folder / "model_index.json").read_text()))
    except ValueError as error:
        raise ValueError(f"{folder}/model_index.json is not readable JSON ({error})") from error


def load_parts(folder: Path, index: dict[str, Any]) -> dict[str, nn.Module]:
    """Return the networks of diffusers and transformers among the entries of a pipeline's index, by name.

    Raises ValueError for weights that cannot be read, are incomplete or are not finite, naming folder and tensor:
    diffusers would fill in what is missing, at random or not at all.
    """
    parts = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] not in LIBRARIES or not (folder / name).is_dir():
            continue
        cls = getattr(LIBRARIES[entry[0]], entry[1], None)
        if isinstance(cls, type) and issubclass(cls, ModelMixin | PreTrainedModel):
            # Without this option transformers does not say which tensor it is whose shape does not fit.
            options = {"ignore_mismatched_sizes": True} if issubclass(cls, PreTrainedModel) else {}
            parts[name] = read_weights(cls, folder / name, REFUSED_OF_PARTS, **options)
    return parts


def mend_scaling(pipeline: Any, folder: Path) -> None:
    """A VQModel whose file gives no scaling factor has none: diffusers' default is that of Stable Diffusion's VAE."""
    vae = getattr(pipeline, "vqvae", None)
    if vae is not None and "scaling_factor" not in json.loads((folder / "vqvae" / "config.json").read_text()):
        vae.register_to_config(scaling_factor=1.0)
