"""A folder that opens with diffusers (or transformers, or torch) alone, and the proof that it does."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi

from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.classification import image_networks
from lightning_modules.backbones.diffusion import pruned_unet
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.export.verify import difference, is_stock, output_of, random_arguments


def export(student: NetworkBackbone, folder: Path, card: str = "") -> None:
    """Write what the network's library opens by itself, in safetensors, with a model card.

    Of a diffusion network it is the teacher's pipeline around the student. Where the plan allows it the network is a
    stock one. Else its class lies beside its weights: `DiffusionPipeline.from_pretrained(folder,
    trust_remote_code=True)` opens it where only diffusers is installed, and without `trust_remote_code` it is refused,
    rather than opened as a stock network with untrained parts. A language model is a stock one, with its tokenizer. An
    image classifier has the file of its class beside its weights, which needs torch and safetensors.
    """
    student.network.to("cpu")
    if isinstance(student, DiffusionBackbone):
        export_pipeline(student, folder)
    else:
        student.save(folder)
        if student.tokenizer is not None:
            student.tokenizer.save_pretrained(folder)
        if student.library == "torch":
            shutil.copyfile(image_networks.__file__, folder / "image_networks.py")
    (folder / "README.md").write_text(card)


def export_pipeline(student: DiffusionBackbone, folder: Path) -> None:
    """A diffusers pipeline around the student."""
    network, surroundings = student.network, student.surroundings
    assert surroundings is not None, "a teacher is loaded with its pipeline"
    surroundings.to(torch.device("cpu"))
    surroundings.save(network, folder)
    if not is_stock(network):
        index = folder / "model_index.json"
        content = json.loads(index.read_text())
        content[student.component] = ["pruned_unet", type(network).__name__]
        index.write_text(json.dumps(content, indent=2) + "\n")
        shutil.copyfile(pruned_unet.__file__, folder / student.component / "pruned_unet.py")


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
        arguments = random_arguments(student)
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
