"""The benchmark of loading, on a tiny network: both ways give the same weights, and every way has a row."""

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from support.networks import CROSS, same_tensors

from experiments.benchmarks.loading import __main__ as loading
from lightning_modules.backbones.diffusion.restage import restage
from lightning_modules.backbones.diffusion.unet import UNetBackbone
from lightning_modules.backbones.loading import load_network

CONFIG: dict[str, Any] = CROSS | {"layers_per_block": 2, "cross_attention_dim": 6}


@pytest.fixture
def teacher() -> UNetBackbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNetBackbone(UNet2DConditionModel(**CONFIG).eval(), DDPMScheduler())


def test_both_ways_give_the_same_weights(teacher: UNetBackbone, tmp_path: Path) -> None:
    teacher.save(tmp_path)
    now = load_network(tmp_path)
    assert same_tensors(dict(loading.load_as_before(tmp_path).state_dict()), dict(now.state_dict()))
    students = loading.build_as_before(teacher), restage(teacher.network, loading.VARIANT)
    assert same_tensors(dict(students[0].state_dict()), dict(students[1].state_dict()))


def test_weights_that_are_not_finite_are_found_as_before(teacher: UNetBackbone, tmp_path: Path) -> None:
    teacher.network.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    teacher.save(tmp_path)
    for load in (loading.load_as_before, load_network):
        with pytest.raises(ValueError, match="not finite"):
            load(tmp_path)


def test_the_benchmark_has_a_row_for_every_way(tmp_path: Path, monkeypatch: Any) -> None:
    def build(name: str, latents: int | None) -> UNetBackbone:
        with torch.device("meta"):
            return UNetBackbone(UNet2DConditionModel(**CONFIG), DDPMScheduler())

    monkeypatch.setattr(loading, "build_on_meta", build)
    monkeypatch.setattr(loading, "measure_in_process", loading.measure)
    monkeypatch.setattr(sys, "argv", ["loading", "--architecture", "tiny", "--repeats", "1", "--out", str(tmp_path)])
    loading.main()
    table = pd.read_csv(tmp_path / "results_tiny.csv")
    assert list(table["what"]) == ["teacher"] * 2 + ["student"] * 2
    assert list(table["way"]) == ["before", "now"] * 2
    assert (table["seconds"] >= 0).all() and table["machine"].str.contains("torch").all()
