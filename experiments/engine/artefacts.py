"""Files and folders that are complete or absent."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


class UnwritableDirectory(OSError):
    """The folder for runs cannot be made or written to."""


class StaleArtefact(ValueError):
    """A stage's artefact belongs to another teacher, or to other scores."""


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with open(handle, "w") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.write("\n")
    os.chmod(partial, 0o644)
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """Read a JSON file; a damaged one is named."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); delete it to have it made again") from error


def read_array(path: Path) -> np.ndarray:
    """Read an array of a .npy file, mapped into memory; a damaged one is named."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        return array
    except (ValueError, EOFError) as error:  # numpy takes what it does not know for a pickle, and advises to open it
        raise ValueError(
            f"{path} is damaged: it is no .npy file, or ends early; delete {path.parent} to have it made again"
        ) from error


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield partial
        remove(path)
        os.chmod(partial, 0o755)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def digest(content: Any) -> str:
    """sha256 of anything JSON can hold, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_folder(path: Path) -> None:
    """Raises UnwritableDirectory, saying what to choose, where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnwritableDirectory(
            f"{error.filename} cannot be made ({error.strerror}); choose a folder that can, with paths.runs=..."
        ) from error


def remove(path: Path) -> None:
    """Remove a file, a folder, or a symbolic link (never what it points to), where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_fresh(path: Path, what: str, stored: str, wanted: str) -> None:
    """Raise StaleArtefact where a file was made from something else (`what`) than what this run has."""
    if stored != wanted:
        raise StaleArtefact(
            f"{path} belongs to {what} {stored[:16]}, this run has {wanted[:16]}; delete it (what was made from it "
            "goes, too), or run with force=true"
        )
