"""Files and folders that are complete or absent, and the hashes by which a later process sees whether they changed."""

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

from lightning_modules.disk import explain_full_disk

TEMPORARY = "?" * 8
"""The random ending of a temporary file or folder, as a pattern: tempfile makes endings of eight characters."""


class UnwritableDirectory(OSError):
    """A folder for runs, or for what they share, cannot be made or written to."""


class StaleArtefact(ValueError):
    """A stage's artefact belongs to another teacher, or to other scores."""


def format_json(content: Any) -> str:
    """Return the text of a JSON file; raises ValueError for numbers that are not finite."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is complete or absent."""
    write_text(path, format_json(content))


def write_text(path: Path, text: str) -> None:
    """Write a text file that is complete or absent; raises DiskFull."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(path):
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(partial, 0o644)
        except OSError:
            os.unlink(partial)
            raise
        os.replace(partial, path)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raises ValueError naming one that is damaged."""
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
def write_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error; raises DiskFull."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with explain_full_disk(path):
        partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield partial
            remove(path)
            os.chmod(partial, 0o755)
            os.replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def list_partials(path: Path) -> list[Path]:
    """Return the temporary files and folders of processes that were killed while they wrote `path`."""
    return sorted(path.parent.glob(f".{path.name}.{TEMPORARY}"))


def digest(content: Any) -> str:
    """Return the sha256 of anything JSON can hold, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def hash_files(path: Path) -> dict[str, str]:
    """Return {path below the folder: sha256} of all files of a folder; of a single file, its name is empty."""
    if path.is_file():
        return {"": hashlib.sha256(path.read_bytes()).hexdigest()}
    hashes = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            with open(file, "rb") as stream:
                hashes[file.relative_to(path).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def find_changed_files(path: Path, hashes: dict[str, str]) -> list[str]:
    """Return the files of `hashes` (as hash_files made them) that have another content by now, or are gone."""
    present = hash_files(path)
    return [name for name, sha256 in hashes.items() if present.get(name) != sha256]


RUNS_SETTING = "paths.runs=..."
CACHE_SETTING = "paths.cache=... (by default it lies in paths.runs)"
"""Which settings choose another folder, as messages say it."""


def make_folder(path: Path, setting: str = RUNS_SETTING) -> None:
    """Make a folder; raises UnwritableDirectory, naming the setting that chooses another one, where that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnwritableDirectory(
            f"{error.filename} cannot be made ({error.strerror}); choose a folder that can, with {setting}"
        ) from error
    if not os.access(path, os.W_OK):
        raise UnwritableDirectory(f"{path} cannot be written to; choose another folder with {setting}")


def remove(path: Path) -> None:
    """Remove a file, a folder, or a symbolic link (never what it points to), where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_fresh(path: Path, origin: str, stored: str, wanted: str) -> None:
    """Raise StaleArtefact where the id of a file's origin ("teacher", "scores") is another one than this run's.

    Args:
        path: the file.
        origin: the name of what the file was made from.
        stored: the id of that in the file.
        wanted: its id in this run.
    """
    if stored == wanted:
        return
    length = next((length for length in SHOWN_LENGTHS if stored[:length] != wanted[:length]), None)
    raise StaleArtefact(
        f"{path} belongs to {origin} {stored[:length]}, this run has {wanted[:length]}; delete it (what was made "
        "from it goes, too), or run with force=true"
    )


SHOWN_LENGTHS = (16, 64)
"""How many characters of two ids a message shows: the first of these numbers at which the ids differ."""
