"""Configurations with a file of a user's own, outside the repository."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from conf import checks, schema

GLOBAL = "# @package _global_\n"


def composed(*overrides: str, folder: Path | None = None) -> DictConfig:
    """The configuration of some overrides, unchecked; `folder` holds configuration files of a user's own."""
    schema.register()
    with initialize_config_module("conf", version_base="1.3"):
        return compose("train", [*([f"hydra.searchpath=['file://{folder}']"] if folder else []), *overrides])


@pytest.fixture
def configure_with(tmp_path: Path) -> Callable[..., DictConfig]:
    """configure_with(file, text, *overrides): checked, with one YAML file more, outside the repository."""

    def make(name: str, text: str, *overrides: str) -> DictConfig:
        path = tmp_path / "my configs" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        cfg = composed(*overrides, folder=tmp_path / "my configs")
        checks.check_config(cfg)
        return cfg

    return make


def recipe(text: str) -> tuple[str, str]:
    """File and text of an experiment of a user's own."""
    return "experiment/mine.yaml", f"{GLOBAL}{text}\n"
