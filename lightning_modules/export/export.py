"""Writing exports: folders that open with diffusers, transformers or torch alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import no_init_weights
from huggingface_hub import HfApi

from lightning_modules.backbones.base import NetworkBackbone, run_network
from lightning_modules.export.verify import compare_outputs


def export(student: NetworkBackbone, folder: Path, card: str = "", sampler: Callable[..., Any] | None = None) -> None:
    """Write the student as its library opens it, with the text of a model card; see the backbones' `save_export`."""
    student.network.to("cpu")
    student.save_export(folder, sampler)
    (folder / "README.md").write_text(card)


def make_dense_twin(teacher: NetworkBackbone, student: NetworkBackbone) -> Any:
    """Return a network of the teacher's class and shape with the student's weights, and zeros for bypassed units.

    It is for tools that know only the stock network. It computes what the student does, because a block whose last
    layer is zero does nothing. Raises ValueError where it does not: for replaced operators, channels and restaging.
    """
    student_state = student.network.state_dict()
    with no_init_weights():
        twin = type(teacher.network).from_config(dict(teacher.network.config))
    old_prefixes = {new: old for old, new in student.moved.items()}
    new_prefixes = sorted(old_prefixes, key=len, reverse=True)

    def teacher_name(key: str) -> str:
        prefix = next((prefix for prefix in new_prefixes if key.startswith(prefix + ".")), None)
        return key if prefix is None else old_prefixes[prefix] + key[len(prefix) :]

    kept = {teacher_name(key): value for key, value in student_state.items()}
    shapes = {key: value.shape for key, value in twin.state_dict().items()}
    state = {key: kept.get(key, torch.zeros(shape)) for key, shape in shapes.items()}
    if all(state[key].shape == shape for key, shape in shapes.items()):
        twin.load_state_dict(state)
        arguments = student.random_arguments()
        if compare_outputs(run_network(twin, arguments), run_network(student.network, arguments))[1]:
            return twin
    raise ValueError(
        "export.dense_twin=true: no network of the teacher's shape computes what this student does; only a plan that "
        "bypasses whole blocks has such a twin"
    )


def check_hub(repository: str) -> None:
    """Raise ValueError where an export could not be pushed: no <owner>/<name>, no token, or no network."""
    if repository.count("/") != 1:
        raise ValueError(
            f"export.push_to_hub={repository!r} is not the id of a model on the hub; choose <owner>/<name>"
        )
    try:
        HfApi().whoami()
    except Exception as error:
        raise ValueError(
            f"export.push_to_hub={repository!r}: the hub does not know who you are ({type(error).__name__}); "
            "log in with `hf auth login`, or choose null"
        ) from error


def push(folder: Path, repository: str) -> str:
    """Upload an export to the Hugging Face hub as a private model, and return its address."""
    api = HfApi()
    address = api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repository)
    return str(address)
