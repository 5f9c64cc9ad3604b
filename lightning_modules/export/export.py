"""A folder that opens with diffusers (or transformers, or torch) alone, and the proof that it does."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from lightning_modules.backbones.base import NetworkBackbone, output_of
from lightning_modules.export.verify import difference


def export(student: NetworkBackbone, folder: Path, card: str = "") -> None:
    """Write what the network's library opens by itself, with a model card: see the backbones' `save_export`."""
    student.network.to("cpu")
    student.save_export(folder)
    (folder / "README.md").write_text(card)


def dense_twin(teacher: NetworkBackbone, student: NetworkBackbone) -> Any:
    """The teacher's own class and shape with the student's weights, and zeros where bypassed units were.

    For tools that know only the stock network. Equal to the student, as a block whose last layer is zero does nothing.
    Raises ValueError where that does not hold: of operators that were replaced, channels, restaged networks.
    """
    state = student.network.state_dict()
    twin = type(teacher.network).from_config(dict(teacher.network.config))
    back = {new: old for old, new in student.moved.items()}
    prefixes = sorted(back, key=len, reverse=True)

    def old_name(key: str) -> str:
        at = next((prefix for prefix in prefixes if key.startswith(prefix + ".")), None)
        return key if at is None else back[at] + key[len(at) :]

    kept = {old_name(key): value for key, value in state.items()}
    shapes = {key: value.shape for key, value in twin.state_dict().items()}
    filled = {key: kept.get(key, torch.zeros(shape)) for key, shape in shapes.items()}
    if all(filled[key].shape == shape for key, shape in shapes.items()):
        twin.load_state_dict(filled)
        arguments = student.random_arguments()
        if difference(output_of(twin, arguments), output_of(student.network, arguments))[1]:
            return twin
    raise ValueError(
        "export.dense_twin=true: no network of the teacher's shape computes what this student does; only a plan that "
        "bypasses whole blocks has such a twin"
    )


def check_hub(repository: str) -> None:
    """Raise ValueError where nothing could be pushed: no token, no network, or no name of a repository."""
    if repository.count("/") != 1:
        raise ValueError(f"export.push_to_hub={repository!r} is no id of a model on the hub; choose <owner>/<name>")
    try:
        HfApi().whoami()
    except Exception as error:
        raise ValueError(
            f"export.push_to_hub={repository!r}: the hub does not know who you are ({type(error).__name__}); "
            "log in with `hf auth login`, or choose null"
        ) from error


def push(folder: Path, repository: str) -> str:
    """Upload an export to the Hugging Face hub as a private model; returns its address."""
    api = HfApi()
    address = api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repository)
    return str(address)
