"""Repositories on the Hugging Face hub: those that are to be had, and those that were downloaded before."""

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from datamodules.readers.base import MissingData


def hub_files(path: str) -> list[str] | None:
    """The names of the files of a model; None where the hub cannot be asked or has no such model.

    Says so in seconds, where a download would try for half a minute.
    """
    try:
        return [file.rfilename for file in HfApi().model_info(path, timeout=5).siblings or ()]
    except Exception:
        return None


def hub_folder(path: str, endings: Collection[str], names: list[str] | None) -> Path:
    """The local copy of a model's files with these endings that lie beside each other at its top.

    `names` are those of `hub_files`; with None it is the copy in the cache. Raises what huggingface_hub raises.
    """
    wanted = [name for name in names or () if "/" not in name and name.endswith(tuple(endings))]
    return Path(snapshot_download(path, allow_patterns=wanted, local_files_only=names is None))


@contextlib.contextmanager
def or_missing(field: str, path: str) -> Iterator[None]:
    """Raise MissingData, saying what to do, for whatever fails inside while a model is looked for on the hub."""
    try:
        yield
    except Exception as error:
        raise MissingData(
            f"{field}={path!r} is not a folder here, and could not be downloaded ({type(error).__name__}); "
            f"where there is a network, run `hf download {path} --local-dir FOLDER`, then set {field} to FOLDER"
        ) from error
