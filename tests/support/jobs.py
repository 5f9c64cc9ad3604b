"""Fixtures of tiny jobs: with samples, and without what takes long. A test file has them by `pytest_plugins`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support.pipelines import FACTOR, LATENT, tiny_pipeline

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


class Brightness:
    """A measure with nothing of the repository's in it: the mean of all pixels."""

    better = "higher"

    def check(self, shape, captions, labels) -> None:
        pass

    def protocol(self, reference) -> dict:
        return {"unit": "1/255"}

    def __call__(self, samples, reference) -> float:
        return float(samples.images.mean())
'''

EVALUATION = """name: channels
metrics:
  frechet_channels:
    _target_: lightning_modules.metrics.distances.Frechet
    features: {_target_: channels.Channels}
  brightness: {_target_: channels.Brightness}
"""


@pytest.fixture
def sampling(overrides: list[str], data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`overrides` with an evaluation that draws samples, by classes outside the repository."""
    for name, content in {
        "evaluation/channels.yaml": EVALUATION,
        "python/channels.py": CHANNELS,
    }.items():
        (data_folder / name).parent.mkdir(exist_ok=True)
        (data_folder / name).write_text(content)
    monkeypatch.syspath_prepend(data_folder / "python")
    monkeypatch.setenv("PYTHONPATH", str(data_folder / "python"))
    kept = [override for override in overrides if not override.startswith("evaluation=")]
    return [*kept, "evaluation=channels", "evaluation.samples=8"]


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures, 20 pixels high and 16 wide, each with a caption of its own in metadata.jsonl."""
    folder, rng = tmp_path_factory.mktemp("captioned"), np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"cat {i}"}) for i in range(24)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def text_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of the shape of Stable Diffusion 1.x: text encoder, VAE, and a U-Net of four stages."""
    return tiny_pipeline("sd", tmp_path_factory.mktemp("text_teacher"))


@pytest.fixture
def text_job(overrides: list[str], captioned: Path, text_teacher: Path) -> list[str]:
    """`overrides` for a teacher that takes text, and pictures with captions."""
    other = ("data=", "teacher.path=", "selection.tolerance=")
    kept = [override for override in overrides if not override.startswith(other)]
    data = ["data=captioned_folder", f"data.path={captioned}", f"data.size={LATENT * FACTOR}", "data.holdout_images=8"]
    return [*kept, *data, f"teacher.path={text_teacher}"]


def report_no_difference(student: Any, folder: Path) -> float:
    """Stand for the reload of the export in a process of its own, which takes most of a tiny job's time."""
    return 0.0


def report_nothing(folder: Path) -> str:
    """Stand for the pictures and pages of a run."""
    return "summary"


UNVERIFIED = {"experiments.engine.stages.export.verify": report_no_difference}
QUICK_END = UNVERIFIED | {"experiments.engine.pipeline.report_run": report_nothing}
"""{dotted name: what stands there instead in a job that ends sooner}"""


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the reload of the export."""
    for name, function in UNVERIFIED.items():
        monkeypatch.setattr(name, function)


@pytest.fixture
def quick_end(unverified: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the pictures as well."""
    for name, function in QUICK_END.items():
        monkeypatch.setattr(name, function)
