"""Measures the time that pruning saves: latency and memory of students beside their teacher, on real shapes.

    python -m experiments.benchmarks.result_speed --teacher sd15 --latents 16 --batch 1  # two CPU cores, minutes
    python -m experiments.benchmarks.result_speed --teacher sd15 --device cuda --dtype bfloat16 --batch 1 16 --compile

Weights are random, since time and memory do not depend on them. The time that a bypass plan saves depends on the units
that it removes, so each ratio of the parameters has two plans: the one that saves the fewest MACs, and the one that
saves the most.
"""

import argparse
import csv
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import nn
from tqdm import tqdm

from conf.schema import ROOT
from criteria.selection.base import InfeasibleBudget, Pool
from criteria.selection.bk_sdm import VARIANTS
from criteria.selection.knapsack import Knapsack
from lightning_modules.backbones.base import Change
from lightning_modules.backbones.diffusion.pipeline_parts import move
from lightning_modules.backbones.diffusion.unet import UNetBackbone
from lightning_modules.metrics.cost import describe_machine, latencies


def build_on_meta(name: str, latents: int | None) -> UNetBackbone:
    """Return a network of a published shape on the meta device, i.e. without memory for its weights.

    `latents` is the size of its samples; None is the published size.
    """
    config = json.loads((ROOT / "assets" / "architectures" / f"{name}.json").read_text())
    with torch.device("meta"):
        network: Any = UNet2DConditionModel.from_config(config)
    return UNetBackbone(network, DDPMScheduler(), sample_size=latents)


def make_plans(teacher: UNetBackbone, ratios: list[float]) -> Iterator[tuple[str, list[Change]]]:
    """Yield the name and the changes of each plan: BK-SDM's where the shape allows them, and two bypasses per ratio."""
    if teacher.network.config.layers_per_block == 2 and len(teacher.network.down_blocks) == 4:
        for variant in VARIANTS:
            yield f"bk_sdm {variant}", [{"kind": "restage", "variant": variant}]
    units = teacher.units()
    totals = {"params": teacher.params(), "macs": teacher.macs().linear}
    for ratio in ratios:
        for most, sign in (("fewest", 1), ("most", -1)):
            scores = {unit.name: sign * unit.macs / totals["macs"] for unit in units}
            try:
                changes = Knapsack(ratio=ratio).changes(Pool(units, totals, teacher.shared()), scores)
            except InfeasibleBudget as error:
                tqdm.write(str(error))
                continue
            yield f"bypass {ratio:g}, {most} MACs saved", changes  # type: ignore[misc]


def fill_with_weights(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Move a network from the meta device to a real one, with small random weights; returns it in eval mode."""
    network = network.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(-0.02, 0.02)
    return network.eval()


def materialise(
    meta: UNetBackbone, options: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> UNetBackbone:
    """Return a network of the meta device with weights on a real one, compiled unit by unit with --compile."""
    backbone = UNetBackbone(
        fill_with_weights(meta.network, device, dtype), DDPMScheduler(), sample_size=options.latents
    )
    if options.compile:
        torch._dynamo.config.recompile_limit = 256  # each shape of a block is a graph
        for name in backbone.survivors():
            backbone.network.get_submodule(name).compile()
    return backbone


@torch.inference_mode()
def measure_peak(call: Callable[[], Any], device: torch.device) -> int | str:
    """Return the MiB that one call allocates beyond the weights; "" on a CPU, where it is not known."""
    if device.type != "cuda":
        return ""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.result_speed", description=__doc__)
    parser.add_argument("--teacher", default="sd15", help="a file of assets/architectures")
    parser.add_argument("--latents", type=int, help="size of the latents; by default the published one")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.33, 0.5])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=25, help="steps of a whole generation with guidance; 0 leaves it out"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the units one by one")
    parser.add_argument("--out", type=Path, help="by default results_<teacher>.csv here")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)

    shape = build_on_meta(options.teacher, options.latents)
    published = build_on_meta(options.teacher, None)  # MACs are counted at the published size
    students: list[tuple[str, Any]] = [("teacher", None), *make_plans(shape, options.ratios)]
    teacher = materialise(build_on_meta(options.teacher, options.latents), options, device, dtype)
    rows = []
    for name, plan in tqdm(students, desc=options.teacher):
        macs = (published if plan is None else published.pruned(plan)).macs().linear
        backbone = teacher if plan is None else materialise(shape.pruned(plan), options, device, dtype)
        for batch in options.batch:
            call = make_step(backbone, batch, device, dtype)
            peak = measure_peak(call, device)
            times = latencies(
                {"teacher": make_step(teacher, batch, device, dtype), "student": call}, options.repeats, device
            )
            row = {
                "network": name,
                "parameters": backbone.params(),
                "parameters removed": f"{1 - backbone.params() / teacher.params():.3f}",
                "MACs": macs,
                "MACs removed": f"{1 - macs / published.macs().linear:.3f}",
                "batch": batch,
                "step ms": f"{times['student']:.1f}",
                "step, of the teacher's": f"{times['student'] / times['teacher']:.3f}",
                "weights MiB": round(sum(p.numel() * p.element_size() for p in backbone.parameters()) / 2**20),
                "activations MiB": peak,
            }
            if options.steps:
                generations = {
                    key: make_generation(network, batch, options.steps, device, dtype)
                    for key, network in (("teacher", teacher), ("student", backbone))
                }
                times = latencies(generations, 1, device)
                row[f"{options.steps} guided steps s"] = f"{times['student'] / 1000:.2f}"
                row["of the teacher's"] = f"{times['student'] / times['teacher']:.3f}"
            rows.append(row)
        del backbone
    out = options.out or Path(__file__).parent / f"results_{options.teacher}.csv"
    note = f"{describe_machine(device)}, {options.dtype}"
    note += f", latents {shape.data_shape()[1]}, {'compiled' if options.compile else 'eager'}"
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "machine"])
        writer.writeheader()
        writer.writerows({**row, "machine": note} for row in rows)
    print(out.read_text())


def make_step(backbone: UNetBackbone, batch: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """Return a function that makes one forward pass."""
    return functools.partial(backbone.predict, cast_inputs(backbone.example_inputs(batch, device), dtype))


def make_generation(
    backbone: UNetBackbone, batch: int, steps: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], Any]:
    """Return a function that generates samples with classifier-free guidance, i.e. with two forward passes per step.

    Args:
        backbone: the U-Net.
        batch: the number of samples.
        steps: the number of DDIM steps.
        device: the device of the network.
        dtype: its precision.
    """
    conditions = cast_inputs(backbone.example_inputs(batch, device), dtype)["conditions"]
    inputs = {"seed": torch.arange(batch), "conditions": conditions}
    return lambda: backbone.generate(inputs, DDIMScheduler.from_config, steps, guidance=7.5)


def cast_inputs(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return inputs of a network in another precision; the timesteps stay as they are."""
    return move(inputs, dtype) | {"timestep": inputs["timestep"]}


if __name__ == "__main__":
    main()
