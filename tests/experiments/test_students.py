"""The study of students: its sweeps, its predictors, and its comparisons, on runs made by hand."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.runs import write_run

from experiments.engine.artefacts import read_json
from experiments.studies.students import report
from experiments.studies.students.__main__ import find_optimum, list_sweeps

UNITS = ("down.0", "down.1", "down.2")


def write_student(folder: Path, unit: str, repair: str, trained: float, **fields: Any) -> Path:
    """A run that removed one unit: its joint loss is a tenth of its number, its loss after the repair a twentieth."""
    fields = {"seed": 0, "trainer__steps": 150, "distillation__name": "normalized", **fields}
    name = "-".join([unit, repair, *map(str, fields.values())])
    run = write_run(folder, name, 0.5, {}, repair__name=repair, criterion__name="output_loss", **fields)
    joint = (UNITS.index(unit) + 1) / 10
    losses = {"pruned/output_loss": joint, "eval/output_loss": trained}
    losses |= {"repaired/output_loss": joint / 2} if repair != "none" else {}
    for file, content in {"metrics": losses, "plan": {"changes": [{"kind": "bypass", "unit": unit}]}}.items():
        path = run / f"{file}.json"
        path.write_text(json.dumps(read_json(path) | content))
    (run / "history").mkdir()
    steps = pd.DataFrame({"step": range(40), "name": "train/output", "value": [joint * step for step in range(40)]})
    steps.to_csv(run / "history" / "distil.csv", index=False)
    return run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three plans, of which a lower joint loss gives a lower loss after training; of the best, two seeds and losses."""
    for number, unit in enumerate(UNITS):
        write_student(tmp_path / "runs", unit, "none", 0.04 + 0.01 * number)
        write_student(tmp_path / "runs", unit, "least_squares", 0.03 + 0.01 * number)
    best = UNITS[0]
    for repair, trained in (("none", 0.05), ("least_squares", 0.04)):
        write_student(tmp_path / "runs", best, repair, trained, seed=1)
        write_student(tmp_path / "runs", best, repair, trained, distillation__name="output_only")
        write_student(tmp_path / "runs", best, repair, trained / 10, trainer__steps=600)
    return tmp_path / "runs"


def test_predictors_that_order_plans_as_their_students_have_tau_one(runs, tmp_path):
    report.write_report([runs], tmp_path / "out")
    plans = pd.read_csv(tmp_path / "out" / "plans.csv")
    assert list(plans["units"]) != [] and set(plans["units"]) == set(UNITS)
    best = plans[plans["units"] == UNITS[0]].iloc[0]
    assert best[["joint loss", "joint loss after repair", "trained", "repaired and trained"]].to_list() == [
        *(0.1, 0.05, 0.04, 0.03)
    ]
    assert best["sum of scores"] == 1.0  # the scores of the runs fall from unit to unit
    assert best["loss in step 20"] == pytest.approx(0.1 * 14.5)
    table = report.compare_predictors(plans).set_index("predictor")
    for predictor in ("joint loss", "joint loss after repair", "loss in step 20"):
        assert table.loc[predictor, "tau, trained"].startswith("1.00 [1.00, 1.00]")
        assert table.loc[predictor, "regret, repaired and trained"] == "0.0%"
    assert table.loc["sum of scores", "tau, trained"].startswith("-1.00 ")
    assert table.loc["sum of scores", "regret, trained"] == "50.0%"
    assert (tmp_path / "out" / "students.png").stat().st_size > 10_000


def test_losses_and_lengths_are_compared_on_the_optimum_by_seed(runs, tmp_path):
    report.write_report([runs], tmp_path / "out")
    table = report.read_runs([runs])
    losses = report.compare_losses(table).set_index("distillation")
    assert losses.loc["normalized", "trained"] == "0.045 (0.04 to 0.05)"
    assert losses.loc["normalized", "lower by the repair"] == "22.5% (20.0% to 25.0%)"
    assert losses.loc["output_only", ["trained", "seeds"]].to_list() == ["0.05", "1"]
    lengths = report.compare_lengths(table).set_index("steps")
    assert list(lengths.index) == ["150", "600"] and lengths.loc["600", "lower by the repair"] == "20.0%"
    headings = [line for line in (tmp_path / "out" / "table.md").read_text().splitlines() if line.startswith("## ")]
    assert headings == ["## Which number should choose the plan?", "## Which loss?", "## Does the repair last?"]


def test_the_sweeps_leave_out_each_unit_of_the_optimum_in_turn(tmp_path):
    run = write_student(tmp_path, UNITS[1], "none", 0.1)
    run.rename(tmp_path / "uag-output_loss-knapsack-0.5-none-normalized-150-seed0-0123abcd")
    optimum = find_optimum(tmp_path, "uag", 0.5)
    assert optimum == [UNITS[1]]
    assert list_sweeps(optimum, quick=False)[0][0] == f"selection.protected=[],[{UNITS[1]}]"
    assert list_sweeps([*UNITS], quick=True)[0][0] == "selection.protected=" + ",".join(f"[{unit}]" for unit in UNITS)


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: no finished run"):
        report.read_runs([tmp_path])
