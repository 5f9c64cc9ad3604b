"""Checking that an export loads, and computes the same, in a process that has only the network's own library."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conf.nested import flatten_dict
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.diffusion.pipeline_parts import move

TOLERANCE = 1e-5
"""The largest difference allowed between outputs of the same weights, as a share of the largest absolute value"""


class ExportMismatch(RuntimeError):
    """Raised where an export does not load, or does not compute what the network in memory does."""


def compare_outputs(output: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> tuple[float, bool]:
    """Return the largest difference between two outputs, and whether it is within a share of the largest value."""
    largest = float((output - expected).abs().max())
    return largest, largest <= tolerance * float(expected.abs().max())


def verify(student: NetworkBackbone, folder: Path) -> float:
    """Load an export in a process that cannot import this project, and return the largest difference of its output.

    Raises ExportMismatch where it does not load, or where its output differs by more than TOLERANCE.
    """
    student.network.to("cpu")
    arguments = move(student.random_arguments(), "cpu")
    expected = student.expected_outputs(arguments)
    outputs = run_in_clean_process(student.library, folder, arguments, student.reload_arguments())
    largest, same = compare_outputs(outputs["output"], expected["output"])
    if not same:
        raise ExportMismatch(
            f"{folder} reloads, but its output differs by {largest:.3g} from the network that was exported"
        )
    for name in expected.keys() - {"output"}:
        if not torch.equal(outputs[name], expected[name]):
            raise ExportMismatch(f"{folder} reloads, but its {name} differ from those of the network that was exported")
    return largest


def run_in_clean_process(
    library: str, folder: Path, arguments: dict[str, Any], further: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Return what the program reload_<library>.py computes from an export, in a process without this project.

    Raises ExportMismatch where the program fails.

    Args:
        library: the program's name; it is the only library that the program opens the export with.
        folder: the export.
        arguments: tensors on the CPU, in dictionaries of any depth.
        further: further arguments of the program.
    """
    program = Path(__file__).parent / f"reload_{library}.py"
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        inputs = {path: value.contiguous() for path, value in flatten_dict(arguments, "/").items()}
        save_file(inputs, work / "inputs.safetensors")
        files = [folder.resolve(), work / "inputs.safetensors", work / "output.safetensors"]
        process = subprocess.run(
            [sys.executable, str(program), *map(str, [*files, torch.get_num_threads(), *further])],
            cwd=work,
            capture_output=True,
            text=True,
            env=make_clean_environment(work),
        )
        if process.returncode:
            raise ExportMismatch(f"{folder} does not load in a clean process:\n{process.stderr[-2000:]}")
        return load_file(work / "output.safetensors")


def make_clean_environment(work: Path) -> dict[str, str]:
    """Return this process's environment without variables that make the project importable, and with its own cache."""
    kept = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "LOCAL_RANK", "RANK", "WORLD_SIZE")
    }
    return kept | {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
