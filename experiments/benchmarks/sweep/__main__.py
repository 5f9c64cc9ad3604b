"""Measures what a sweep costs beside its stages: the first line, a mistake, starting jobs, passing over finished ones.

    python -m experiments.benchmarks.sweep    # two CPU cores, minutes; writes results.csv beside this file

Times depend on the machine and on what else runs there; `overhead` is a ratio of times of one process.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

from conf.schema import ROOT
from experiments.engine.artefacts import read_json
from experiments.engine.sweep import read_sweep
from lightning_modules.metrics.cost import describe_machine

GRID = ("criterion=output_loss,magnitude,random", "selection.ratio=0.3,0.5,0.7")
NETWORK: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
"""A network of random weights that takes little time, so that what is beside the stages shows."""

JOB = ("debug=tiny", "evaluation=none", "trainer=cpu", "pipeline.stages.export=null", "selection.tolerance=0.1")


def time_command(*arguments: str) -> tuple[float, float]:
    """Return the seconds to the first line that `train.py` prints, on whichever stream, and to its end."""
    start, command = time.perf_counter(), [sys.executable, "train.py", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        first = time.perf_counter() - start
        process.stdout.read()
    return first, time.perf_counter() - start


def measure(folder: Path, repeats: int) -> dict[str, float]:
    """Return {figure: value} of sweeps in a folder; `repeats` is that of short commands, of which the median counts."""
    mistakes = {"unknown field": "selection.rati=0.5", "wrong value": "selection.ratio=1.5"}
    figures = {
        f"{name}: seconds to the answer": statistics.median(time_command(wrong)[1] for _ in range(repeats))
        for name, wrong in mistakes.items()
    }
    teacher: list[Any] = [UNet2DModel(**NETWORK), DDPMScheduler()]
    for part in teacher:
        part.save_pretrained(folder / "teacher")
    sweep = ("-m", *JOB, *GRID, f"teacher.path={folder / 'teacher'}", f"paths.runs={folder}")
    figures["sweep of 9: seconds to the first line"], figures["sweep of 9: seconds"] = time_command(*sweep)
    records = read_records(folder)
    figures["sweep of 9: seconds of its stages"] = stages = sum(map(add_stages, records))
    figures["overhead: command over stages"] = figures["sweep of 9: seconds"] / stages
    for name, part in (("all jobs", records), ("jobs after the first", records[1:])):
        figures[f"overhead: {name} over stages"] = sum(job["seconds"] for job in part) / sum(map(add_stages, part))
    figures["sweep of 9, finished before: seconds"] = time_command(*sweep)[1]
    figures["finished job: seconds to pass over"] = statistics.median(
        record["seconds"] for record in read_records(folder)[1:]
    )
    return figures


def add_stages(record: dict[str, Any]) -> float:
    """Return the seconds that the stages of a job took together."""
    seconds: dict[str, float] = read_json(Path(record["run"]) / "measured.json")["seconds"]
    return sum(seconds.values())


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the jobs of the only sweep in a folder."""
    (path,) = folder.glob(".sweep/*/sweep.json")
    records: list[dict[str, Any]] = read_sweep(path.parent)["records"]
    return records


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.sweep", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="of short commands")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results.csv")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.repeats)
    machine = describe_machine(torch.device("cpu"))
    with open(options.output, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["figure", "value", "machine"])
        for name, value in figures.items():
            writer.writerow([name, f"{value:.3f}", machine])
            print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
