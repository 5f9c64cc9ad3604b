"""Fixtures of tiny jobs: with samples, and without what takes long. A test file has them by `pytest_plugins`."""

from pathlib import Path

import pytest

CHANNELS = '''
import numpy as np


class Channels:
    """Mean and deviation of each channel: features for images of any size."""

    name, dimension, transform = "frechet_channels", 6, "none"

    def check(self, shape) -> None:
        pass

    def fingerprint(self) -> str:
        return "channels, version 1"

    def __call__(self, images: np.ndarray, device) -> np.ndarray:
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
