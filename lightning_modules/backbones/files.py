"""Files of networks: where they are looked up, which make up a teacher, and whether their weights are sound."""

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
)
from safetensors import SafetensorError, safe_open
from torch import nn

from datamodules.readers.base import MissingData, located
from datamodules.readers.hub_files import hub_files, hub_folder, or_missing
from datamodules.texts.tokenizers import ENDINGS, tokenizer_files

log = logging.getLogger(__name__)
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


def read_config(folder: Path) -> dict[str, Any]:
    """What a folder's config.json says. Raises ValueError where it cannot be read."""
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except ValueError as error:
        raise ValueError(f"{folder}/config.json is not readable JSON ({error})") from error


def is_image_network(folder: Path) -> bool:
    """Does a folder hold an image classifier as `image_networks.save` writes it?"""
    return "image_size" in (config := read_config(folder)) and "architecture" in config


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
