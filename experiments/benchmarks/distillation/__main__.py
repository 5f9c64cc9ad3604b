"""Measures how fast a student is distilled: this project's training beside BK-SDM's recipe, on one batch.

    python -m experiments.benchmarks.distillation                                   # a small shape, any machine
    python -m experiments.benchmarks.distillation --shape sd15 --batch 64           # needs a GPU
    python -m experiments.benchmarks.distillation --shape sdxl_base --batch 8

Weights, latents and text states are random, since time and memory do not depend on them. Each row is a training of
its own in this process; the first steps, in which functions are compiled, are not timed. `ratio` is the rate of a row
over that of the recipe. `MFU` counts the products of the teacher's forward pass and of the student's forward and
backward passes, without what is computed a second time, against the rate of one large matrix product in bfloat16.
"""

import argparse
import csv
import functools
import gc
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# As train.py does: without it, deterministic rows would not be what a job computes.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytorch_lightning as pl
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from conf import schema
from conf.schema import ROOT
from experiments.benchmarks.distillation.recipe import make_encoders, recipe
from experiments.benchmarks.result_speed.__main__ import build_on_meta, fill_with_weights, make_plans
from lightning_modules.backbones.diffusion.unet import UNetBackbone
from lightning_modules.metrics.cost import describe_machine, peak_memory, reset_peak_memory
from lightning_modules.modules.distillation import Distillation
from lightning_modules.modules.taps import pair_taps
from lightning_modules.training.ema import WarmedUpEMA
from lightning_modules.training.trainer import fit, resolve_accelerator

SMALL = {
    "block_out_channels": (32, 64, 64, 64),
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
"""Changes of Stable Diffusion 1.5's configuration for a trial on a CPU."""

PLANS = {"small": "bk_sdm base", "sd15": "bk_sdm base", "sdxl_base": "bypass 0.5, fewest MACs saved"}
"""{shape: the student}"""

ROWS: dict[str, dict[str, Any]] = {
    "eager, deterministic": {"deterministic": True},
    "eager": {"deterministic": False},
    "eager, activations of blocks recomputed": {"deterministic": False, "checkpoint_activations": "blocks"},
    "compiled, deterministic": {"deterministic": True, "compile": True},
    "compiled": {"deterministic": False, "compile": True},
    "compiled, activations of blocks recomputed": {
        "deterministic": False,
        "compile": True,
        "checkpoint_activations": "blocks",
    },
}
"""{row: fields of `trainer`}"""

FAMILIES = {
    "compiled by Triton": "triton",
    "copy, conversion": "memcpy|memset|copy|convert|nchwtonhwc|nhwctonchw",
    "attention": "flash|fmha|scaled_dot|attention",
    "convolution": "conv|wgrad|dgrad|fprop|winograd",
    "matrix product": "gemm|nvjet|cutlass|::mm|::addmm|::bmm|matmul|linear",
    "optimiser, average, norms of gradients": "multi_tensor|foreach|adam|lpnorm",
    "norm": "norm",
}
"""{family of kernels: pattern of their names in lower case}; the first that matches counts"""


def build_networks(shape: str, latents: int | None, device: torch.device) -> tuple[UNetBackbone, UNetBackbone]:
    """Return a student and its teacher with random weights in float32."""
    if shape == "small":
        config = json.loads((ROOT / "assets" / "architectures" / "sd15.json").read_text()) | SMALL
        with torch.device("meta"):
            network: Any = UNet2DConditionModel.from_config(config)
        meta = UNetBackbone(network, DDPMScheduler(), sample_size=latents or 16)
    else:
        meta = build_on_meta(shape, latents)
    changes = dict(make_plans(meta, [0.5]))[PLANS[shape]]
    student = meta.pruned(changes)
    for backbone in (student, meta):
        fill_with_weights(backbone.network, device, torch.float32)
    return student, meta


class OneBatch(pl.LightningDataModule):
    """Yields one batch again and again."""

    def __init__(self, batch: dict[str, Any], count: int) -> None:
        super().__init__()
        self.batches = [batch] * count

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


class StepTimer(Callback):
    """Measures the seconds per step after a warm-up, and profiles one step more.

    Args:
        warmup: number of steps that are not timed.
        steps: number of timed steps.
    """

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup, self.steps = warmup, steps
        self.seconds = 0.0
        self.kernels: dict[str, float] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if index == self.warmup:
            synchronize(module.device)
            self.start = time.perf_counter()
        if index == self.warmup + self.steps:
            synchronize(module.device)
            self.seconds = (time.perf_counter() - self.start) / self.steps
            self.profiler = profile(activities=[get_activity(module.device)])
            self.profiler.start()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *arguments: Any) -> None:
        if arguments[-1] == self.warmup + self.steps:
            synchronize(module.device)
            self.profiler.stop()
            self.kernels = sum_kernels(self.profiler, module.device)


def get_activity(device: torch.device) -> ProfilerActivity:
    """Return what is profiled: kernels on a GPU, operators on a CPU."""
    return ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sum_kernels(profiler: profile, device: torch.device) -> dict[str, float]:
    """Return {family of kernels: milliseconds}, with `other` for names that fit no pattern of FAMILIES."""
    totals = dict.fromkeys([*FAMILIES, "other"], 0.0)
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        totals[find_family(event.key)] += microseconds / 1000
    return totals


def find_family(kernel: str) -> str:
    """Return the family of a kernel or operator by its name."""
    return next((family for family, pattern in FAMILIES.items() if re.search(pattern, kernel.lower())), "other")


def train_recipe(
    student: UNetBackbone, teacher: UNetBackbone, batch: dict[str, Any], options: argparse.Namespace, encoders: Any
) -> tuple[float, dict[str, float]]:
    """Return the seconds per step of the recipe, and {family of kernels: milliseconds} of one step."""
    device = next(student.parameters()).device
    latents = batch["image"].to(device)
    text, pairs = batch["conditions"]["encoder_hidden_states"].to(device), pair_taps(student, teacher, "stages", False)
    more = {key: value.to(device) for key, value in batch["conditions"].get("added_cond_kwargs", {}).items()}
    for network in (student.network, teacher.network):
        if more:
            network.forward = add_conditions(network.forward, more)
    try:
        with recipe(student.network, teacher.network, pairs, encoders) as trained:
            for _ in range(options.warmup):
                trained.step(latents, text)
            while trained.skipped:  # the scale of the gradients is still too large
                trained.step(latents, text)
            synchronize(device)
            start = time.perf_counter()
            for _ in range(options.steps):
                trained.step(latents, text)
            synchronize(device)
            seconds = (time.perf_counter() - start) / options.steps
            with profile(activities=[get_activity(device)]) as profiler:
                trained.step(latents, text)
                synchronize(device)
    finally:
        for network in (student.network, teacher.network):
            network.__dict__.pop("forward", None)
    return seconds, sum_kernels(profiler, device)


def add_conditions(forward: Any, conditions: Mapping[str, Tensor]) -> Any:
    """Return a forward function with SDXL's further conditions."""
    return lambda *args, **kwargs: forward(*args, added_cond_kwargs=conditions, **kwargs)


def train_project(
    student: UNetBackbone, teacher: UNetBackbone, batch: dict[str, Any], fields: Mapping[str, Any], options: Any
) -> tuple[float, dict[str, float]]:
    """Return the seconds per step of this project's training, and {family of kernels: milliseconds} of one step."""
    steps = options.warmup + options.steps + 1
    node = {
        "accelerator": options.device,
        "steps": steps,
        "checkpoint_every": 10 * steps,
        "log_every_n_steps": 50,
        **fields,
    }
    conf = OmegaConf.merge(OmegaConf.structured(schema.Trainer), node)
    module = Distillation(
        student,
        teacher,
        w_feat=0.1,
        skip_emptied=False,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-5),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
        seed=0,
        dump=options.out / "failure",
    )
    timer = StepTimer(options.warmup, options.steps)
    with tempfile.TemporaryDirectory() as folder:
        fit(module, OneBatch(batch, steps), conf, Path(folder), "distil", callbacks=[WarmedUpEMA(0.9999), timer])
    return timer.seconds, timer.kernels


def measure_ceiling(device: torch.device) -> float:
    """Return the FLOP/s of a large matrix product in bfloat16."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for repeats in (3, 20):  # the first round warms up
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        synchronize(device)
        seconds = (time.perf_counter() - start) / repeats
    return 2 * size**3 / seconds


def measure_rows(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield a row per training, the recipe first."""
    ceiling, rate = measure_ceiling(device), None
    print(f"matrix product: {ceiling / 1e12:.1f} TFLOP/s")
    for name in ["recipe", *(["recipe with encoders"] if options.encoders else []), *options.rows]:
        reset_peak_memory()
        seconds, flops, kernels = measure_training(name, options, device)
        rate = rate or options.batch / seconds
        peak = f"{peak_memory(device) / 2**30:.1f}" if device.type == "cuda" else ""
        yield {
            "training": name,
            "samples/s": f"{options.batch / seconds:.2f}",
            "ratio": f"{options.batch / seconds / rate:.2f}",
            "MFU": f"{flops / seconds / ceiling:.3f}",
            "peak GiB": peak,
        } | {f"{family}, ms": f"{milliseconds:.1f}" for family, milliseconds in kernels.items()}
        gc.collect()
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure_training(
    name: str, options: argparse.Namespace, device: torch.device
) -> tuple[float, float, dict[str, float]]:
    """Return the seconds per step of a row, its floating-point operations, and {family of kernels: milliseconds}."""
    student, teacher = build_networks(options.shape, options.latents, device)
    passes = [2 * (macs.linear + macs.attention) for macs in (teacher.macs(), student.macs())]
    inputs = teacher.example_inputs(options.batch, "cpu")
    batch = {"image": torch.randn(inputs["sample"].shape), "conditions": inputs["conditions"]}
    if name in ROWS:
        seconds, kernels = train_project(student, teacher, batch, ROWS[name], options)
    else:
        width = inputs["conditions"]["encoder_hidden_states"].shape[-1]
        smaller = 8 if options.shape == "small" else 1
        arguments = (options.batch, teacher.data_shape()[1], width, device, smaller)
        encoders = make_encoders(*arguments) if name == "recipe with encoders" else None
        seconds, kernels = train_recipe(student, teacher, batch, options, encoders)
    return seconds, options.batch * (passes[0] + 3 * passes[1]), kernels


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.distillation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", default="small", choices=PLANS)
    parser.add_argument("--latents", type=int, help="height and width of the latents; by default the published ones")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help="; ".join(ROWS))
    parser.add_argument(
        "--encoders", action="store_true", help="also the recipe with VAE and text encoder in each step"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu"))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/distillation"))
    options = parser.parse_args()
    if options.encoders and options.shape == "sdxl_base":
        parser.error("--encoders are those of Stable Diffusion 1.x; choose --shape sd15 or small")
    device = torch.device(resolve_accelerator(options.device))
    machine = describe_machine(device)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"results_{options.shape}.csv"
    with open(path, "w", newline="") as file:
        writer = None
        for row in measure_rows(options, device):
            row |= {"shape": options.shape, "batch": options.batch, "machine": machine}
            writer = writer or csv.DictWriter(file, list(row))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            file.flush()  # what was measured stays if a later row does not fit the memory
            print(
                ", ".join(f"{key} {value}" for key, value in row.items() if value and key not in ("shape", "machine"))
            )
    print(path)


if __name__ == "__main__":
    main()
