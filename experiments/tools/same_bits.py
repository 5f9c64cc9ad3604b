"""Shows whether two versions of this project give the same bits.

    python -m experiments.tools.same_bits make /path/of/a/checkout runs_of_one
    python -m experiments.tools.same_bits make . runs_of_the_other
    python -m experiments.tools.same_bits compare runs_of_one runs_of_the_other

`make` runs the JOBS with the checkout's own train.py (`--jobs default_real` for the default job at its real size), one
folder each. `compare` prints a line per job and ends with 1 where anything differs: scores, the changes of the plan,
the weights of every network and of the export, samples, and all figures of metrics.json that both versions have.
Both have to be made on one machine with as many threads: other processors round differently.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.engine.artefacts import read_json

DEBUG = ["debug=tiny", "logger=csv"]
JOBS = {
    "default": [*DEBUG, "selection.tolerance=0.1"],
    "t2i": [*DEBUG, "task=t2i"],
    "uag": [*DEBUG, "task=uag"],
    "language": [*DEBUG, "task=language"],
    "resnet56": [*DEBUG, "task=classification", "calibration.samples=16", "calibration.batch_size=4"],
    "default_real": ["logger=csv"],
}
"""Overrides of each job: the default, text to image, sounds, stories15M, ResNet-56; the last one takes minutes."""

RENAMED = {"student": "networks/pruned", "distilled": "networks/distilled"}
"""Folders of networks under their names in version 0.1 and today."""


def make(checkout: Path, out: Path, jobs: list[str]) -> None:
    """Run some of the JOBS with the train.py of a checkout, each below a folder of its own in `out`."""
    for job in jobs:
        print(f"{job}: {' '.join(JOBS[job])}", flush=True)
        runs = (out / job).resolve()
        command = [sys.executable, "train.py", *JOBS[job], f"paths.runs={runs}"]
        subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def read_results(run: Path) -> dict[str, Any]:
    """Return what has to be the same, by name: bytes of files, and values of JSON files."""
    values: dict[str, Any] = {}
    for path in sorted([*run.rglob("*.safetensors"), *run.rglob("*.npy")]):
        folder, _, rest = path.relative_to(run).as_posix().partition("/")
        values[f"{RENAMED.get(folder, folder)}/{rest}"] = path.read_bytes()
    if (run / "scores.json").exists():
        scores = read_json(run / "scores.json")["scores"]
        values |= {f"score of {unit}": entry for unit, entry in scores.items()}
    values["changes of the plan"] = read_json(run / "plan.json")["changes"]
    metrics = read_json(run / "metrics.json")
    return values | {f"metrics.json {key}": value for key, value in metrics.items() if isinstance(value, float)}


def differences(one: Path, other: Path) -> tuple[list[str], int]:
    """Return the names of what differs between two runs, and how many names both of them have.

    A figure that only one of the two versions computes is no difference; a file that only one has is.
    """
    a, b = read_results(one), read_results(other)
    names = {name for name in a.keys() | b.keys() if not name.startswith("metrics.json ")} | (a.keys() & b.keys())
    return sorted(name for name in names if a.get(name) != b.get(name)), len(a.keys() & b.keys())


def compare(one: Path, other: Path) -> bool:
    """Print a line per job that both folders have, and return whether all of them are the same."""
    jobs = sorted({path.name for path in one.iterdir()} & {path.name for path in other.iterdir()} & set(JOBS))
    if not jobs:
        raise ValueError(f"{one} and {other} have no job in common; jobs are: {', '.join(JOBS)}")
    same = True
    for job in jobs:
        (first,), (second,) = ([path.parent for path in (root / job).glob("*/*/plan.json")] for root in (one, other))
        different, count = differences(first, second)
        print(f"{job}: " + (f"DIFFERENT: {', '.join(different)}" if different else f"the same ({count} results)"))
        same = same and not different
    return same


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.tools.same_bits", description="Compare two versions.")
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="run the jobs with a checkout")
    making.add_argument("checkout", type=Path)
    making.add_argument("out", type=Path)
    making.add_argument("--jobs", nargs="+", choices=JOBS, default=[job for job in JOBS if job != "default_real"])
    comparing = commands.add_parser("compare", help="compare what was made")
    comparing.add_argument("one", type=Path)
    comparing.add_argument("other", type=Path)
    options = parser.parse_args()
    if options.command == "make":
        make(options.checkout, options.out, options.jobs)
    elif not compare(options.one, options.other):
        sys.exit(1)


if __name__ == "__main__":
    main()
