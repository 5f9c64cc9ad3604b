"""Image classifiers from files of weights as they are published, and from folders that this project or timm wrote."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_modules.backbones.classification.backbone import ClassifierBackbone
from lightning_modules.backbones.classification.image_networks import (
    CifarResNet,
    DenseNet,
    ImageNetwork,
    Torchvision,
    build,
    fit_widths,
)
from lightning_modules.backbones.files import (
    WEIGHTS,
    explain_unreadable,
    find_model,
    find_network_folder,
    is_image_network,
    read_config,
)
from lightning_modules.backbones.loading import load_network

ARGUMENTS: dict[str, dict[str, Any]] = {
    "vgg16_bn": {"architecture": "vgg16_bn"},
    "densenet40": {"architecture": "densenet", "layers": 12, "growth": 12},
    "googlenet": {"architecture": "googlenet"},
}
ARGUMENTS |= {f"resnet{6 * n + 2}": {"architecture": "cifar_resnet", "blocks": n} for n in (1, 3, 5, 7, 9, 18)}
ARGUMENTS |= {name: {"architecture": "torchvision", "name": name} for name in Torchvision.NAMES}
"""{usual name of an architecture: its arguments for `build`}"""


def make_network_config(architecture: str, **arguments: Any) -> dict[str, Any]:
    """Return the configuration of an architecture by its usual name, with the `arguments` that are not None.

    Raises ValueError for an unknown name.
    """
    if architecture not in ARGUMENTS:
        raise ValueError(f"architecture={architecture!r} is unknown; choose one of: {', '.join(ARGUMENTS)}")
    return ARGUMENTS[architecture] | {key: value for key, value in arguments.items() if value is not None}


def load_classifier(
    path: str,
    architecture: str | None = None,
    classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    get: str | None = None,
    block: int = 1,
    smoothing: float = 0.0,
) -> ClassifierBackbone:
    """Return a trained image classifier, float32 and in eval mode.

    Raises MissingData for a path that does not exist, and ValueError for weights that cannot be read or belong to
    another architecture.

    Args:
        path: a folder that this project wrote (weights/ of a training, a network or an export of a run), whose
            config.json has all the following but `get`, `block` and `smoothing`; or weights of the `architecture`: a
            file (.safetensors, .th, .pt, .pth, .bin), a folder with one file and a config.json, or a hub id. Files are
            also looked up below $SECATEUR_DATA.
        architecture: one of ARGUMENTS; None for a folder of this project.
        classes: number of classes; None is the architecture's default, as below.
        mean: mean of each channel, of values in [0,1].
        std: standard deviation of each channel, likewise.
        image_size: rows and columns of an image.
        get: how to get the weights, for the error message.
        block: the most channels per unit.
        smoothing: label smoothing of the loss.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"teacher.smoothing={smoothing} is out of range; choose 0 or more and less than 1")
    options = {"block": block, "smoothing": smoothing}
    place = find_model(path, get)
    if place.is_dir() and is_image_network(place := find_network_folder(place)):
        network: Any = load_network(place)
        if architecture is not None and not make_network_config(architecture).items() <= network.config.items():
            raise ValueError(
                f"teacher.architecture={architecture!r}, and {place} has {network.config}; choose that architecture, "
                "or teacher.architecture=null, which takes the folder's"
            )
        return ClassifierBackbone(network, **options)
    if architecture is None:
        raise ValueError(
            f"teacher.architecture is needed for the weights in {path!r}; choose one of: {', '.join(ARGUMENTS)}"
        )
    config = make_network_config(architecture, classes=classes, mean=mean, std=std, image_size=image_size)
    with torch.device("meta"):
        network = build(config)
    read_weights(network, find_weights(place) if place.is_dir() else place)
    backbone = ClassifierBackbone(network, **options)
    if place.is_dir() and (place / "config.json").exists():
        backbone.class_names = names_of_classes(read_config(place))
    return backbone


def names_of_classes(config: Mapping[str, Any]) -> dict[str, int]:
    """Return {name: label} from the config.json of transformers (`id2label`) or timm (`label_names`), {} where unnamed.

    The names that transformers fills in itself (LABEL_0) are none.
    """
    names = config.get("id2label") or dict(enumerate(config.get("label_names") or ()))
    return {str(name): int(label) for label, name in names.items() if str(name) != f"LABEL_{label}"}


def find_weights(folder: Path) -> Path:
    """Return the file of weights in a folder, safetensors before others; raises ValueError for several of a kind."""
    for ending in WEIGHTS:
        if files := sorted(folder.glob(ending)):
            if len(files) > 1:
                raise ValueError(f"{folder} has several files of weights; name one of: {', '.join(map(str, files))}")
            return files[0]
    raise AssertionError(f"{folder} has no weights")  # as find_network_folder saw to it


def read_weights(network: ImageNetwork, file: Path) -> None:
    """Give a network the weights of a file, which may be narrower and in half precision, and put it in eval mode.

    Raises ValueError, with the path, for a file that cannot be read or does not fit.
    """
    try:
        state: Any = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        state = rename_weights(network, state.get("state_dict", state))
    except Exception as error:  # readers raise almost anything for damaged files
        raise explain_unreadable(file, error) from error
    try:
        fit_widths(network, state).eval()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load_resnet(path: str | Path, blocks: int, **common: Any) -> CifarResNet:
    """Return a trained CifarResNet from a file of weights, frozen and in eval mode."""
    network = CifarResNet(blocks, **common)
    read_weights(network, Path(path))
    return network.requires_grad_(False)


def rename_weights(network: ImageNetwork, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a published checkpoint by the names that they have in `network`.

    A prefix "module." (of several GPUs) is dropped, names are replaced as PATTERNS says, and norms without a count of
    batches, as old checkpoints have them, get a count of 0.
    """
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    for pattern, name in PATTERNS.get(type(network), ()):
        state = {re.sub(pattern, name, key): tensor for key, tensor in state.items()}
    counts = (key for key in network.state_dict() if key.endswith(".num_batches_tracked"))
    return {key: torch.tensor(0) for key in counts} | state


PATTERNS: dict[type[ImageNetwork], tuple[tuple[str, str], ...]] = {
    CifarResNet: (
        (r"^fc\.", "linear."),
        (r"^layer1\.", "stages.0."),
        (r"^layer2\.", "stages.1."),
        (r"^layer3\.", "stages.2."),
    ),
    DenseNet: ((r"^linear\.", "fc."),),
    Torchvision: ((r"^(?!network\.)", "network."),),
}
"""{network: (pattern of a name in published checkpoints, the name here)}"""
