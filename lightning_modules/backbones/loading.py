"""Loading the network of any family from a folder, and reading the weights of a class safely."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_modules.backbones.classification import image_networks
from lightning_modules.backbones.diffusion import families, unet
from lightning_modules.backbones.files import (
    MISFITS,
    check_no_adapter,
    check_weights,
    choose_weights,
    explain_unreadable,
    is_image_network,
    read_config,
)

CLASSES: dict[str, Any] = unet.CLASSES | families.CLASSES
"""{name: class} of the denoisers that can be loaded"""


def load_network(folder: Path) -> nn.Module:
    """Return the denoiser, language model or image classifier in a folder, float32 and in eval mode.

    Safetensors are preferred; pickles are read with weights_only=True. Raises ValueError for an architecture that is
    neither in CLASSES nor a causal language model of transformers, for a damaged file, and for weights that do not fit
    config.json or are not finite, naming tensors.
    """
    config = read_config(folder)
    if is_image_network(folder):
        return load_image_network(folder)
    name = get_class_name(config)
    if is_language := "_class_name" not in config and "architectures" in config:
        network_class: Any = AutoModelForCausalLM
        # Sizes that do not fit are named below.
        options: dict[str, Any] = {
            "trust_remote_code": False,
            "local_files_only": True,
            "ignore_mismatched_sizes": True,
        }
    elif name in CLASSES:
        network_class, options = CLASSES[name], {"low_cpu_mem_usage": False}
    else:
        raise ValueError(f"{folder}/config.json says _class_name={name!r}; choose one of: {', '.join(CLASSES)}")
    network: Any = read_weights(network_class, folder, **options)
    if is_language:
        network.config.name_or_path = ""
    else:
        network.register_to_config(_name_or_path="")  # exports must not contain the path on this machine
    return network.eval()


def read_weights(cls: Any, folder: Path, refused: Sequence[str] = MISFITS, **options: Any) -> Any:
    """Return a network of a class of diffusers or transformers with the weights in a folder, in float32.

    `refused` are the kinds of misfits between weights and config.json that are an error (see `check_weights`);
    `options` go to the class's `from_pretrained`. Raises ValueError for weights that cannot be read safely, do not fit,
    or are not finite, and for an adapter beside them.
    """
    check_no_adapter(folder)
    is_safe, variant = choose_weights(folder)
    if variant is not None:
        options["variant"] = variant
    try:
        network, info = cls.from_pretrained(
            folder, use_safetensors=is_safe, dtype=torch.float32, output_loading_info=True, **options
        )
    except Exception as error:  # damaged, cut off, of another shape, unsafe: readers raise almost anything
        raise explain_unreadable(folder, error) from error
    check_weights(network, info, folder, refused)
    return network


def load_image_network(folder: Path) -> image_networks.ImageNetwork:
    """Return the image classifier in a folder, with layers as wide as its weights."""
    try:
        return image_networks.load(folder)
    except (ValueError, SafetensorError, OSError) as error:
        raise explain_unreadable(folder, error) from error


def get_class_name(config: dict[str, Any]) -> str:
    """Return the class of diffusers that a config.json names; "" where it names none.

    Older files call DiT and PixArt Transformer2DModel; diffusers now has a class for each.
    """
    by_norm = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": PixArtTransformer2DModel.__name__}
    name = config.get("_class_name", "")
    return by_norm.get(config.get("norm_type", ""), name) if name == "Transformer2DModel" else name
