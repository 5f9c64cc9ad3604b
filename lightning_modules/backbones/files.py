"""Files of networks: finding them, listing those of a teacher, choosing and checking the weights."""

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from datamodules.readers.base import MissingData, located
from datamodules.readers.hub_files import hub_files, hub_folder, or_missing
from datamodules.texts.tokenizers import ENDINGS, tokenizer_files
from lightning_modules.backbones.diffusion.pruned_unet import VARIANT

log = logging.getLogger(__name__)
COMPONENTS = ("unet", "transformer")
"""Folders of the denoiser in pipelines of diffusers"""
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.th")
"""Patterns of weight files; all but the first are pickles, which are only read with weights_only=True"""
WEIGHT_FILE = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?"
    r"\.(?P<ending>safetensors|bin)"
)
"""Names that diffusers and transformers give to weights, such as model.fp16-00001-of-00002.safetensors"""
ADAPTER = "adapter_config.json"
"""The file by which transformers recognises an adapter of peft, which it then adds to the network it loads"""
MISFITS = ("missing_keys", "unexpected_keys", "mismatched_keys")
"""Kinds of tensors that do not fit the network, as the loaders of diffusers and transformers report them"""
LFS_POINTER = b"version https://git-lfs"
"""The first bytes of the text that stands in for a large file until `git lfs pull` is run"""


def find_model(path: str, get: str | None = None) -> Path:
    """Return the folder of a pipeline or network, or the file of a network, that `path` names.

    It is looked up as given and in $SECATEUR_DATA; a hub id is downloaded or taken from the cache. Raises MissingData
    at once where none of these has it, saying what to download and how (`get`, where it is given).
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
            options = {
                "safety_checker": None,
                "local_files_only": names is None,
                "variant": choose_variant(names or ()),
            }
            return Path(DiffusionPipeline.download(path, **options))
        safe = any(name.endswith(".safetensors") for name in names or ())
        return hub_folder(path, [*ENDINGS, ".safetensors" if safe else ".bin"], names)


def find_network_folder(pipeline: Path) -> Path:
    """Return the folder with the network of a pipeline: a folder of COMPONENTS, or `pipeline` itself.

    Raises MissingData where there is no config.json or no weights, and ValueError for an adapter.
    """
    for folder in (*(pipeline / name for name in COMPONENTS), pipeline):
        check_no_adapter(folder)
        if (folder / "config.json").exists():
            if not any(file for ending in WEIGHTS for file in folder.glob(ending)):
                raise MissingData(f"{folder} has a config.json but no weights (*.safetensors)")
            return folder
    raise MissingData(
        f"{pipeline} has no config.json (nor has its folder {' or '.join(COMPONENTS)}/): teacher.path names a folder "
        "saved by diffusers or transformers"
    )


def list_weight_files(path: str, tokenizer: str | None = None, get: str | None = None) -> list[Path]:
    """Return the files that a teacher's fingerprint is computed from, sorted; no weights are read.

    `tokenizer` is the path of a language model's tokenizer, where it is not beside the weights; `get` says how to get
    files that are missing.
    """
    folder, further_files = find_model(path, get), tokenizer_files(tokenizer) if tokenizer not in (None, path) else []
    if folder.is_file():
        return sorted([folder, *further_files])
    denoiser = find_network_folder(folder)
    if not (folder / "model_index.json").exists():
        folder = denoiser
    patterns = (*WEIGHTS, *(f"*{ending}" for ending in ENDINGS))
    files = [file for pattern in patterns for file in folder.rglob(pattern) if "safety_checker" not in file.parts]
    return sorted([*files, *further_files])


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's config.json. Raises ValueError where it cannot be read."""
    try:
        return dict(json.loads((folder / "config.json").read_text()))
    except ValueError as error:
        raise ValueError(f"{folder}/config.json is not readable JSON ({error})") from error


def is_image_network(folder: Path) -> bool:
    """Tell whether a folder holds an image classifier as `image_networks.save` writes it."""
    return "image_size" in (config := read_config(folder)) and "architecture" in config


def describe_damaged(folder: Path) -> str:
    """Return the names of a folder's safetensors that cannot be opened, as " (a, b)"; "" where all can."""
    names = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError):
            names.append(file.name)
    return f" ({', '.join(names)})" if names else ""


def check_no_adapter(folder: Path) -> None:
    """Raise ValueError for a folder with an adapter of peft: transformers would add it to the network unasked."""
    if (folder / ADAPTER).exists():
        raise ValueError(
            f"{folder} holds an adapter ({ADAPTER}). An adapter alone is no network, and beside whole weights it is "
            "not clear whether it belongs to them: merge it into its network (peft: "
            "`model.merge_and_unload().save_pretrained(FOLDER)`) and name that folder, or move the adapter_* files "
            "elsewhere to use the weights as they are"
        )


def choose_weights(folder: Path) -> tuple[bool, str | None]:
    """Return whether to read a folder's weights from safetensors, and which variant of them (None: no variant).

    Pickled weights and a variant, such as the half-precision `fp16`, are read only where nothing else is there, and a
    warning is logged. Raises ValueError for several variants without a file that is no variant.
    """
    names = [file.name for file in folder.iterdir()]
    pickled = [file for ending in WEIGHTS[1:] for file in folder.glob(ending)]
    is_safe = not pickled or any(name.endswith(".safetensors") for name in names)
    if not is_safe:
        log.warning("%s has no safetensors: its pickled weights are read with weights_only=True", folder)
    variants = list_only_variants(names, "safetensors" if is_safe else "bin")
    if len(variants) > 1:
        raise ValueError(
            f"{folder} has weights of several variants and none without one: {', '.join(variants)}; leave one of them "
            "there, or add the full-precision file"
        )
    if variants:
        log.warning("%s has its weights only as the variant %s: they are read, as float32", folder, variants[0])
    return is_safe, variants[0] if variants else None


def list_only_variants(names: Iterable[str], ending: str) -> list[str]:
    """Return the variants among the file names of one folder; none where there are weights that are no variant."""
    matches = [match for name in names if (match := WEIGHT_FILE.fullmatch(name)) and match["ending"] == ending]
    variants = {match["variant"] for match in matches} - {VARIANT}  # PrunedUNet... asks for its variant itself
    return [] if None in variants else sorted(variants)


def choose_variant(names: Sequence[str]) -> str | None:
    """Return the variant to download where all parts of a repository have their weights only as variants, else None.

    A variant is downloaded of every part that has it, so one part without full precision must not decide for the rest.
    """
    variants: set[str | None] = set()
    for folder in {PurePosixPath(name).parent for name in names}:
        inside = [PurePosixPath(name).name for name in names if PurePosixPath(name).parent == folder]
        ending = "safetensors" if any(name.endswith(".safetensors") for name in inside) else "bin"
        if any(WEIGHT_FILE.fullmatch(name) for name in inside):
            variants.add(next(iter(list_only_variants(inside, ending)), None))
    return variants.pop() if len(variants) == 1 else None


def check_weights(network: nn.Module, info: dict[str, Any], path: Path, refused: Sequence[str] = MISFITS) -> None:
    """Raise ValueError for weights that do not fit their configuration or are not finite, naming tensors.

    `info` is the report of a loader, {kind of misfit: names of tensors}; `refused` are the kinds that are an error.
    """
    misfits = [f"{kind}: {', '.join(sorted(map(str, info[kind]))[:3])}" for kind in refused if info[kind]]
    if misfits:
        raise ValueError(f"the weights in {path} do not fit its config.json ({'; '.join(misfits)})")
    check_finite(network, path)


def check_finite(network: nn.Module, path: Path) -> None:
    """Raise ValueError for the first tensor of a network that was not loaded, or has a value that is not finite."""
    for key, tensor in network.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"the weights in {path} do not fit its config.json (missing_keys: {key})")
        if not is_finite(tensor):
            raise ValueError(f"the weights in {path} are not finite: {key}")


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all values of a tensor are finite. Minimum and maximum tell it without a tensor of truth values."""
    return tensor.numel() == 0 or all(bool(value.isfinite()) for value in torch.aminmax(tensor))


def explain_unreadable(path: Path, error: Exception) -> ValueError:
    """Return the error to raise where reading the weights in a file or folder failed with `error`.

    Pointers of Git LFS, and pickles that are refused, are named with what to do about them.
    """
    files = [path] if path.is_file() else [file for ending in WEIGHTS for file in sorted(path.glob(ending))]
    files = [file for file in files if file.is_file()]  # no broken links
    for file in files:
        with file.open("rb") as content:
            if content.read(len(LFS_POINTER)) == LFS_POINTER:
                return ValueError(f"{file} is a pointer of Git LFS, not the weights: run `git lfs pull` in its folder")
    has_safe = any(file.suffix == ".safetensors" for file in files)
    for file in () if has_safe else files:  # pickles beside safetensors are not what was read
        if is_unsafe_pickle(file):
            converted = file.with_suffix(".safetensors").name.removeprefix("pytorch_")  # as transformers calls it
            return ValueError(
                f"{file} is pickled and holds more than tensors, so that reading it could execute code; it is refused. "
                "Convert it to safetensors in the program that wrote it, so: `import safetensors.torch; "
                f"safetensors.torch.save_model(model, {converted!r}, metadata={{'format': 'pt'}})`"
            )
    damaged = "" if path.is_file() else describe_damaged(path)
    return ValueError(f"the weights in {path}{damaged} cannot be read: {error}")


def is_unsafe_pickle(file: Path) -> bool:
    """Tell whether PyTorch refuses a file of weights because of the objects pickled in it."""
    try:
        torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        return type(error).__name__ == "UnpicklingError"  # by name: nothing here imports pickle
    return False
