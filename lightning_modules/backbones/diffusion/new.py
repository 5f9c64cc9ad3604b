"""Networks with fresh weights and the pipelines they work in, for training from nothing."""

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
from lightning_modules.backbones.diffusion.pipeline_parts import PipelineParts
from lightning_modules.backbones.files import check_weights
from lightning_modules.backbones.loading import CLASSES


def build_new_backbone(
    network: dict[str, Any],
    noise_scheduler: Any,
    vae: str | None = None,
    text_encoder: str | None = None,
    text_tokens: int = 77,
) -> DiffusionBackbone:
    """Return a network with fresh weights, drawn from the global generator, in the stock pipeline for its class.

    Raises ValueError for an unknown class and for weights of parts that are incomplete or not finite, and MissingData
    for parts that cannot be read.

    Args:
        network: its configuration in diffusers, with `_class_name`.
        noise_scheduler: the noise schedule and prediction type to train under.
        vae: a folder or hub id of an AutoencoderKL; None for a network that works on images.
        text_encoder: a folder or hub id of a text encoder with its tokenizer; only for a UNet2DConditionModel.
        text_tokens: the length to which captions are padded or cut.
    """
    name = network["_class_name"]
    if name not in CLASSES:
        raise ValueError(f"pretrain.network._class_name={name!r} is unknown; choose one of: {', '.join(CLASSES)}")
    denoiser: Any = CLASSES[name].from_config(dict(network))
    if isinstance(denoiser, DiTTransformer2DModel):
        dit_weights.initialise(denoiser)
    backbone_class: Any = families.backbone_class(denoiser) if name in families.CLASSES else unet.UNetBackbone
    pipeline = build_pipeline(denoiser, noise_scheduler, vae, text_encoder, text_tokens)
    pipeline_parts = None if pipeline is None else PipelineParts(pipeline, backbone_class.component)
    return backbone_class(denoiser, noise_scheduler, pipeline_parts)


def build_pipeline(
    network: nn.Module, noise_scheduler: Any, vae: str | None, text_encoder: str | None, text_tokens: int
) -> Any:
    """Return the stock pipeline around a network; None for one that works on images and takes no conditions.

    The arguments are those of `build_new_backbone`.
    """
    if vae is None:
        if isinstance(network, UNet2DModel):
            return None
        raise ValueError(f"pretrain.vae=null: a {type(network).__name__} works on latents; name a folder with a VAE")
    autoencoder = load_part(AutoencoderKL, vae, "pretrain.vae")
    if isinstance(network, UNet2DModel):
        return LDMPipeline(vqvae=autoencoder, unet=network, scheduler=noise_scheduler)
    if isinstance(network, DiTTransformer2DModel):
        return DiTPipeline(transformer=network, vae=autoencoder, scheduler=noise_scheduler)
    if not isinstance(network, UNet2DConditionModel):
        raise ValueError(
            f"pretrain.network._class_name={type(network).__name__!r}: training from nothing is for UNet2DModel, "
            "UNet2DConditionModel and DiTTransformer2DModel"
        )
    if text_encoder is None:
        raise ValueError("pretrain.text_encoder=null: a UNet2DConditionModel takes text; name a folder or a hub id")
    tokenizer = load_part(AutoTokenizer, text_encoder, "pretrain.text_encoder")
    tokenizer.model_max_length = text_tokens
    encoder = load_part(AutoModel, text_encoder, "pretrain.text_encoder")
    encoder.config.use_attention_mask = True  # so that the pipeline masks the padding
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=network,
        scheduler=noise_scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_part(cls: Any, path: str, field: str) -> Any:
    """Return a pretrained network in float32, or a tokenizer, of class `cls`, from a folder or a hub id.

    Raises MissingData, naming the configuration's `field`, where it cannot be read, and ValueError for weights that are
    incomplete or not finite.
    """
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
    network, loading_info = loaded
    check_weights(network, loading_info, Path(path), REFUSED_OF_PARTS)
    return network
