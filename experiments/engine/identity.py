"""The identity of a run: a hash of the resolved configuration and of the contents of the files that it names."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from conf.environment import recorded_environment
from conf.schema import PACKAGES, ROOT
from datamodules.latents import read_manifest
from datamodules.readers.base import data_root
from datamodules.teacher_outputs import read_outputs_manifest
from experiments.engine.artefacts import digest
from experiments.engine.cache import read_result, write_result

RESULT_VERSION = 2
"""Part of every run's id: it is raised when the same configuration would give another result."""

NO_EFFECT = {
    "": ("name", "label", "force", "logger", "callbacks", "paths", "precompute", "timesteps"),
    "trainer": (
        *("accelerator", "devices", "num_nodes", "strategy", "resume"),
        *("checkpoint_every", "log_every_n_steps", "checkpoint_activations"),
    ),
    "data": ("num_workers", "max_bad_fraction"),
    "teacher": ("get",),
    "calibration": ("memory_gib",),
    "evaluation": ("latency_batch", "latency_repeats"),
    "export": ("push_to_hub",),
}
"""{group: fields} that are no part of a run's identity: they cannot change a result, or (devices) only by rounding.
The modules that draw timesteps contain the choice of the group `timesteps`."""

UNIFORM = {"name": "uniform", "_target_": "lightning_modules.Timesteps"} | dict.fromkeys(
    ("distribution", "weight", "clip")
)
"""the content of timesteps=uniform"""

LATER_FIELDS: dict[str, dict[str, Any]] = {
    "data": {"bos": "auto", "fit": "crop", "pixel_range": None, "box": None, "captions": None},
    "selection": {"budgets": None, "pareto": False},
    "trainer": {"deterministic": True, "compile": False},
    "distillation": {"teacher_outputs": "live", "timesteps": UNIFORM, "drop_text": 0, "teacher": None},
    "pretrain": {"timesteps": UNIFORM},
    "sampler": {"also_steps": []},
    "export": {"onnx": False},
}
"""{group: {field: default}}: fields that configurations did not have at first. At their defaults they are no part of a
run's identity, so that runs from before them keep their ids."""

WORD_KEYS = ("architecture", "classes", "data", "prompts")
"""Keys whose values are labels and texts: they name no file even where there is one of that name."""

FOLDER_FILES = ("*.safetensors", "*.json", "*.txt", "*.yaml", "*.jsonl")
"""Patterns of the files that stand for a folder in a run's identity: weights, their descriptions and texts."""


def make_portable(content: Any) -> Any:
    """Return a configuration in which paths do not depend on where this repository lies, and 4e5 is 400000."""
    if isinstance(content, dict):
        return {key: make_portable(value) for key, value in content.items()}
    if isinstance(content, list):
        return [make_portable(value) for value in content]
    if isinstance(content, float) and content.is_integer():
        return int(content)
    if isinstance(content, str) and (content == str(ROOT) or content.startswith(f"{ROOT}{os.sep}")):
        return f"ROOT{content[len(str(ROOT)) :]}"
    return content


def drop_modules(content: Any) -> Any:
    """Return a configuration in which this project's own classes are named by package and class, without the module.

    Runs and scores that name a class stay valid when it moves to another module of its package.
    """
    if isinstance(content, list):
        return [drop_modules(value) for value in content]
    if not isinstance(content, dict):
        return content
    result = {key: drop_modules(value) for key, value in content.items()}
    package, _, rest = str(result.get("_target_", "")).partition(".")
    if package in PACKAGES:
        result["_target_"] = f"{package}.{rest.rpartition('.')[2]}"
    return result


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a run, from its config.yaml, as plain values.

    Interpolations that it contains stay as they are written: `${oc.env:HF_TOKEN}` in the folder of a run from
    elsewhere must not read this machine's token.
    """
    content: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=False)
    return content


def get_written_settings(cfg: DictConfig) -> Any:
    """Return the resolved configuration, except for values that come from environment variables.

    `${oc.env:HF_TOKEN}`, and every text that refers to it, stays as it was written, so that no secret gets into
    config.yaml, reports and dashboards. Numbers are no secrets, and reports compute with them: they are resolved.
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
        is_number = value is None or isinstance(value, bool | int | float)
        return written if names and not is_number else value

    return resolve(cfg, OmegaConf.to_container(cfg, resolve=False))


def get_effective_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration without what cannot change a result."""
    return drop_settings_without_effect(replace_latents_path(cfg, OmegaConf.to_container(cfg, resolve=True)))


def get_displayed_settings(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration for dashboards: the effective settings without values from environment variables."""
    return drop_settings_without_effect(replace_latents_path(cfg, get_written_settings(cfg)))


def replace_latents_path(cfg: DictConfig, content: Any) -> Any:
    """Return plain values of a configuration in which stored latents are named by their id instead of their path.

    The id of stored outputs of the teacher is there as well, where a distillation reads them.
    """
    if cfg.latents is None:
        return content
    ids = {"latents": read_manifest(cfg.latents)["id"]}
    if reads_teacher_outputs(content):
        ids["teacher_outputs"] = read_outputs_manifest(cfg.latents)["id"]
    return content | ids


def reads_teacher_outputs(content: Mapping[str, Any]) -> bool:
    """Tell whether a distillation reads stored outputs of the teacher, by plain values of a configuration."""
    return any(node.get("teacher_outputs") == "stored" for node in list_distillations(content))


def list_distillations(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of the group `distillation` in a job's settings, and in those of its stages."""
    stages = (content.get("pipeline") or {}).get("stages") or {}
    nodes = [content, *((stage or {}).get("settings") or {} for stage in stages.values())]
    return [node.get("distillation") or {} for node in nodes]


def drop_settings_without_effect(config: Any) -> dict[str, Any]:
    """Return plain values of a configuration without what cannot change a result."""
    content: dict[str, Any] = drop_modules(make_portable(config))
    # Measures that use `images` contain its value; `fits` only decides whether a warning is printed.
    for name in ("images", "every_n_steps", "training_samples", "fits"):
        content["evaluation"].pop(name, None)
    for group, names in NO_EFFECT.items():
        if group == "evaluation" and decides_by_latency(content["selection"] or {}):
            continue  # latencies decide the plan, so their settings have an effect
        for name in names:
            ((content[group] or {}) if group else content).pop(name, None)
    for name in NO_EFFECT["data"]:
        (content["calibration"].get("data") or {}).pop(name, None)
    for parent, group in (*((content, group) for group in LATER_FIELDS), (content["calibration"], "data")):
        if parent.get(group) is not None:
            parent[group] = drop_later_fields(parent[group], LATER_FIELDS[group])
    return drop_idle_repairs(content)


def drop_idle_repairs(content: dict[str, Any]) -> dict[str, Any]:
    """Return plain values of a configuration without stages of repair that repair nothing.

    Runs from before that stage keep their ids. The group `repair` goes as well where it chooses no repair.
    """
    group = content.get("repair") or {}
    stages = (content.get("pipeline") or {}).get("stages") or {}
    idle = [name for name, stage in stages.items() if stage and is_idle_repair(stage, group)]
    if idle:
        kept = {name: stage for name, stage in stages.items() if name not in idle}
        content["pipeline"] = content["pipeline"] | {"stages": kept}
    if "_target_" not in group:
        content.pop("repair", None)
    return content


def is_idle_repair(stage: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Tell whether a stage is this project's Repair and, by its settings and the group `repair`, repairs nothing."""
    settings = (stage.get("settings") or {}).get("repair") or {}
    return stage.get("_target_") == "experiments.Repair" and "_target_" not in {**group, **settings}


def decides_by_latency(selection: Mapping[str, Any]) -> bool:
    """Tell whether measured latencies decide the plan of a selection, given its configuration."""
    return "latency" in (selection.get("budgets") or [selection.get("budget")])


def drop_later_fields(node: dict[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a group without those `later` fields that have their defaults.

    A class from elsewhere keeps its fields: its defaults may be others.
    """
    target = str(node.get("_target_", ""))
    dropped = later if not target or target.partition(".")[0] in PACKAGES else {}
    return {
        key: drop_later_fields(value, later) if isinstance(value, dict) else value
        for key, value in node.items()
        if key not in dropped or value != dropped[key]
    }


def fingerprint(files: list[Path], cache: Path) -> str:
    """Return a sha256 of the names and contents of some files.

    The hash of each file is cached by (path, size, time of the last change), so that weights are not read every time.
    """
    total = hashlib.sha256()
    for file in sorted(files, key=lambda file: (file.name, file)):
        target = file.resolve()
        if target.parent.name == "blobs" and len(target.name) == 64:  # the hub's cache names files by their sha256
            total.update(f"{file.name}:{target.name}\n".encode())
            continue
        stat = file.stat()
        key = [str(file.resolve()), stat.st_size, stat.st_mtime_ns]
        entry = cache / "fingerprints" / f"{digest(key)}.json"
        sha256 = read_result(entry, key)
        if sha256 is None:
            with open(file, "rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            write_result(entry, key, sha256)
        total.update(f"{file.name}:{sha256}\n".encode())
    return total.hexdigest()


def list_named_files(content: Any) -> list[Path]:
    """Return the files that part of a configuration names, also relative to $SECATEUR_DATA.

    Of a folder these are the FOLDER_FILES. Values of WORD_KEYS name no file, nor does the `text` of a measure whose
    data are on the hub, where it is the name of a split.
    """
    if isinstance(content, dict):
        words = (*WORD_KEYS, "text") if content.get("hub") else WORD_KEYS
        content = [part for key, part in content.items() if isinstance(part, dict) or key not in words]
    if isinstance(content, list):
        return [file for part in content for file in list_named_files(part)]
    if not isinstance(content, str) or not content:
        return []
    for path in (Path(os.path.expanduser(content)), data_root() / content, data_root() / "shared" / "text" / content):
        if os.path.isfile(path):  # Path.is_file raises an error for a name that is too long, such as a prompt
            return [path]
        if os.path.isdir(path):
            return sorted(file for pattern in FOLDER_FILES for file in path.rglob(pattern))
    return []
