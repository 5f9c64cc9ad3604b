"""Published weights: their files on this machine, and digests that identify them."""

import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from torch import nn

from datamodules.readers.base import MissingData, located


def local_folder(path: str, needs: str = "*.safetensors") -> Path:
    """Return a folder, or that of a downloaded model of the Hugging Face hub; it must hold a file that fits `needs`.

    Raises MissingData naming the command that downloads it; nothing is downloaded here.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(path, local_files_only=True))
        except (OSError, ValueError) as error:
            raise MissingData(
                f"path={path!r} is neither a folder nor a model that has been downloaded; where there is a network, "
                f"run `hf download {path}`"
            ) from error
    if not list(folder.glob(needs)):
        raise MissingData(f"path={path!r}: {folder} has no {needs}; run `hf download {path}` again")
    return folder


def local_file(path: str) -> Path:
    """Return a file, also below $SECATEUR_DATA, or the downloaded `owner/model/file` of the hub.

    Raises MissingData naming the command that downloads it; nothing is downloaded here.
    """
    with contextlib.suppress(MissingData):
        return located(path)
    owner, _, rest = path.partition("/")
    model, _, name = rest.partition("/")
    try:
        return Path(hf_hub_download(f"{owner}/{model}", name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise MissingData(
            f"path={path!r} is neither a file, also not below $SECATEUR_DATA, nor one that has been downloaded; where "
            f"there is a network, run `hf download {owner}/{model} {name}`"
        ) from error


def digest_of(files: Iterable[Path]) -> str:
    """Return the sha256 of the names and contents of some files."""
    total = hashlib.sha256()
    for file in sorted(files):
        with open(file, "rb") as stream:
            total.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def digest_of_weights(*networks: nn.Module) -> str:
    """Return the sha256 of the classes of some networks, and of the names, shapes and values of their tensors."""
    total = hashlib.sha256()
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            total.update(f"{type(network).__name__}.{name} {list(tensor.shape)}".encode())
            total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
