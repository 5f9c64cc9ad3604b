"""Measures time and peak memory of loading a teacher and of building a student: as before, and as now.

python -m experiments.benchmarks.loading                                       # the shape of Stable Diffusion 1.5
python -m experiments.benchmarks.loading --architecture sdxl_base --what teacher

Networks have a published shape and one value for all weights, written once in half precision into a temporary folder.
Every measurement is a process of its own, and both ways take turns, so that ratios hold on a busy machine.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn
from tqdm import tqdm

from conf.schema import ROOT
from experiments.benchmarks.result_speed.__main__ import build_on_meta
from lightning_modules.backbones.diffusion.restage import find_source, make_student_config, restage
from lightning_modules.backbones.diffusion.unet import UNetBackbone
from lightning_modules.backbones.loading import load_network
from lightning_modules.metrics.cost import describe_machine, peak_memory, reset_peak_memory

COLUMNS = ("architecture", "what", "way", "seconds", "peak_gib", "weights_gib", "time_ratio")
CPU = torch.device("cpu")
VARIANT = "base"
"""the student that is built: BK-SDM's, which fits SD1.x and SD2.x"""


def load_as_before(folder: Path) -> nn.Module:
    """Return the network in a folder, with the earlier check of its weights, which makes a tensor of truth values."""
    network: Any = UNet2DConditionModel.from_pretrained(folder, dtype=torch.float32, low_cpu_mem_usage=False)
    if not all(torch.isfinite(tensor).all() for tensor in network.state_dict().values()):
        raise ValueError(f"the weights in {folder} are not finite")
    return network.eval()


def build_as_before(teacher: UNetBackbone) -> nn.Module:
    """Return the student of a teacher, made with random weights that copies of the teacher's then replace."""
    config, state = dict(teacher.network.config), teacher.network.state_dict()
    student: Any = UNet2DConditionModel.from_config(make_student_config(config, VARIANT))
    copies = {key: state[find_source(key, VARIANT)].clone() for key in student.state_dict()}
    student.load_state_dict(copies, assign=True)
    return student.eval()


def measure(what: str, way: str, folder: Path) -> dict[str, float]:
    """Return seconds, peak memory and size of the weights, in GiB, of one way in this process.

    The peak is the most that the whole process had at once, less what it had right before: for a student, with its
    teacher. It counts pages of the file that are in memory, which the system can take back.
    """
    teacher = UNetBackbone(load_network(folder), DDPMScheduler()) if what == "student" else None
    reset_peak_memory()
    before, start = peak_memory(CPU), perf_counter()
    if teacher is None:
        network = load_network(folder) if way == "now" else load_as_before(folder)
    else:
        network = restage(teacher.network, VARIANT) if way == "now" else build_as_before(teacher)
    seconds = perf_counter() - start
    peak = peak_memory(CPU) - before
    weights = sum(parameter.nbytes for parameter in network.parameters())
    return {"seconds": seconds, "peak_gib": peak / 2**30, "weights_gib": weights / 2**30}


def measure_in_process(what: str, way: str, folder: Path) -> dict[str, float]:
    """Return what `measure` does, of a process of its own."""
    command = [sys.executable, "-m", "experiments.benchmarks.loading", "--measure", what, way, str(folder)]
    output = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def measure_architecture(name: str, kinds: list[str], repeats: int) -> list[dict[str, Any]]:
    """Return a row per kind (teacher, student) and way, with medians; the weights are deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        network: Any = build_on_meta(name, None).network
        network = network.half().to_empty(device="cpu")
        for parameter in network.parameters():
            parameter.detach().fill_(0.01)  # quick, and time does not depend on values
        network.save_pretrained(folder)
        del network
        rows = []
        for what in kinds:
            runs: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
            for _ in tqdm(range(repeats), f"{name}, {what}"):
                for way, results in runs.items():
                    results.append(measure_in_process(what, way, Path(folder)))
            medians = {
                way: {key: statistics.median(result[key] for result in results) for key in results[0]}
                for way, results in runs.items()
            }
            first = medians["before"]["seconds"]
            rows += [
                {"architecture": name, "what": what, "way": way}
                | {key: f"{value:.3f}" for key, value in median.items()}
                | {"time_ratio": f"{first / median['seconds']:.2f}"}
                for way, median in medians.items()
            ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.loading", description=__doc__)
    parser.add_argument("--architecture", nargs="+", default=["sd15"], help="names of assets/architectures/*.json")
    parser.add_argument("--what", nargs="+", default=["teacher", "student"], choices=("teacher", "student"))
    parser.add_argument("--repeats", type=int, default=3, help="rounds, in which both ways take turns")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--measure", nargs=3, metavar=("WHAT", "WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        what, way, folder = options.measure
        print(json.dumps(measure(what, way, Path(folder))))
        return
    rows = [row for name in options.architecture for row in measure_architecture(name, options.what, options.repeats)]
    machine = f"{describe_machine(CPU)}, diffusers {diffusers.__version__}"
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"results_{'_'.join(options.architecture)}.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, "machine"))
        writer.writeheader()
        writer.writerows(row | {"machine": machine} for row in rows)
    for row in rows:
        print(
            f"{row['architecture']:<12}{row['what']:<10}{row['way']:<14}{row['seconds']:>8} s {row['time_ratio']:>6}x"
            f"{row['peak_gib']:>8} GiB peak, {row['weights_gib']} GiB of weights"
        )


if __name__ == "__main__":
    main()
