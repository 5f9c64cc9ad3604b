"""Diffusion teachers from folders and hub ids, with the pipeline around them."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel
from torch import nn
from transformers import PreTrainedModel

from datamodules.latents import TextTable
from lightning_modules.backbones.classification import image_networks
from lightning_modules.backbones.diffusion import families, unet
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.backbones.diffusion.pipeline_parts import TEXT_FOLDER, Surroundings, quietly
from lightning_modules.backbones.diffusion.schedule import load_schedule, training_schedule
from lightning_modules.backbones.files import find_model, network_folder, say_if_pickled
from lightning_modules.backbones.loading import load_network


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
