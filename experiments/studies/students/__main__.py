"""Asks which number should choose a plan, whether normalised feature losses help, and whether a repair lasts.

    python -m experiments.studies.students run --task uag --runs runs/students
    python -m experiments.studies.students report runs/students

`run` starts the sweeps below one after the other, each as a command that it prints; finished jobs are skipped, so an
interrupted study goes on where it was. `--quick` runs fewer plans for fewer steps. `report` writes plans.csv,
losses.csv, table.md and students.png.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from conf.schema import ROOT
from experiments.engine.artefacts import read_json
from experiments.studies.students import report

BOTH = "repair=none,least_squares"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.students",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser("run", help="run the sweeps of one task")
    run.add_argument("--task", default="uag")
    run.add_argument("--ratio", type=float, default=0.5)
    run.add_argument("--runs", type=Path, default=Path("runs/students"))
    run.add_argument("--quick", action="store_true", help="4 plans and 2 losses, 20 steps each")
    written = commands.add_parser("report", help="write the tables and the figure of finished runs")
    written.add_argument("runs", type=Path, nargs="+")
    written.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments, overrides = parser.parse_known_args()
    if arguments.command == "run":
        run_sweeps(arguments.task, arguments.ratio, arguments.runs, arguments.quick, overrides)
    elif overrides:
        parser.error(f"unknown arguments: {shlex.join(overrides)}")
    else:
        print(report.write_report(arguments.runs, arguments.out))


def run_sweeps(task: str, ratio: float, runs: Path, quick: bool, overrides: Sequence[str]) -> None:
    """Run all sweeps of a task; `overrides` are added to each command. Ends the process where a job fails."""
    common = ["-m", "experiment=students", f"task={task}", f"selection.ratio={ratio:g}", *overrides]
    common += [f"paths.runs={runs.resolve().parent}", f"name={runs.name}"]
    if quick:
        common += ["trainer.steps=20"]
    start([*common, "seed=0"])
    for sweep in list_sweeps(find_optimum(runs, task, ratio), quick):
        start([*common, *sweep])


def start(words: Sequence[str]) -> None:
    """Run one sweep in a process of its own after printing its command; ends this process where it fails."""
    print(f"\npython train.py {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, str(ROOT / "train.py"), *words]).returncode
    if code:
        sys.exit(code)


def find_optimum(runs: Path, task: str, ratio: float) -> list[str]:
    """Return the units that the knapsack of the output loss removes; its run has to be below `runs`."""
    plan = next(runs.glob(f"{task}-output_loss-knapsack-{ratio:g}-none-*/plan.json"))
    return [change["unit"] for change in read_json(plan)["changes"]]


def list_sweeps(optimum: Sequence[str], quick: bool) -> list[list[str]]:
    """Return the overrides of each sweep after the first job.

    Plans: the best one without each unit of the optimum in turn, those of other criteria, and random ones. Losses: each
    with and without a repair, on three seeds. Lengths: four and ten times the usual number of steps, on two seeds.
    """
    protected = [f"[{name}]" for name in optimum]
    plans = [
        ["selection.protected=[]," + ",".join(protected), BOTH],
        ["criterion=task_loss,taylor,magnitude,diff_pruning,ld_pruner,repaired_loss", BOTH],
        ["criterion=random", "criterion.seed=0,1,2,3,4,5,6", BOTH],
    ]
    losses = [
        ["distillation=normalized,output_only,task_only", BOTH, "seed=0,1,2"],
        ["distillation=normalized", "distillation.normalization=none", BOTH, "seed=0,1,2"],
        ["distillation=normalized", "distillation.normalization=initial_error", BOTH, "seed=0,1,2"],
    ]
    lengths = [["trainer.steps=600,1500", BOTH, "seed=0,1"]]
    if quick:
        return [["selection.protected=" + ",".join(protected[:3]), BOTH], ["distillation=output_only", BOTH]]
    return [*plans, *losses, *lengths]


if __name__ == "__main__":
    main()
