"""The benchmark of loading, on tiny networks: both ways give the same weights, peaks are those of what is measured."""

import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from support.networks import CROSS, same_tensors

from experiments.benchmarks.loading import __main__ as loading
from lightning_modules.backbones.diffusion.restage import restage
from lightning_modules.backbones.diffusion.unet import UNetBackbone
from lightning_modules.backbones.loading import load_network
from lightning_modules.metrics.cost import describe_machine

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


@pytest.mark.slow
def test_the_peak_is_that_of_the_process_which_loads(tmp_path: Path) -> None:
    large = UNet2DConditionModel(**CONFIG | {"block_out_channels": (64, 256)})
    large.half().save_pretrained(tmp_path)
    block = torch.ones(2**26)  # this process holds far more than the one that it starts ever does
    measured = loading.measure_in_process("teacher", "now", tmp_path)
    assert block.nbytes > sum(parameter.nbytes for parameter in large.parameters())
    assert measured["weights_gib"] == sum(parameter.numel() for parameter in large.parameters()) * 4 / 2**30
    assert measured["peak_gib"] > measured["weights_gib"] / 2 and measured["seconds"] > 0


def test_the_peak_of_a_student_is_not_hidden_by_that_of_loading_its_teacher(
    teacher: UNetBackbone, tmp_path: Path, monkeypatch: Any
) -> None:
    def hold(size: int, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            block = np.ones(size // 8)
            result = function(*arguments)
            del block
            return result

        return call

    teacher.save(tmp_path)
    monkeypatch.setattr(loading, "load_network", hold(2**28, load_network))
    monkeypatch.setattr(loading, "restage", hold(2**27, restage))
    assert loading.measure("student", "now", tmp_path)["peak_gib"] == pytest.approx(2**27 / 2**30, rel=0.1)


def test_the_benchmark_has_a_row_for_every_way(tmp_path: Path, monkeypatch: Any) -> None:
    def build(name: str, latents: int | None) -> UNetBackbone:
        with torch.device("meta"):
            return UNetBackbone(UNet2DConditionModel(**CONFIG), DDPMScheduler())

    seconds = {"before": iter([8.0, 1.0, 6.0] * 2), "now": iter([3.0, 2.0, 9.0] * 2)}

    def measure(what: str, way: str, folder: Path) -> dict[str, float]:
        return loading.measure(what, way, folder) | {"seconds": next(seconds[way]), "peak_gib": 0.5}

    monkeypatch.setattr(loading, "build_on_meta", build)
    monkeypatch.setattr(loading, "measure_in_process", measure)
    monkeypatch.setattr(sys, "argv", ["loading", "--architecture", "tiny", "--out", str(tmp_path)])
    loading.main()
    table = pd.read_csv(tmp_path / "results_tiny.csv")
    assert list(table.columns) == [*loading.COLUMNS, "machine"]
    assert list(table["what"]) == ["teacher"] * 2 + ["student"] * 2
    assert list(table["way"]) == ["before", "now"] * 2
    assert list(table["seconds"]) == [6, 3] * 2 and list(table["time_ratio"]) == [1, 2] * 2
    assert list(table["peak_gib"]) == [0.5] * 4
    network = build("tiny", None)
    student = restage(network.network, loading.VARIANT)
    sizes = [sum(parameter.nbytes for parameter in made.parameters()) / 2**30 for made in (network.network, student)]
    assert list(table["weights_gib"]) == [round(size, 3) for size in sizes for _ in range(2)]
    assert set(table["machine"]) == {f"{describe_machine(torch.device('cpu'))}, diffusers {diffusers.__version__}"}
