"""What a run's data are: fingerprints that tell changed data from moved ones."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from conf.schema import build
from datamodules.base import DataModule
from experiments.engine.artefacts import CACHE_SETTING, digest, format_json, make_folder, read_json

DATA_FILE = "data.json"
"""The file of a run that has the fingerprints of its data."""
PATHS = ("path", "classes", "data_files")
"""Fields of a data set's configuration that say where its samples lie."""


class ChangedData(ValueError):
    """The data differ from those that the run was made from."""


def fingerprint_data(cfg: DictConfig, data: DataModule) -> dict[str, str]:
    """Return {"data": hash, "calibration.data": hash} of the content of a job's data sets, where they have one.

    `data` is the data module of `cfg.data`. Data that are not on this machine, and files of texts, which are part of a
    run's id, have none.
    """
    modules = {"data": data}
    if cfg.calibration.data is not None:
        modules["calibration.data"] = build(cfg.calibration.data)
    hashes = {field: module.fingerprint() for field, module in modules.items()}
    return {field: content for field, content in hashes.items() if content is not None}


def with_first_paths(config: dict[str, Any], fingerprints: dict[str, str], cache: Path) -> dict[str, Any]:
    """Return a configuration in which data that were moved have the paths under which they were first seen.

    So a run of moved data is the run that it was. `config` is what `get_effective_settings` returns. The first paths of
    data of one content and one configuration are in `cache`; data of the repository itself keep theirs.
    """
    config = json.loads(json.dumps(config))
    for field, content in fingerprints.items():
        *parents, last = field.split(".")
        parent = config
        for name in parents:
            parent = parent[name]
        paths = dict(paths_in(parent[last]))
        if paths:
            settings = replace_paths(parent[last], dict.fromkeys(paths))
            first = remember(cache / "data" / f"{digest([content, settings])[:32]}.json", paths)
            if not all(str(path).startswith("ROOT") for path in paths.values()):
                parent[last] = replace_paths(parent[last], first)
    return config


def paths_in(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (place in the node, value) of each field of a data set's configuration that says where samples lie."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from paths_in(value, f"{name}{key}.")
        elif key in PATHS and value is not None:
            yield f"{name}{key}", value


def replace_paths(node: dict[str, Any], paths: dict[str, Any], name: str = "") -> dict[str, Any]:
    """Return a data set's configuration with other values of the fields that `paths_in` yields."""
    return {
        key: replace_paths(value, paths, f"{name}{key}.")
        if isinstance(value, dict)
        else paths.get(f"{name}{key}", value)
        for key, value in node.items()
    }


def remember(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return what a JSON file holds; the first process to ask writes `content` into it."""
    if not path.exists():
        make_folder(path.parent, CACHE_SETTING)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            Path(partial).write_text(format_json(content))
            os.link(partial, path)  # fails where another process was first, unlike a replacement
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)
    stored: dict[str, Any] = read_json(path)
    return stored


def check_data_unchanged(folder: Path, fingerprints: dict[str, str], cfg: DictConfig) -> None:
    """Raise ChangedData where a run has fingerprints of its data that differ from these.

    Runs that were made before there were fingerprints, and data that are not on this machine, pass.
    """
    path = folder / DATA_FILE
    stored = read_json(path) if path.exists() else {}
    for field, content in fingerprints.items():
        if field in stored and stored[field] != content:
            name = cfg.data.get("name") if field == "data" else cfg.calibration.data.get("name")
            raise ChangedData(
                f"{field}={name}: the data are not those that {folder} was made from, though the configuration is the "
                "same (names, sizes or contents differ). Restore them; or run with force=true, which replaces "
                "that run; or keep both under another name=... or paths.runs=..."
            )
