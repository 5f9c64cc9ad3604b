"""The benchmark of distillation, on networks of a few channels."""

import sys

import pandas as pd
import pytest
import torch

from experiments.benchmarks.distillation import __main__ as benchmark
from experiments.benchmarks.distillation import job
from experiments.benchmarks.distillation.recipe import recipe
from lightning_modules.modules.taps import pair_taps

TINY = {"block_out_channels": (8, 8, 8, 8), "attention_head_dim": 2, "cross_attention_dim": 8, "norm_num_groups": 4}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "SMALL", TINY)


def test_the_recipe_takes_a_step_on_the_sum_of_its_terms():
    student, teacher = benchmark.build_networks("small", 8, CPU)
    before = {name: weight.clone() for name, weight in teacher.network.named_parameters()}
    first = {name: weight.clone() for name, weight in student.network.named_parameters()}
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    pairs = pair_taps(student, teacher, "stages", skip_emptied=False)
    assert len(pairs) == 9
    with recipe(student.network, teacher.network, pairs) as trained:
        assert all(module.gradient_checkpointing for module in student.network.down_blocks)
        loss = trained.step(latents, text)
    assert torch.isfinite(loss) and loss > 0
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.network.named_parameters())
    assert all(not torch.equal(weight, first[name]) for name, weight in student.network.named_parameters())
    average = dict(trained.average.named_parameters())
    for name, weight in student.network.named_parameters():
        torch.testing.assert_close(average[name], first[name] + 1e-4 * (weight - first[name]), rtol=0, atol=1e-7)
    assert not any(module._forward_hooks for module in student.network.modules())


@pytest.mark.slow
def test_the_benchmark_writes_a_row_per_training(tmp_path, monkeypatch, capsys):
    words = ["--latents", "8", "--batch", "1", "--steps", "1", "--warmup", "1", "--encoders", "--out", str(tmp_path)]
    rows = ["eager", "eager, activations of blocks recomputed", "compiled"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *words, "--device", "cpu", "--rows", *rows])
    benchmark.main()
    table = pd.read_csv(tmp_path / "results_small.csv")
    assert list(table["training"]) == ["recipe", "recipe with encoders", *rows]
    assert (table["images/s"] > 0).all() and table["ratio"][0] == 1
    assert table["peak GiB"].isna().all()  # of a GPU
    kernels = [f"{family}, ms" for family in (*benchmark.FAMILIES, "other")]
    assert (table[kernels].sum(axis=1) > 0).all()
    assert "matrix product: " in capsys.readouterr().out


def test_the_parts_of_a_training_add_up(overrides, data_folder, tmp_path, monkeypatch):
    seconds = job.measure([f"hydra.searchpath=[file://{data_folder}]", *overrides], 3)
    parts = {"forward pass of the teacher", "forward pass of the student", "backward pass", job.BESIDE}
    assert seconds.keys() == parts and all(value > 0 for value in seconds.values())
