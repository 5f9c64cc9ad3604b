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
    fit,
)
from lightning_modules.backbones.files import (
    WEIGHTS,
    find_model,
    is_image_network,
    network_folder,
    read_config,
    unreadable,
)
from lightning_modules.backbones.loading import load_network

NAMED: dict[str, dict[str, Any]] = {
    "vgg16_bn": {"architecture": "vgg16_bn"},
    "densenet40": {"architecture": "densenet", "layers": 12, "growth": 12},
    "googlenet": {"architecture": "googlenet"},
}
NAMED |= {f"resnet{6 * n + 2}": {"architecture": "cifar_resnet", "blocks": n} for n in (1, 3, 5, 7, 9, 18)}
NAMED |= {name: {"architecture": "torchvision", "name": name} for name in Torchvision.NAMES}


def named(architecture: str, **arguments: Any) -> dict[str, Any]:
    """The configuration of an architecture by its usual name, with those of `arguments` that are not None.

    Raises ValueError for another name.
    """
    if architecture not in NAMED:
        raise ValueError(f"architecture={architecture!r} is unknown; choose one of: {', '.join(NAMED)}")
    return NAMED[architecture] | {key: value for key, value in arguments.items() if value is not None}


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
    """A trained image classifier, float32 and in eval mode.

    `path` is a folder that this project wrote (weights/ of a training, student/ or export/ of a run), which says by
    itself what it holds; or a file of weights (.safetensors, .th, .pt, .pth, .bin), a folder with one beside a
    config.json, or a hub id, of the `architecture`. Files are looked up in $SECATEUR_DATA, too; `get` says how to get
    them. `classes`, `mean` and `std` (of values in [0,1]) and `image_size` are the architecture's unless given, and
    those of a folder that says them by itself in any case. `block` is the most channels of a unit, `smoothing` that of
    the labels in the loss.
    Raises MissingData for what is not to be had, and ValueError for files that cannot be read or are of another
    architecture.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"teacher.smoothing={smoothing} is out of range; choose 0 or more and less than 1")
    options = {"block": block, "smoothing": smoothing}
    place = find_model(path, get)
    if place.is_dir() and is_image_network(place := network_folder(place)):
        network: Any = load_network(place)
        if architecture is not None and not named(architecture).items() <= network.config.items():
            raise ValueError(
                f"teacher.architecture={architecture!r}, and {place} holds {network.config}; choose the teacher that "
                "it is, or teacher.architecture=null, with which the folder says it"
            )
        return ClassifierBackbone(network, **options)
    if architecture is None:
        raise ValueError(f"teacher.architecture is to say what the weights in {path!r} are of: {', '.join(NAMED)}")
    config = named(architecture, classes=classes, mean=mean, std=std, image_size=image_size)
    with torch.device("meta"):
        network = build(config)
    read_into(network, weights_file(place) if place.is_dir() else place)
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


def weights_file(folder: Path) -> Path:
    """The one file of weights in a folder, safetensors before others."""
    for ending in WEIGHTS:
        if found := sorted(folder.glob(ending)):
            if len(found) > 1:
                raise ValueError(f"{folder} has several files of weights; name one of: {', '.join(map(str, found))}")
            return found[0]
    raise AssertionError(f"{folder} has no weights")  # as network_folder saw to it


def read_into(network: ImageNetwork, file: Path) -> None:
    """Give a network the weights of a file, which may be narrower and in half precision, and put it in eval mode."""
    try:
        state: Any = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        state = renamed(network, state.get("state_dict", state))
    except Exception as error:  # readers raise almost anything for damaged files
        raise unreadable(file, error) from error
    try:
        fit(network, state).eval()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load_resnet(path: str | Path, blocks: int, **common: Any) -> CifarResNet:
    """A trained CifarResNet from a file of weights, frozen and in eval mode."""
    network = CifarResNet(blocks, **common)
    read_into(network, Path(path))
    return network.requires_grad_(False)


def renamed(network: ImageNetwork, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a checkpoint under the names they have here.

    Checkpoints of several GPUs have "module." before each name, ResNets for CIFAR are in `layer1` to `layer3` where
    here it is `stages`, torchvision's are inside of `network`, the last layer is called `linear` or `fc`, and old ones
    do not count their batches.
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
"""What a name of a published checkpoint is replaced by."""
