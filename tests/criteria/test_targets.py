"""Costs and targets as people read them: metrics.json, the summary of a job, the tables and pages of sets of runs."""

import html
import json
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf
from support.results import read_markdown

from experiments.engine.artefacts import read_json
from experiments.engine.pipeline import run_pipeline
from experiments.engine.stages.evaluate import get_requested_ratio
from experiments.reporting.run_page import list_costs
from experiments.reporting.set_page import collect_runs, report_set
from experiments.reporting.tables import average_over_seeds, format_counts

RESNET56 = {
    **{"plan/budget": "flops", "teacher/params": 853018, "student/params": 461000},
    **{"teacher/macs": 125_485_706, "student/macs": 55_000_000},
    **{"teacher/macs_attention": 0, "student/macs_attention": 0},
    **{"teacher/flops": 126_550_666, "student/flops": 55_844_000},
}


def test_counts_are_shown_in_the_unit_of_the_largest():
    assert format_counts([126_550_666, 55_844_000, 55.82e6]) == ["126.55 M", "55.84 M", "55.82 M"]
    assert format_counts([1.515e9, 740e6]) == ["1.515 G", "0.740 G"] and format_counts([999_999_999]) == ["1000.00 M"]
    assert format_counts([float("nan"), 2e9]) == ["", "2.000 G"] and format_counts([float("nan")]) == [""]


def test_the_target_stands_beside_the_cost_that_it_is_of():
    plain = {
        "parameters": "853,018 -> 461,000",
        "MACs, conv + linear": "125.49 M -> 55.00 M",
        "FLOPs, as thop counts": "126.55 M -> 55.84 M",
    }
    assert dict(list_costs(RESNET56)) == plain
    for budget, head, target, shown in (
        ("flops", "FLOPs, as thop counts", 55.82e6, "55.82 M"),
        ("macs", "MACs, conv + linear", 55e6, "55.00 M"),
        ("params", "parameters", 461_500.0, "461,500"),
    ):
        lines = dict(list_costs(RESNET56 | {"plan/budget": budget, "plan/requested_target": target}))
        assert lines == plain | {head: f"{plain[head]} (target {shown})"}


def test_the_table_of_costs_has_attention_and_flops_only_where_they_exist():
    unet = {name: value for name, value in RESNET56.items() if not name.endswith("flops")}
    unet |= {"teacher/macs": 1_515_000_000, "teacher/macs_attention": 84_000_000, "student/macs_attention": 45_000_000}
    assert dict(list_costs(unet | {"macs_tokens": 12})) == {
        "parameters": "853,018 -> 461,000",
        "MACs, conv + linear": "1.515 G -> 0.055 G (12 tokens)",
        "MACs, with attention": "1.599 G -> 0.100 G (12 tokens)",
    }


def test_the_requested_ratio_is_also_known_for_a_target():
    asked = [
        get_requested_ratio(OmegaConf.create(selection), {"params": 80, "flops": 400})
        for selection in (
            {"ratio": 0.3, "target": None, "budget": "flops"},
            {"ratio": None, "target": 100, "budget": "flops"},
            {"ratio": None, "target": 20.0, "budget": "params"},
            {"units": ["a"], "budget": "params"},
        )
    ]
    assert [entry["plan/requested_ratio"] for entry in asked] == [0.3, 0.75, 0.75, None]
    assert [entry.get("plan/requested_target") for entry in asked] == [None, 100, 20.0, None]


@pytest.mark.slow
def test_a_sweep_over_targets_is_one_curve_over_the_ratio(configure, overrides, teacher, tmp_path, unverified):
    total = teacher.params()
    job = ["selection.ratio=null", "criterion=magnitude", "distillation=none", "logger=csv"]
    for target in (0.7 * total, 0.5 * total):
        run_pipeline(configure(*overrides, *job, f"selection.target={target}"))
    study = tmp_path / "runs" / "debug"
    for run in study.iterdir():
        target = read_json(run / "plan.json")["selection"]["target"]
        assert run.name.startswith(f"magnitude-knapsack-{target}-none-seed0-")
        metrics, page = read_json(run / "metrics.json"), html.unescape((run / "report.html").read_text())
        assert metrics["plan/requested_target"] == target
        assert metrics["plan/requested_ratio"] == pytest.approx(1 - target / total)
        assert target - 0.1 * total <= metrics["student/params"] <= target
        summary = read_json(run / "finished.json")["summary"]
        assert f"asked for {round(1 - target / total, 4)}), " in summary and f"(target {target:,.0f})" in summary
        assert summary.split("parameters:")[1].split("\n")[0] in page
        assert f"| plan/requested_target | {target} |" in (run / "export" / "README.md").read_text()
    report_set(study)
    runs, table = results(study)
    assert sorted(runs["target"]) == pytest.approx([0.5 * total, 0.7 * total]) and runs["flops"].isna().all()
    assert list(table["ratio"]) == ["0.3", "0.5"] and "FLOPs" not in table
    assert list(table["target"]) == format_counts([0.7 * total, 0.5 * total])

    # The same as a network that has FLOPs would leave behind, and a run beside it that was asked for a ratio.
    first, second = sorted(study.glob("magnitude-*"))
    for run, count in ((first, 126.55e6), (second, 55.84e6)):
        metrics = read_json(run / "metrics.json") | {
            "teacher/flops": 2e8,
            "pruned/flops": count,
            "student/flops": count,
        }
        (run / "metrics.json").write_text(json.dumps(metrics))
    run_pipeline(configure(*overrides, *job[1:], "selection.ratio=0.4"))
    page = report_set(study)
    runs, table = results(study)
    assert set(table["FLOPs"]) == {"126.55 M", "55.84 M", ""} and sorted(table["target"])[0] == ""
    assert list(table["ratio"]) == ["0.3", "0.4", "0.5"]
    assert set(average_over_seeds(collect_runs(study))["method"]) == {"magnitude"}
    assert "<td>126.55 M</td>" in page.read_text() and "nan" not in (page.parent / "table.md").read_text()


def results(study: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """results.csv, and table.md as people see it."""
    return pd.read_csv(study / "report" / "results.csv"), read_markdown(study / "report" / "table.md")
