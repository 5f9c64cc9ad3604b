"""The benchmark of distillation, on networks of a few channels."""

import sys
import time
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from experiments.benchmarks.distillation import __main__ as benchmark
from experiments.benchmarks.distillation import job
from experiments.benchmarks.distillation.recipe import recipe
from lightning_modules.modules.base import can_be_fused
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
    rows = ["eager", "eager, activations of blocks recomputed"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *words, "--device", "cpu", "--rows", *rows])
    benchmark.main()
    table = pd.read_csv(tmp_path / "results_small.csv")
    assert list(table["training"]) == ["recipe", "recipe with encoders", *rows]
    assert (table["samples/s"] > 0).all() and table["ratio"][0] == 1
    assert table["peak GiB"].isna().all()  # of a GPU
    kernels = [f"{family}, ms" for family in (*benchmark.FAMILIES, "other")]
    assert (table[kernels].sum(axis=1) > 0).all()
    assert "matrix product: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kernel", "family"),
    [
        ("triton_poi_fused__to_copy_convolution_0", "compiled by Triton"),
        ("triton_red_fused_native_group_norm_3", "compiled by Triton"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix product"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix product"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>", "copy, conversion"),
        ("sm80_xmma_fprop_implicit_gemm_bf16", "convolution"),
        ("aten::mkldnn_convolution", "convolution"),
        ("pytorch_flash::flash_fwd_kernel", "attention"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel", "optimiser, average, norms of gradients"),
        ("aten::native_layer_norm", "norm"),
        ("aten::silu", "other"),
    ],
)
def test_kernels_are_counted_in_their_family(kernel, family):
    assert benchmark.find_family(kernel) == family


def test_the_optimizer_of_the_benchmark_is_fused_as_that_of_a_job(monkeypatch, tmp_path):
    made: list[Any] = []
    monkeypatch.setattr(benchmark, "fit", lambda module, *_, **__: made.append(module.make_optimizer))
    student, teacher = benchmark.build_networks("small", 8, CPU)
    options = SimpleNamespace(warmup=1, steps=1, device="cpu", out=tmp_path)
    benchmark.train_project(student, teacher, {}, {}, options)
    assert can_be_fused(made[0], [SimpleNamespace(is_cuda=True)], "bf16-mixed")


@pytest.mark.slow
def test_the_parts_of_a_training_add_up(overrides, data_folder, tmp_path, monkeypatch):
    start = time.perf_counter()
    seconds = job.measure([f"hydra.searchpath=[file://{data_folder}]", *overrides], 3)
    assert sum(seconds.values()) < time.perf_counter() - start
    parts = {"forward pass of the teacher", "forward pass of the student", "backward pass", job.BESIDE}
    assert seconds.keys() == parts and all(value > 0 for value in seconds.values())
