"""Reports of a set of runs: which runs are one row, which latencies are compared, and what need not be there."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import OmegaConf
from support.results import read_markdown, the_run

from experiments.engine.artefacts import read_json
from experiments.engine.pipeline import run_pipeline
from experiments.reporting.run_page import report_run
from experiments.reporting.set_page import collect_runs, main, report_set
from experiments.reporting.tables import average_over_seeds

LATENCIES = "quality_over_latency_ratio.png"
Another = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """The folder of one finished job, made by the first test."""
    return {}


@pytest.fixture
def another(made, configure, overrides, tmp_path_factory, tmp_path, unverified) -> Another:
    """another(name, run_id, config, plan, **measured): a finished run below tmp_path/study, as a job leaves it."""
    if not made:
        runs = tmp_path_factory.mktemp("made")
        run_pipeline(configure(*overrides, f"paths.runs={runs}", "distillation=none", "logger.wandb=false"))
        made["run"] = the_run(runs)

    def make(
        name: str,
        run_id: str,
        config: dict[str, Any] | None = None,
        plan: dict[str, Any] | None = None,
        **measured: Any,
    ) -> Path:
        run = tmp_path / "study" / name
        shutil.copytree(made["run"], run)
        changes: dict[str, dict[str, Any]] = {"metrics": {"run_id": run_id}, "plan": plan or {}, "measured": measured}
        for file, content in changes.items():
            path = run / f"{file}.json"
            path.write_text(json.dumps(read_json(path) | content))
        cfg = OmegaConf.load(run / "config.yaml")
        for key, value in (config or {}).items():
            OmegaConf.update(cfg, key, value)
        OmegaConf.save(cfg, run / "config.yaml")
        return run

    return make


@pytest.fixture
def study(tmp_path) -> Path:
    return tmp_path / "study"


def rows_of(study: Path) -> pd.DataFrame:
    """table.md as people see it."""
    return read_markdown(study / "report" / "table.md")


def test_copies_of_a_run_count_once(another, study, caplog):
    another("a/one", "1" * 16)
    another("b/renamed", "1" * 16, latency_ratio=0.5)
    another("b/two", "2" * 16, {"seed": 1})
    page = report_set(study).read_text()
    assert list(rows_of(study)["runs"]) == ["2"]
    assert list(pd.read_csv(study / "report" / "results.csv")["run"]) == ["one", "two"]
    note = "Folders that hold a run that is counted already: b/renamed (as a/one)."
    assert note in page and note in caplog.text


def test_latencies_of_other_batches_or_devices_are_not_compared(another, study, caplog):
    another("one", "1" * 16, latency_ratio=0.8, latency_batch=16, device="cpu")
    another("two", "2" * 16, {"seed": 1}, latency_ratio=0.6, latency_batch=16, device="cpu")
    page = report_set(study)
    assert (page.parent / LATENCIES).exists()
    assert rows_of(study)["latency"][0].startswith("x0.70") and "measured at" not in page.read_text()

    greedy = {"selection.name": "greedy"}
    another("three", "3" * 16, greedy, latency_ratio=0.9, latency_batch=1, device="cpu")
    page = report_set(study)
    note = "Latencies were measured at batch 1, cpu; batch 16, cpu: these are not comparable."
    assert note in page.read_text() and note in caplog.text
    assert not (page.parent / LATENCIES).exists()
    assert list(rows_of(study)["latency"]) == ["x0.90 (batch 1, cpu)", "x0.70 ± 0.14 (batch 16, cpu)"]
    assert "<td>batch 1, cpu</td>" in page.read_text()

    another("four", "4" * 16, {**greedy, "seed": 1}, latency_ratio=0.2, latency_batch=1, device="gpu")
    page = report_set(study)
    table = rows_of(study)
    assert list(table["runs"]) == ["2", "2"] and list(table["latency"]) == ["", "x0.70 ± 0.14 (batch 16, cpu)"]
    assert "<td>batch 1, cpu; batch 1, gpu</td>" in page.read_text()
    latencies = pd.read_csv(study / "report" / "results.csv")[["latency_at", "latency_ratio"]]
    assert dict(latencies.to_numpy())["batch 1, gpu"] == 0.2


def test_seeds_timed_on_other_devices_give_no_latency_figure(another, study):
    for seed, device in enumerate(("cpu", "gpu")):
        another(device, str(seed), {"seed": seed}, device=device)
    assert not (report_set(study).parent / LATENCIES).exists()
    assert list(rows_of(study)["latency"]) == [""]


def test_latency_plans_of_other_devices_are_separate_rows(another, study):
    for seed, device in ((0, "cpu"), (1, "cpu"), (1, "gpu")):  # what it was timed on is not in a run's id
        another(f"{seed} {device}", str(seed), {"seed": seed, "selection.budget": "latency"}, device=device)
    table = average_over_seeds(collect_runs(study))
    assert sorted(zip(table["runs"], table["method"], strict=True)) == [
        (1, "output_loss, device=gpu"),
        (2, "output_loss, device=cpu"),
    ]


def test_runs_of_other_teacher_weights_are_separate_rows(another, study):
    one = another("one", "1" * 16)
    another("two", "2" * 16, {"seed": 1})
    table = average_over_seeds(collect_runs(study))
    name = OmegaConf.load(one / "config.yaml").teacher.name
    assert list(table["runs"]) == [2] and list(table["teacher"]) == [name] and list(table["method"]) == ["output_loss"]
    another("three", "3" * 16, {"seed": 2}, {"teacher": "0123456789abcdef"})
    table = average_over_seeds(collect_runs(study))
    known = {read_json(one / "plan.json")["teacher"][:8]: 2, "01234567": 1}
    assert dict(zip(table["teacher"], table["runs"], strict=True)) == {f"{name} ({key})": n for key, n in known.items()}
    assert set(table["method"]) == {f"output_loss, teacher {name} ({key})" for key in known}
    assert len(list(report_set(study).parent.glob("quality_over_ratio*.png"))) == 2


@pytest.mark.parametrize("latents", ["/gone", "ROOT/runs/gone"])
def test_a_report_needs_no_stored_latents(another, study, latents, monkeypatch, capsys):
    another("one", "1" * 16, {"latents": latents})
    another("two", "2" * 16, {"latents": latents, "seed": 1})
    another("three", "3" * 16)
    monkeypatch.setattr(sys, "argv", ["report", str(study)])
    main()
    assert "page: " in capsys.readouterr().out
    table = average_over_seeds(collect_runs(study))
    assert dict(zip(table["method"], table["runs"], strict=True)) == {
        f"output_loss, latents={latents}": 2,
        "output_loss, latents=None": 1,
    }


def test_rows_that_differ_in_another_field_show_it(another, study):
    another("one", "1" * 16)
    report_set(study)
    assert list(rows_of(study)["criterion"]) == ["output_loss"]
    another("two", "2" * 16, {"calibration.samples": 3})
    page = report_set(study).read_text()
    samples = OmegaConf.load(study / "one" / "config.yaml").calibration.samples
    names = [f"output_loss, calibration.samples={count}" for count in (samples, 3)]
    assert sorted(rows_of(study)["method"]) == sorted(names)
    assert all(f"<td>{name}</td>" in page for name in names)


def test_rows_that_differ_in_an_optional_group_show_it(another, study):
    another("one", "1" * 16)
    another("two", "2" * 16, {"calibration.data": {"name": "other", "path": "/other"}})
    assert average_over_seeds(collect_runs(study))["method"].nunique() == 2


def test_a_repair_has_a_column_and_tells_rows_apart(another, study):
    another("one", "1" * 16)
    report_set(study)
    assert "repair" not in rows_of(study)
    target = "lightning_modules.modules.repair.LeastSquares"
    repair = {"repair.name": "least_squares", "repair._target_": target, "repair.samples": 64}
    run = another("two", "2" * 16, repair)
    values = {"pruned/output_loss": 0.5, "eval/output_loss": 0.125}
    (run / "metrics.json").write_text(json.dumps(read_json(run / "metrics.json") | values))
    report_set(study)
    rows = rows_of(study)
    assert list(rows["repair"]) == ["least_squares", "none"] and list(rows["criterion"]) == ["output_loss"] * 2
    assert list(rows["gap closed"]) == ["0.75", "0.00"]
    methods = average_over_seeds(collect_runs(study))["method"]
    assert list(methods) == ["output_loss, repair least_squares", "output_loss, repair none"]


def test_runs_of_several_ratios_are_drawn_as_curves(another, study):
    another("one", "1" * 16)
    plan = {"selection.name": "greedy", "selection.ratio": 0.7}
    run = another("two", "2" * 16, plan)
    metrics = read_json(run / "metrics.json") | {"plan/requested_ratio": 0.7}
    (run / "metrics.json").write_text(json.dumps(metrics))
    folder = report_set(study).parent
    assert (folder / "quality_over_ratio.png").exists() and not (folder / "quality_by_method.png").exists()


def test_the_page_of_a_run_says_what_a_repair_did(another):
    """The first site was refitted, the second was left alone; a repair without sites is a sentence."""
    run = another("one", "1" * 16)
    assert "<h2>Repair" not in report_page(run)
    fitted = {"layer": "a.conv2", "feature_map": "a", "ridge": 0.01, "error_left": 0.255}
    left = {"layer": "b.conv2", "feature_map": "b", "reason": "no ridge lowers the error on held-out samples"}
    record = {"output_loss_before": 0.02, "output_loss": 0.005, "step": 0.5, "sites": [fitted, left]}
    (run / "repair.json").write_text(json.dumps(record))
    page = report_page(run)
    assert "0.02 before, 0.005 after, with 0.5 of the computed change" in page
    assert "<td>a.conv2</td><td>a</td><td>25.5 %</td><td>0.01</td>" in page
    assert "as it was: no ridge lowers the error on held-out samples" in page
    (run / "repair.json").write_text(json.dumps({"sites": [], "step": 0.0}))
    assert "No layer stands where it could make up for a removed unit" in report_page(run)


def report_page(run: Path) -> str:
    report_run(run)
    return (run / "report.html").read_text()
