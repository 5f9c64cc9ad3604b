"""A tiny teacher, tiny data and tiny jobs: everything the pipeline does, in seconds, without a network."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tiny networks gain nothing from more threads
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from support.networks import TINY

from conf import checks, schema
from lightning_modules.backbones.diffusion.load import load_teacher
from lightning_modules.backbones.diffusion.unet import UNetBackbone

pytest_plugins = ["support.clip", "support.config", "support.jobs", "support.shards"]
"""Fixtures of these modules are there for all tests."""

torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What `-n auto` means: up to four processes for all tests, none beside this one where a test file is named."""
    named = [argument for argument in config.args if argument.partition("::")[0].endswith(".py")]
    return 0 if named else min(4, os.cpu_count() or 1)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny U-Net of random weights, saved as diffusers saves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    UNet2DModel(**TINY).save_pretrained(folder)
    DDPMScheduler().save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(teacher_folder: Path) -> UNetBackbone:
    return load_teacher(str(teacher_folder), DDPMScheduler())


@pytest.fixture(scope="session")
def images_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training and 16 held-out images of 8x8 in one npz."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    images = rng.integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    np.savez(path, x_train=images[:48], x_test=images[48:], y_train=np.arange(48) % 3, y_test=np.arange(16) % 3)
    return path


@pytest.fixture
def data_folder(tmp_path_factory: pytest.TempPathFactory, images_file: Path) -> Path:
    """A configuration directory outside the repository with the data set `tiny`; each test has its own."""
    folder = tmp_path_factory.mktemp("confdir")
    (folder / "data").mkdir()
    (folder / "data" / "tiny.yaml").write_text(
        f"""name: tiny
_target_: datamodules.images.Images
train:
  {{_target_: datamodules.readers.arrays.Npz, _partial_: true, path: "{images_file}", images: x_train, labels: y_train}}
holdout:
  {{_target_: datamodules.readers.arrays.Npz, _partial_: true, path: "{images_file}", images: x_test, labels: y_test}}
batch_size: 4
seed: ${{seed}}
flip: true
"""
    )
    return folder


@pytest.fixture
def overrides(teacher_folder: Path, tmp_path: Path) -> list[str]:
    """A job of a second on the tiny teacher and data, without samples; run directories are below tmp_path/runs."""
    return [
        "debug=tiny",
        "data=tiny",
        "evaluation=none",
        "trainer=cpu",
        f"teacher.path={teacher_folder}",
        f"paths.runs={tmp_path}/runs",
        "data.batch_size=4",
        "selection.tolerance=0.1",
    ]


@pytest.fixture
def configure(data_folder: Path):
    """compose(overrides) -> the configuration train.py would get, checked."""

    def make(*given: str) -> DictConfig:
        schema.register()
        with initialize_config_module("conf", version_base="1.3"):
            cfg = compose("train", [f"hydra.searchpath=[file://{data_folder}]", *given])
        checks.check_config(cfg)
        return cfg

    return make
