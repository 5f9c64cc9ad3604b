"""The proof that an export loads and computes the same in a process that has only the network's own library."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.diffusion.pipeline_parts import move

TOLERANCE = 1e-5
"""how much an output may differ from another of the same weights, as a share of its largest value"""


class ExportMismatch(RuntimeError):
    """An export does not load, or does not compute what the network in memory does."""


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """A nested dictionary of tensors with its paths joined by slashes."""
    found: dict[str, Tensor] = {}
    for key, value in content.items():
        found |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value.contiguous()}
    return found


def difference(found: Tensor, expected: Tensor) -> tuple[float, bool]:
    """The largest difference of two outputs, and whether it is within TOLERANCE."""
    largest = float((found - expected).abs().max())
    return largest, largest <= TOLERANCE * float(expected.abs().max())


def verify(student: NetworkBackbone, folder: Path) -> float:
    """Load an export in a process that cannot import this project; returns the largest difference of its output.

    Raises ExportMismatch where it does not load or differs by more than TOLERANCE.
    """
    student.network.to("cpu")
    arguments = move(student.random_arguments(), "cpu")
    expected = student.expected_outputs(arguments)
    program = Path(__file__).parent / f"reload_{student.library}.py"
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        save_file(flat(arguments), work / "inputs.safetensors")
        files = [folder.resolve(), work / "inputs.safetensors", work / "output.safetensors"]
        words = [*files, torch.get_num_threads(), *student.reload_arguments()]
        process = subprocess.run(
            [sys.executable, str(program), *map(str, words)],
            cwd=work,
            capture_output=True,
            text=True,
            env=clean_environment(work),
        )
        if process.returncode:
            raise ExportMismatch(f"{folder} does not load in a clean process:\n{process.stderr[-2000:]}")
        found = load_file(work / "output.safetensors")
    largest, same = difference(found["output"], expected["output"])
    if not same:
        raise ExportMismatch(
            f"{folder} reloads, but its output differs by {largest:.3g} from the network that was exported"
        )
    for name in expected.keys() - {"output"}:
        if not torch.equal(found[name], expected[name]):
            raise ExportMismatch(f"{folder} reloads, but its {name} are not those of the network that was exported")
    return largest


def clean_environment(work: Path) -> dict[str, str]:
    """This process's environment, without what would make the project importable, and with a cache of its own."""
    kept = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "LOCAL_RANK", "RANK", "WORLD_SIZE")
    }
    return kept | {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
