"""Pipelines around new networks, for training from nothing: which parts a network of a class works with."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn
from transformers import AutoModel, AutoTokenizer

from datamodules.readers.base import MissingData
from lightning_modules.backbones.diffusion import dit_weights, families, unet
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.backbones.diffusion.load import REFUSED_OF_PARTS
from lightning_modules.backbones.diffusion.pipeline_parts import Surroundings
from lightning_modules.backbones.files import check_weights
from lightning_modules.backbones.loading import CLASSES


def new_backbone(
    network: dict[str, Any],
    noise_scheduler: Any,
    vae: str | None = None,
    text_encoder: str | None = None,
    text_tokens: int = 77,
) -> DiffusionBackbone:
    """A network with fresh weights, from the global generator, in a pipeline of the class that it works in.

    `network` is a diffusers configuration with its `_class_name`; `vae` and `text_encoder` are folders or hub ids.
    Raises ValueError for a class that is unknown here, and MissingData for parts that cannot be read.
    """
    name = network["_class_name"]
    if name not in CLASSES:
        raise ValueError(f"pretrain.network._class_name={name!r} is unknown; choose one of: {', '.join(CLASSES)}")
    made: Any = CLASSES[name].from_config(dict(network))
    if isinstance(made, DiTTransformer2DModel):
        dit_weights.initialise(made)
    family: Any = families.family(made) if name in families.CLASSES else unet.UNetBackbone
    pipeline = new_pipeline(made, noise_scheduler, vae, text_encoder, text_tokens)
    surroundings = None if pipeline is None else Surroundings(pipeline, family.component)
    return family(made, noise_scheduler, surroundings)


def new_pipeline(
    network: nn.Module, noise_scheduler: Any, vae: str | None, text_encoder: str | None, text_tokens: int
) -> Any:
    """The stock pipeline around a network; None for one that works on images and takes no conditions."""
    if vae is None:
        if isinstance(network, UNet2DModel):
            return None
        raise ValueError(f"pretrain.vae=null: a {type(network).__name__} works on latents; name a folder with a VAE")
    decoder = part(AutoencoderKL, vae, "pretrain.vae")
    if isinstance(network, UNet2DModel):
        return LDMPipeline(vqvae=decoder, unet=network, scheduler=noise_scheduler)
    if isinstance(network, DiTTransformer2DModel):
        return DiTPipeline(transformer=network, vae=decoder, scheduler=noise_scheduler)
    if not isinstance(network, UNet2DConditionModel):
        raise ValueError(
            f"pretrain.network._class_name={type(network).__name__!r}: training from nothing is for UNet2DModel, "
            "UNet2DConditionModel and DiTTransformer2DModel"
        )
    if text_encoder is None:
        raise ValueError("pretrain.text_encoder=null: a UNet2DConditionModel takes text; name a folder or a hub id")
    tokenizer = part(AutoTokenizer, text_encoder, "pretrain.text_encoder")
    tokenizer.model_max_length = text_tokens
    encoder = part(AutoModel, text_encoder, "pretrain.text_encoder")
    encoder.config.use_attention_mask = True  # the pipeline then tells the encoder what is padding
    return StableDiffusionPipeline(
        vae=decoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=network,
        scheduler=noise_scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def part(cls: Any, path: str, field: str) -> Any:
    """A pretrained part, in float32; ValueError for a network whose weights are incomplete or not finite."""
    local = Path(path).expanduser()
    is_network = cls is not AutoTokenizer
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True} if is_network else {}
    try:
        loaded = cls.from_pretrained(local if local.exists() else path, **options)
    except Exception as error:
        raise MissingData(
            f"{field}={path!r} can be read neither from there nor from the hub ({type(error).__name__}: {error})"
        ) from error
    if not is_network:
        return loaded
    network, info = loaded
    check_weights(network, info, Path(path), REFUSED_OF_PARTS)
    return network
