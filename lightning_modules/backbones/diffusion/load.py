"""Loading diffusion networks, with their pipelines, from folders and hub ids."""

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
from lightning_modules.backbones.diffusion.pipeline_parts import TEXT_FOLDER, PipelineParts, hide_diffusers_warnings
from lightning_modules.backbones.diffusion.schedule import load_schedule, training_schedule
from lightning_modules.backbones.files import check_finite, find_model, find_network_folder
from lightning_modules.backbones.loading import load_network, read_weights

LIBRARIES: dict[str, Any] = {"diffusers": diffusers, "transformers": hf_transformers}
"""Libraries whose loaders report which tensors were missing; networks of other libraries are checked after loading"""
REFUSED_OF_PARTS = ("missing_keys", "mismatched_keys")
"""Misfits of weights that are an error in a part of a pipeline; surplus tensors, such as the position ids in old files
of text encoders, are not"""


def load_teacher(
    path: str,
    noise_scheduler: Any = None,
    transformers: str = "block",
    pointwise: str = "sum",
    sample_size: int | None = None,
) -> DiffusionBackbone:
    """Return a pretrained diffusion network with the other parts of its pipeline.

    Raises MissingData for a path that is neither here nor on the hub, and ValueError for files that cannot be read or
    weights that are incomplete or not finite.

    Args:
        path: a folder written by diffusers, or a hub id.
        noise_scheduler: the noise schedule and prediction type to train under; None takes the pipeline's.
        transformers: what one transformer unit of a U-Net is: a basic `block`, or the whole `module`.
        pointwise: how a 1x1 convolution in the place of a larger one starts: from the `sum` of the kernel's taps, or
            from its `centre`.
        sample_size: height and width of the latents, where another size than the configuration's is wanted.
    """
    for field, value, valid in (
        ("transformers", transformers, ("block", "module")),
        ("pointwise", pointwise, ("sum", "centre")),
    ):
        if value not in valid:
            raise ValueError(f"teacher.{field}={value!r} is unknown; choose one of: {', '.join(valid)}")
    folder = find_model(path)
    network = load_network(find_network_folder(folder))
    for kind, choice in (
        (PreTrainedModel, "a language model, such as teacher=llama_7b"),
        (image_networks.ImageNetwork, "an image classifier, such as teacher=resnet56"),
    ):
        if isinstance(network, kind):
            raise ValueError(
                f"teacher.path={path!r} is a {type(network).__name__}: choose the configuration of {choice}, and give "
                "it this path"
            )
    backbone_class: Any = (
        families.backbone_class(network) if type(network).__name__ in families.CLASSES else unet.UNetBackbone
    )
    if backbone_class is unet.UNetBackbone:
        unet.check_channels(network.config, path)
    pipeline = open_pipeline(folder, network, backbone_class.component, noise_scheduler)
    if noise_scheduler is None:
        noise_scheduler = training_schedule(pipeline.scheduler)
    else:
        pipeline.register_modules(scheduler=noise_scheduler)  # so that an export samples as the network was trained
    options = {"transformers": transformers, "pointwise": pointwise} if backbone_class is unet.UNetBackbone else {}
    if not options and (transformers, pointwise) != ("block", "sum"):
        raise ValueError(
            f"teacher.transformers={transformers!r}, teacher.pointwise={pointwise!r}: these are for U-Nets; "
            f"a {type(network).__name__} has no such choice"
        )
    table = TextTable(folder / TEXT_FOLDER) if (folder / TEXT_FOLDER).is_dir() else None
    if table is not None:
        table.check_finite()
    pipeline_parts = PipelineParts(pipeline, backbone_class.component, table)
    return backbone_class(network, noise_scheduler, pipeline_parts, sample_size=sample_size, **options)


def open_pipeline(folder: Path, network: nn.Module, component: str, noise_scheduler: Any) -> Any:
    """Return the pipeline in a folder with `network` as its `component`.

    A UNet2DModel that lies alone gets a DDPMPipeline. Raises ValueError for other networks without a pipeline, and for
    parts that cannot be read.
    """
    if not (folder / "model_index.json").exists():
        if not isinstance(network, UNet2DModel):
            raise ValueError(
                f"{folder} holds a {type(network).__name__} without its pipeline, which has what it is conditioned on; "
                "teacher.path names the pipeline's folder, with model_index.json"
            )
        if noise_scheduler is None and not (folder / "scheduler_config.json").exists():
            raise ValueError(
                f"{folder} holds a network without its pipeline, so its noise schedule is not known; "
                "set it: noise_scheduler=linear (or another of that group)"
            )
        return DDPMPipeline(network, noise_scheduler or load_schedule(folder))
    index = read_index(folder)
    absent: dict[str, Any] = dict.fromkeys(key for key, value in index.items() if value == [None, None])
    absent |= {"safety_checker": None, "feature_extractor": None} if "safety_checker" in index else {}
    absent[component] = None  # added below: diffusers would look for its class, and does not know that of an export
    given = absent | load_parts(folder, {name: entry for name, entry in index.items() if name not in absent})
    try:
        with hide_diffusers_warnings():  # it warns about every class it does not know, such as that of an export
            pipeline = DiffusionPipeline.from_pretrained(folder, **given, dtype=torch.float32)
        pipeline.register_modules(**{component: network})
        set_missing_scaling(pipeline, folder)
    except Exception as error:
        raise ValueError(f"{folder}: the rest of the pipeline cannot be read: {error}") from error
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and name not in given:  # from a library that is not in LIBRARIES
            check_finite(part, folder / name)
    return pipeline


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of a pipeline's model_index.json. Raises ValueError where it cannot be read."""
    try:
        return dict(json.loads((folder / "model_index.json").read_text()))
    except ValueError as error:
        raise ValueError(f"{folder}/model_index.json is not readable JSON ({error})") from error


def load_parts(folder: Path, index: dict[str, Any]) -> dict[str, nn.Module]:
    """Return those parts of a pipeline, by name, that are networks of diffusers or transformers.

    `index` is the content of model_index.json: {name: [library, class]}. Raises ValueError for weights that cannot be
    read, are incomplete or are not finite, naming folder and tensor. (The loader of diffusers' pipelines would leave
    missing weights out, or fill them in at random.)
    """
    parts = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] not in LIBRARIES or not (folder / name).is_dir():
            continue
        cls = getattr(LIBRARIES[entry[0]], entry[1], None)
        if isinstance(cls, type) and issubclass(cls, ModelMixin | PreTrainedModel):
            # With this option transformers reports tensors of another shape instead of raising without their names.
            options = {"ignore_mismatched_sizes": True} if issubclass(cls, PreTrainedModel) else {}
            parts[name] = read_weights(cls, folder / name, REFUSED_OF_PARTS, **options)
    return parts


def set_missing_scaling(pipeline: Any, folder: Path) -> None:
    """Give a VQModel whose config.json has no scaling factor the factor 1; diffusers would take that of SD's VAE."""
    vae = getattr(pipeline, "vqvae", None)
    if vae is not None and "scaling_factor" not in json.loads((folder / "vqvae" / "config.json").read_text()):
        vae.register_to_config(scaling_factor=1.0)
