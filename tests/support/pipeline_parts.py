"""Pipelines as teachers: batches that fit them, and what their networks are called with."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.backbones.diffusion.load import load_teacher
from support.pipelines import LATENT

TEXT = ("sd", "sdxl", "pixart", "sd3", "flux")
"""Kinds that encode captions, each in its own way."""


def load_tiny_teacher(folder: Path) -> DiffusionBackbone:
    """A tiny pipeline as a teacher; transformers are told the size of latents: some have none, or a large one."""
    return load_teacher(str(folder), sample_size=LATENT if (folder / "transformer").exists() else None)


def training_batch(backbone: DiffusionBackbone, numbers: list[int], of: int = 3) -> dict[str, Any]:
    """Samples of these numbers out of `of`, each with its own image, caption, sizes and label."""
    rng = torch.Generator().manual_seed(1)
    images = torch.rand(of, *backbone.image_shape(), generator=rng) * 2 - 1
    return {
        "image": images[numbers],
        "label": torch.tensor(numbers),
        "caption": [f"{'the cat ' * number}sat" for number in numbers],
        "original_size": torch.tensor([[30 + number, 40 + number] for number in numbers]),
        "crop": torch.tensor([[number, 5 + number] for number in numbers]),
        "number": torch.tensor(numbers),
        "of": torch.full((len(numbers),), of),
    }


def tensors(given: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors in nested arguments, by path; what is None, empty or about the form of the output is left out."""
    found: dict[str, Tensor] = {}
    for key, value in given.items():
        if isinstance(value, dict):
            found |= tensors(value, f"{prefix}{key}/")
        elif value is not None and key != "return_dict":
            found[prefix + key] = value
    return found


@contextlib.contextmanager
def calls_of(network: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    """Collects the arguments of every call, by the names they have in the network's signature."""
    calls: list[dict[str, Tensor]] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(tensors(inspect.signature(module.forward).bind(*args, **kwargs).arguments))

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def named(key: str) -> Callable[[str], str]:
    """For assert_close: say what is not close."""
    return lambda text: f"{key}: {text}"
