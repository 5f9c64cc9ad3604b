"""What pruning buys in time: latency and memory of students beside their teacher, on the shapes of real networks.

    python -m experiments.benchmarks.result_speed --teacher sd15 --latents 16 --batch 1  # two CPU cores, minutes
    python -m experiments.benchmarks.result_speed --teacher sd15 --device cuda --dtype bfloat16 --batch 1 16 --compile

Weights are random: time and memory do not depend on them. What a bypass plan saves in time does depend on which units
go, so at each ratio of the parameters there are two: the plan that saves the fewest MACs, and the one that saves most.
"""

import argparse
import csv
import functools
import json
import platform
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
from lightning_modules.metrics.cost import device_name, latencies


def on_meta(name: str, latents: int | None) -> UNetBackbone:
    """A network of published shape, without memory."""
    config = json.loads((ROOT / "assets" / "architectures" / f"{name}.json").read_text())
    with torch.device("meta"):
        network: Any = UNet2DConditionModel.from_config(config)
    return UNetBackbone(network, DDPMScheduler(), sample_size=latents)


def plans(teacher: UNetBackbone, ratios: list[float]) -> Iterator[tuple[str, list[Change]]]:
    """The students by name: BK-SDM's where the shape allows them, and two bypass plans at each ratio."""
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


def filled(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A network on the meta device with small random weights on a real one."""
    network = network.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(-0.02, 0.02)
    return network.eval()


def real(meta: UNetBackbone, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> UNetBackbone:
    """A network with memory and weights, compiled unit by unit where that is asked for."""
    backbone = UNetBackbone(filled(meta.network, device, dtype), DDPMScheduler(), sample_size=options.latents)
    if options.compile:
        torch._dynamo.config.recompile_limit = 256  # each shape of a block is a graph
        for name in backbone.survivors():
            backbone.network.get_submodule(name).compile()
    return backbone


@torch.inference_mode()
def peak_of(call: Callable[[], Any], device: torch.device) -> int | str:
    """MiB that one call allocates beyond the weights, on a GPU; on a CPU that is not known."""
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
    parser.add_argument("--steps", type=int, default=25, help="of a whole generation with guidance; 0 leaves it out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the units one by one")
    parser.add_argument("--out", type=Path, help="by default results_<teacher>.csv here")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)

    shape = on_meta(options.teacher, options.latents)
    published = on_meta(options.teacher, None)  # its MACs are those of the published size
    students: list[tuple[str, Any]] = [("teacher", None), *plans(shape, options.ratios)]
    teacher = real(on_meta(options.teacher, options.latents), options, device, dtype)
    rows = []
    for name, plan in tqdm(students, desc=options.teacher):
        macs = (published if plan is None else published.pruned(plan)).macs().linear
        backbone = teacher if plan is None else real(shape.pruned(plan), options, device, dtype)
        for batch in options.batch:
            call = step(backbone, batch, device, dtype)
            peak = peak_of(call, device)
            times = latencies(
                {"teacher": step(teacher, batch, device, dtype), "student": call}, options.repeats, device
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
                runs = {
                    key: generation(each, batch, options.steps, device, dtype)
                    for key, each in (("teacher", teacher), ("student", backbone))
                }
                whole = latencies(runs, 1, device)
                row[f"{options.steps} guided steps s"] = f"{whole['student'] / 1000:.2f}"
                row["of the teacher's"] = f"{whole['student'] / whole['teacher']:.3f}"
            rows.append(row)
        del backbone
    out = options.out or Path(__file__).parent / f"results_{options.teacher}.csv"
    note = f"{device_name(device)}, {platform.machine()}, torch {torch.__version__}, {options.dtype}"
    note += f", latents {shape.data_shape()[1]}, {'compiled' if options.compile else 'eager'}"
    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "machine"])
        writer.writeheader()
        writer.writerows({**row, "machine": note} for row in rows)
    print(out.read_text())


def step(backbone: UNetBackbone, batch: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """One forward pass."""
    return functools.partial(backbone.predict, cast(backbone.example_inputs(batch, device), dtype))


def generation(
    backbone: UNetBackbone, batch: int, steps: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], Any]:
    """A whole generation with classifier-free guidance: two passes a step."""
    conditions = cast(backbone.example_inputs(batch, device), dtype)["conditions"]
    given = {"seed": torch.arange(batch), "conditions": conditions}
    return lambda: backbone.generate(given, DDIMScheduler.from_config, steps, guidance=7.5)


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Numbers in the precision of the network."""
    return move(inputs, dtype) | {"timestep": inputs["timestep"]}


if __name__ == "__main__":
    main()
