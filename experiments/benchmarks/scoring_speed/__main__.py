"""Measures how fast all units are scored: a whole forward pass per unit, against prefix reuse.

python -m experiments.benchmarks.scoring_speed   # the embedded model, on a CPU
python -m experiments.benchmarks.scoring_speed --architecture sd15 --latents 8 --batch 1 # real shapes, small latents
python -m experiments.benchmarks.scoring_speed --language smollm2_135m --batch 10
python -m experiments.benchmarks.scoring_speed --architecture sdxl_base --device cuda --dtype bfloat16 --compile
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from conf.schema import ROOT
from criteria.selection.base import Pool
from criteria.selection.knapsack import Knapsack
from experiments.benchmarks.generation_speed.__main__ import load_model as load_language_model
from experiments.benchmarks.result_speed.__main__ import build_on_meta, cast_inputs, fill_with_weights
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.diffusion.load import load_teacher
from lightning_modules.backbones.diffusion.unet import UNetBackbone
from lightning_modules.backbones.prefix_reuse import Replay
from lightning_modules.metrics.cost import describe_machine

Outputs = dict[str | None, Tensor]
"""{removed unit: output of the network without it}; None stands for the whole network"""


@torch.inference_mode()
def bound_speedup(backbone: NetworkBackbone, inputs: dict[str, Any]) -> float:
    """Return the largest speed-up that prefix reuse can have, by MACs.

    That is the MACs of all forward passes over those of one dense pass and of what comes after each unit.
    """
    macs, units = backbone.macs(), backbone.units()
    names = {module: name for name, module in backbone.network.named_modules()}
    replay = Replay(backbone.network, [backbone.network.get_submodule(unit.name) for unit in units])
    with replay.recording():
        backbone.predict(inputs)
    costs = [macs.of(names[part]) for part, _ in replay.record]
    recomputed = 0
    for unit in units:
        with backbone.without([unit.name]):
            recomputed += sum(costs[replay.first_change() :]) - unit.macs
    return (len(units) + 1) * macs.linear / (macs.linear + recomputed)


@torch.inference_mode()
def predict_plainly(backbone: NetworkBackbone, inputs: dict[str, Any], names: list[str]) -> Outputs:
    """Return the outputs without each unit, by a whole forward pass per unit."""
    outputs: Outputs = {None: backbone.predict(inputs)}
    for name in names:
        with backbone.without([name]):
            outputs[name] = backbone.predict(inputs)
    return outputs


@torch.inference_mode()
def predict_with_reuse(backbone: NetworkBackbone, inputs: dict[str, Any], names: list[str]) -> Outputs:
    """Return the outputs without each unit, by prefix reuse, as scoring computes them."""
    return dict(backbone.predict_without_each(inputs, names))


def time_in_turns(calls: dict[str, Callable[[], Outputs]], repeats: int, device: torch.device) -> tuple[dict, dict]:
    """Return the median seconds and the last outputs of calls that take turns.

    The first round warms up and is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    outputs: dict[str, Outputs] = {}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = perf_counter()
            outputs[name] = call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:
                seconds[name].append(perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}, outputs


def compute_difference(a: Outputs, b: Outputs) -> float:
    """Return the largest absolute difference of two sets of outputs, relative to the largest output."""
    largest = max(float(output.abs().max()) for output in a.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a) / largest


def select_units(backbone: NetworkBackbone, outputs: Outputs) -> list[str]:
    """Return the units that the knapsack removes at half of the parameters, by the output loss of these outputs."""
    scores = {name: float((out - outputs[None]).double().square().mean()) for name, out in outputs.items() if name}
    pool = Pool(backbone.units(), {"params": backbone.params()}, backbone.shared())
    return Knapsack(ratio=0.5).select(pool, scores)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.scoring_speed", description=__doc__)
    parser.add_argument("--teacher", default=str(ROOT / "assets" / "teacher"), help="a folder or hub id")
    parser.add_argument("--architecture", help="a file of assets/architectures, with random weights, instead")
    parser.add_argument("--language", help="a language model instead: a teacher's name, a folder or a hub id")
    parser.add_argument("--latents", type=int, help="size of the samples; by default the network's own")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--compile", action="store_true", help="also time the network with its parts compiled one by one"
    )
    parser.add_argument("--out", type=Path, help="by default results[_architecture].csv here")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)

    backbone: Any
    if options.architecture:
        network = fill_with_weights(build_on_meta(options.architecture, None).network, device, dtype)
        backbone = UNetBackbone(network, DDPMScheduler(), sample_size=options.latents)
    elif options.language:
        backbone = load_language_model(options.language).to(device, dtype)
    else:
        backbone = load_teacher(options.teacher, sample_size=options.latents).to(device, dtype)
    inputs = backbone.example_inputs(options.batch, device)
    shape, rng = inputs["sample"].shape, torch.Generator().manual_seed(0)
    if backbone.writes_text:
        inputs["sample"] = torch.randint(backbone.network.config.vocab_size, shape, generator=rng).to(device)
    else:
        inputs = cast_inputs(inputs, dtype)
        inputs["sample"] = torch.randn(shape, generator=rng).to(device, dtype)
        inputs["timestep"] = torch.arange(options.batch, device=device) * 1000 // options.batch
    names = [unit.name for unit in backbone.units()]
    name = options.architecture or options.language or "embedded"

    calls = {
        "plain": lambda: predict_plainly(backbone, inputs, names),
        "reuse": lambda: predict_with_reuse(backbone, inputs, names),
    }
    seconds, outputs = time_in_turns(calls, options.repeats, device)
    limit = bound_speedup(backbone, inputs)
    row = {
        "network": name,
        "units": len(names),
        "batch": options.batch,
        "tokens" if backbone.writes_text else "latents": shape[-1],
        "plain_s": f"{seconds['plain']:.3f}",
        "reuse_s": f"{seconds['reuse']:.3f}",
        "speedup": f"{seconds['plain'] / seconds['reuse']:.2f}",
        "bound_by_macs": f"{limit:.2f}",
        "equal_bits": all(torch.equal(outputs["plain"][name], outputs["reuse"][name]) for name in outputs["plain"]),
    }
    if options.compile:
        backbone.compiled = {}
        times, compiled = time_in_turns({"compiled": calls["reuse"]}, options.repeats, device)
        plans = [select_units(backbone, each) for each in (outputs["plain"], compiled["compiled"])]
        row["compiled_s"] = f"{times['compiled']:.3f}"
        row["compiled_over_eager_plain"] = f"{seconds['plain'] / times['compiled']:.2f}"
        row["difference_compiled"] = f"{compute_difference(outputs['plain'], compiled['compiled']):.1e}"
        row["same_plan_compiled"] = plans[0] == plans[1]
    row |= {"machine": f"{describe_machine(device)}, {options.dtype}", "torch": torch.__version__}
    default = "results.csv" if name == "embedded" else f"results_{Path(name).name}.csv"
    with open(options.out or Path(__file__).parent / default, "w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    print("\n".join(f"{name + ':':<22}{value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
