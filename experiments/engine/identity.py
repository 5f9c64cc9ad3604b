"""What makes two runs the same: the resolved configuration and the contents of the files that it names."""

import hashlib
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from conf.environment import recorded_environment
from conf.schema import ROOT
from datamodules.latents import read_manifest
from datamodules.readers.base import data_root
from experiments.engine.artefacts import digest
from experiments.engine.cache import read_result, write_result

RESULT_VERSION = 1
"""Goes up when the same configuration would give another result."""

NO_EFFECT = {
    "": ("name", "label", "force", "logger", "callbacks", "paths", "precompute"),
    "trainer": ("accelerator", "devices", "num_nodes", "strategy", "resume", "checkpoint_every", "log_every_n_steps"),
    "data": ("num_workers", "max_bad_fraction"),
    "teacher": ("get",),
    "calibration": ("memory_gib",),
    "evaluation": ("latency_batch", "latency_repeats"),
    "export": ("push_to_hub",),
}
"""What is not part of a run's identity: it cannot change a result, or (devices) only within noise."""

PACKAGES = ("conf", "criteria", "datamodules", "experiments", "lightning_modules")
"""This project's own packages."""

WORDS = ("architecture", "classes", "data", "prompts")
"""Keys whose values are labels and texts, which name no file even where there is one of that name."""


def portable(content: Any) -> Any:
    """A configuration without the place where this repository lies, and with 4e5 and 400000 the same."""
    if isinstance(content, dict):
        return {key: portable(value) for key, value in content.items()}
    if isinstance(content, list):
        return [portable(value) for value in content]
    if isinstance(content, float) and content.is_integer():
        return int(content)
    if isinstance(content, str) and (content == str(ROOT) or content.startswith(f"{ROOT}{os.sep}")):
        return f"ROOT{content[len(str(ROOT)) :]}"
    return content


def without_modules(content: Any) -> Any:
    """A configuration in which this project's own classes are named by package and class, without their modules.

    A class that moves to another module of its package is the same class: runs and scores that name it stay valid.
    """
    if isinstance(content, list):
        return [without_modules(value) for value in content]
    if not isinstance(content, dict):
        return content
    named = {key: without_modules(value) for key, value in content.items()}
    package, _, rest = str(named.get("_target_", "")).partition(".")
    if package in PACKAGES:
        named["_target_"] = f"{package}.{rest.rpartition('.')[2]}"
    return named


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a run, from its config.yaml, as plain values.

    Interpolations stand resolved in it. Any that are left came with a file of somebody else's, and stay as they are
    written: `${oc.env:HF_TOKEN}` in a folder from elsewhere must not read this machine's token.
    """
    content: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=False)
    return content


def as_written(cfg: DictConfig) -> Any:
    """Return the plain values of a configuration in which what comes from the environment stays as it was written.

    `${oc.env:HF_TOKEN}`, and what refers to it, would else stand in config.yaml, reports and dashboards.
    """

    def resolve(node: Any, written: Any) -> Any:
        parts = written.items() if isinstance(written, dict) else enumerate(written)
        content = {key: resolve_part(node, key, part) for key, part in parts}
        return content if isinstance(written, dict) else list(content.values())

    def resolve_part(node: Any, key: Any, written: Any) -> Any:
        if isinstance(written, dict | list):
            return resolve(node[key], written)
        if not isinstance(written, str) or "${" not in written:
            return written
        with recorded_environment() as names:
            value = node[key]
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        return written if names else value

    return resolve(cfg, OmegaConf.to_container(cfg, resolve=False))


def effective(cfg: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration without what cannot change a result."""
    return without_no_effect(with_latents_id(cfg, OmegaConf.to_container(cfg, resolve=True)))


def displayed(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration for dashboards: as `effective`, with nothing of the environment in it."""
    return without_no_effect(with_latents_id(cfg, as_written(cfg)))


def with_latents_id(cfg: DictConfig, content: Any) -> Any:
    """Return plain values of a configuration in which stored latents are named by what they are, not where."""
    return content if cfg.latents is None else content | {"latents": read_manifest(cfg.latents)["id"]}


def without_no_effect(config: Any) -> dict[str, Any]:
    """Plain values of a configuration without what cannot change a result."""
    content: dict[str, Any] = without_modules(portable(config))
    content["evaluation"].pop("images", None)  # it stands in the measures that it has an effect on
    for group, names in NO_EFFECT.items():
        if group == "evaluation" and (content["selection"] or {}).get("budget") == "latency":
            continue  # what is measured decides the plan
        for name in names:
            ((content[group] or {}) if group else content).pop(name, None)
    for name in NO_EFFECT["data"]:
        (content["calibration"].get("data") or {}).pop(name, None)
    return content


def fingerprint(files: list[Path], cache: Path) -> str:
    """sha256 over the contents of some files; each file's own is remembered by (path, size, mtime)."""
    total = hashlib.sha256()
    for file in sorted(files, key=lambda file: (file.name, file)):
        target = file.resolve()
        if target.parent.name == "blobs" and len(target.name) == 64:  # the hub's cache names files by their sha256
            total.update(f"{file.name}:{target.name}\n".encode())
            continue
        stat = file.stat()
        key = [str(file.resolve()), stat.st_size, stat.st_mtime_ns]
        note = cache / "fingerprints" / f"{digest(key)}.json"
        sha256 = read_result(note, key)
        if sha256 is None:
            with open(file, "rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            write_result(note, key, sha256)
        total.update(f"{file.name}:{sha256}\n".encode())
    return total.hexdigest()


def named_files(content: Any) -> list[Path]:
    """The files that part of a configuration names, also below $SECATEUR_DATA; of folders weights, notes and texts.

    WORDS name none, nor does the `text` of a measure whose data are on the hub: it is a split of them.
    """
    if isinstance(content, dict):
        words = (*WORDS, "text") if content.get("hub") else WORDS
        content = [part for key, part in content.items() if isinstance(part, dict) or key not in words]
    if isinstance(content, list):
        return [file for part in content for file in named_files(part)]
    if not isinstance(content, str) or not content:
        return []
    for place in (Path(os.path.expanduser(content)), data_root() / content, data_root() / "shared" / "text" / content):
        if os.path.isfile(place):  # a Path says no of a name that is too long, such as a prompt's, by an error
            return [place]
        if os.path.isdir(place):
            endings = ("*.safetensors", "*.json", "*.txt", "*.yaml", "*.jsonl")
            return sorted(file for ending in endings for file in place.rglob(ending))
    return []
