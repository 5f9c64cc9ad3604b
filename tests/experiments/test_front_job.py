"""Jobs with several budgets, and jobs that write the front of their scoring."""

import csv
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from support.results import files, the_run

from criteria.selection.equal_share import EqualShare
from criteria.selection.in_order import Greedy, Ranked
from criteria.selection.refined import Refined
from criteria.selection.threshold import Threshold
from criteria.selection.uniform import Uniform
from experiments.engine.identity import get_effective_settings
from experiments.engine.pipeline import run_pipeline
from experiments.engine.run import Run
from experiments.engine.stages.select_front import choose_ratio
from experiments.reporting.front import choose_plans, write_overrides
from experiments.reporting.run_page import report_run
from lightning_modules.metrics.unit_latency import UnitLatencies


@pytest.fixture
def equal_savings(monkeypatch) -> None:
    """As if each unit saved a tenth of the latency."""

    def measure(backbone, units, protocol, device):
        return UnitLatencies(1000, {unit.name: 100 for unit in units})

    monkeypatch.setattr("experiments.engine.stages.select.measure_unit_latencies", measure)


def read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text())


def test_a_job_with_two_budgets_states_the_ratio_of_each(overrides, configure, tmp_path, quick_end, equal_savings):
    budgets = ["selection.budgets={params: 0.4, latency: 0.3}", "selection.tolerance={params: 0.3, latency: 0.5}"]
    run_pipeline(configure(*overrides, *budgets, "distillation=none"))
    run = the_run(tmp_path / "runs")
    plan, metrics, measured = (read(run, name) for name in ("plan.json", "metrics.json", "measured.json"))
    assert plan["achieved_ratios"] == {
        "params": pytest.approx(metrics["plan/achieved_ratio"]),
        "latency": len(plan["changes"]) / 10,
    }
    assert 0.4 <= metrics["plan/achieved_ratio_params"] == metrics["plan/achieved_ratio"] <= 0.7
    assert (metrics["plan/requested_ratio_params"], metrics["plan/requested_ratio_latency"]) == (0.4, 0.3)
    assert measured["plan/achieved_ratio_latency"] == 1 - measured["latency_ratio"]
    assert "plan/achieved_ratio" not in measured and not (run / "pareto.json").exists()
    summary = report_run(run)
    assert f"{metrics['plan/achieved_ratio']:.4f} of params (asked for 0.4), " in summary
    assert f"{measured['plan/achieved_ratio_latency']:.4f} of latency (asked for 0.3), " in summary


@pytest.mark.slow
def test_a_job_writes_its_front_and_the_ratio_of_each_plan_makes_it(
    overrides, configure, tmp_path, quick_end, equal_savings
):
    job = [*overrides, "selection.ratio=0.4", "selection.tolerance=0.3", "distillation=none"]
    run_pipeline(configure(*job, "selection.pareto=true"))
    run = the_run(tmp_path / "runs")
    front, plan, metrics = (read(run, name) for name in ("pareto.json", "plan.json", "metrics.json"))
    plans, removed = front["plans"], {change["unit"] for change in plan["changes"]}
    (chosen,) = [each for each in plans if each["removed"] == front["chosen"]["removed"]]
    assert {front["units"][i] for i in chosen["removed"]} == removed
    assert chosen["params"] == metrics["student/params"] and chosen["macs"] == metrics["student/macs"]
    assert chosen["harm"] == pytest.approx(plan["predicted_harm"])
    assert chosen["latency_ms"] == pytest.approx(max(1 - len(removed) / 10, 0))
    with open(run / "pareto.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["ratio"]) for row in rows] == [each["ratio"] for each in plans]
    assert [row["chosen"] for row in rows] == [str(int(each is chosen)) for each in plans]
    report_run(run)
    page = (run / "report.html").read_text()
    assert f"{len(plans)} plans: no other plan removes as much of params at less harm" in page
    assert "figures/pareto.png" in files(run)

    other = next(each for each in plans if each["selection_ratio"] > chosen["ratio"])
    given = write_overrides(other, front["budget"], configure(*job).selection).split()
    run_pipeline(configure(*job, *given))
    (second,) = set((tmp_path / "runs").glob("*/*/plan.json")) - {run / "plan.json"}
    assert [change["unit"] for change in json.loads(second.read_text())["changes"]] == [
        front["units"][i] for i in other["removed"]
    ]


def test_a_front_of_channels_is_refused_before_anything_is_scored(overrides, configure):
    given = ["criterion=magnitude", "criterion.level=channel", "selection=knapsack", "selection.pareto=true"]
    with pytest.raises(ValueError, match=r"selection\.pareto=true is for blocks and operators"):
        run_pipeline(configure(*overrides, *given, "distillation=none"))


def test_several_budgets_take_over_the_fields_of_one(configure):
    selection = configure("selection.budgets={macs: 0.3, params: 0.2}").selection
    assert (selection.budget, selection.ratio) == ("macs", 0.3)
    assert (configure().selection.budget, configure().selection.ratio) == ("params", 0.5)
    with pytest.raises(ValueError, match=r"selection\.budgets=0\.5 is of the wrong type"):
        configure("selection.budgets=0.5")


def test_fields_at_their_defaults_are_no_part_of_the_identity(configure):
    def identify(*given: str) -> str:
        return Run(configure(*given), "teacher").id

    assert not {"budgets", "pareto"} & get_effective_settings(configure())["selection"].keys()
    several = "selection.budgets={params: 0.5, latency: 0.3}"
    given = [(), ("selection.pareto=true",), (several,), (several, "evaluation.latency_batch=3")]
    assert len({identify(*words) for words in given}) == 4


def test_the_ratio_of_a_plan_has_as_few_digits_as_tell_it_apart():
    assert choose_ratio(Fraction(50271, 100000), Fraction(1, 2)) == 0.5027
    assert choose_ratio(Fraction(500019, 10**6), Fraction(500012, 10**6)) == 0.500019
    assert choose_ratio(Fraction(1, 3 * 10**6), Fraction(0)) == 3e-07


def test_the_table_has_the_first_plan_of_each_twentieth_and_the_chosen_one():
    plans = [{"ratio": ratio, "removed": [i]} for i, ratio in enumerate((0.01, 0.02, 0.06, 0.07, 0.5))]
    assert choose_plans({"plans": plans, "chosen": plans[3]}) == [plans[0], *plans[2:]]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), ""),
        (("selection.budget=macs",), ""),
        (("selection.tolerance=0",), "selection.tolerance=0.02 "),
        (("selection.budgets={macs: 0.3, params: 0.2}",), "selection.budgets=null "),
        (
            ("selection.budgets={macs: 0.3, params: 0.2}", "selection.tolerance={macs: 0.1, params: 0.1}"),
            "selection.tolerance=0.02 selection.budgets=null ",
        ),
        (("selection.target=10", "selection.ratio=null"), "selection.target=null "),
    ],
)
def test_the_words_that_choose_a_plan_undo_what_is_in_their_way(configure, given, words):
    plan, selection = {"selection_ratio": 0.5027, "ratio": 0.50271}, configure(*given).selection
    overrides = write_overrides(plan, selection.budget, selection)
    assert overrides == f"selection.ratio=0.5027 selection.budget={selection.budget} {words}selection.pareto=false"
    again = configure(*given, *overrides.split()).selection
    assert (again.budget, again.ratio, again.budgets, again.target) == (selection.budget, 0.5027, None, None)


@pytest.mark.parametrize("selection", [Ranked, Greedy, Refined, Threshold, EqualShare, Uniform])
def test_a_front_is_refused_for_selections_by_another_rule(selection):
    with pytest.raises(ValueError, match=f"{selection.__name__} chooses by another rule; choose selection=knapsack"):
        selection(ratio=0.5, pareto=True)
