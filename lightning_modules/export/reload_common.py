"""Shared by the programs that open an export in a process without the exporting project.

They are run as scripts: python reload_<library>.py FOLDER INPUTS OUTPUT THREADS [further arguments]
"""

import sys
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

PROJECT = ("conf", "criteria", "datamodules", "experiments", "lightning_modules", "train")


class PackagesAreAbsent:
    """Makes every import of some packages fail, as on a machine without them."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"{name} must not be needed to open an export")


def read_command(framework: str = "pt", absent: tuple[str, ...] = ()) -> tuple[str, dict[str, Any], int, list[str]]:
    """Return the export's folder, the arguments of its network, a number of threads, and the further arguments.

    Args:
        framework: what the arguments are: tensors of torch (pt) or arrays of NumPy (np).
        absent: packages, beside the exporting project, that the program must not import.
    """
    sys.meta_path.insert(0, PackagesAreAbsent((*PROJECT, *absent)))
    folder, inputs, _, threads, *further = sys.argv[1:]
    arguments: dict[str, Any] = {}
    with safe_open(inputs, framework) as file:
        for path in file.keys():  # noqa: SIM118  the file is no dictionary
            *parents, name = path.split("/")
            inner = arguments
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[name] = file.get_tensor(path)
    return folder, arguments, int(threads), further


def write_outputs(outputs: dict[str, Any]) -> None:
    """Write the outputs of the export, tensors on the CPU or arrays, to the file that the command line names."""
    save_file({name: np.ascontiguousarray(value) for name, value in outputs.items()}, sys.argv[3])
