"""Shared by the programs that open an export in a process without the exporting project.

They are run as scripts: python reload_<library>.py FOLDER INPUTS OUTPUT THREADS [further arguments]
"""

import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PROJECT = ("conf", "criteria", "datamodules", "experiments", "lightning_modules", "train")


class ProjectIsAbsent:
    """Makes every import of the exporting project fail, as on a machine without it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in PROJECT:
            raise ModuleNotFoundError(f"{name} belongs to the exporting project")


def read_command() -> tuple[str, dict[str, Any], list[str]]:
    """Return the export's folder, the arguments of its network, and the further arguments of the command line."""
    sys.meta_path.insert(0, ProjectIsAbsent())
    folder, inputs, _, threads, *further = sys.argv[1:]
    torch.set_num_threads(int(threads))
    arguments: dict[str, Any] = {}
    for path, value in load_file(inputs).items():
        *parents, name = path.split("/")
        inner = arguments
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return folder, arguments, further


def write_outputs(outputs: dict[str, torch.Tensor]) -> None:
    """Write the outputs of the export to the file that the command line names."""
    save_file({name: value.contiguous() for name, value in outputs.items()}, sys.argv[3])
