"""Tiny jobs that also draw samples, and what they leave behind."""

from pathlib import Path
from typing import Any

import pytest
import torch

CHANNELS = '''
import numpy as np


class Channels:
    """Mean and deviation of each channel: features for images of any size."""

    name, dimension, transform = "frechet_channels", 6, "none"

    def fingerprint(self) -> str:
        return "channels, version 1"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        flat = images.reshape(len(images), -1, images.shape[-1]).astype(np.float64)
        return np.concatenate([flat.mean(1), flat.std(1)], axis=1)
'''


@pytest.fixture
def sampling(overrides: list[str], data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`overrides` with an evaluation that draws samples; its features are a class outside the repository."""
    for name, content in {
        "evaluation/channels.yaml": "name: channels\nmetric: {_target_: channels.Channels}\n",
        "python/channels.py": CHANNELS,
    }.items():
        (data_folder / name).parent.mkdir(exist_ok=True)
        (data_folder / name).write_text(content)
    monkeypatch.syspath_prepend(data_folder / "python")
    monkeypatch.setenv("PYTHONPATH", str(data_folder / "python"))
    kept = [override for override in overrides if not override.startswith("evaluation=")]
    return [*kept, "evaluation=channels", "evaluation.samples=8"]


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the reload of the export in a process of its own, which takes most of a tiny job's time."""
    monkeypatch.setattr("experiments.pipeline.verify", lambda student, folder: 0.0)


@pytest.fixture
def quick_end(unverified: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures as well."""
    monkeypatch.setattr("experiments.pipeline.report_run", lambda folder: "summary")


def the_run(runs: Path) -> Path:
    """The folder of the only run below `runs`."""
    (folder,) = (path for path in (runs / "debug").iterdir() if path.is_dir())
    return folder


def files(folder: Path) -> set[str]:
    """The paths of all files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def leaves(content: Any, prefix: str = "") -> dict[str, Any]:
    """A nested structure as {path: value}."""
    if isinstance(content, dict | list | tuple):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        return {path: leaf for key, value in pairs for path, leaf in leaves(value, f"{prefix}/{key}").items()}
    return {prefix: content}


TRAINED = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "global_step")


def trained_state(checkpoint: Path) -> dict[str, Any]:
    """Weights, their moving average, optimiser and schedule of a checkpoint, as {path: value}."""
    content = torch.load(checkpoint, weights_only=True)
    return leaves({name: content[name] for name in TRAINED if name in content})


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names under which two sets of values are not the same, bit for bit."""

    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y

    return sorted(name for name in a.keys() | b.keys() if name not in a or name not in b or not same(a[name], b[name]))


def results(run: Path) -> dict[str, Any]:
    """All that must not depend on interruptions: scores, plan, metrics, weights, samples and the last checkpoint."""
    kept = {name for name in files(run) if name.endswith((".safetensors", ".npy"))}
    kept |= {"scores.json", "plan.json", "metrics.json"}
    newest = max((run / "checkpoints").iterdir())
    return {name: (run / name).read_bytes() for name in kept} | {"checkpoint": newest.name} | trained_state(newest)
