"""The report of one run: every network and every stage it had, also where an earlier version made it."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from experiments.engine.artefacts import digest, read_json
from experiments.reporting import figures
from experiments.reporting.figures import draw_losses, draw_unit_scores, set_log_scale
from experiments.reporting.run_files import (
    list_histories,
    list_networks,
    list_removed_units,
    read_plans,
    read_scorings,
)
from experiments.reporting.run_page import list_costs, report_run, tabulate_quality

ROUNDS = {"networks": ["teacher", "small", "trained", "smaller"], "plan/budget": "params"}
ROUNDS |= {f"{name}/params": count for name, count in zip(ROUNDS["networks"], (4000, 3000, 3000, 1500), strict=True)}


def write(folder: Path, **contents: Any) -> Path:
    """JSON files by name; "_" is "-" in their names."""
    for name, content in contents.items():
        (folder / f"{name.replace('_', '-', 1)}.json").write_text(json.dumps(content))
    return folder


def scores_of(*names: str, **more: Any) -> dict[str, Any]:
    return {"criterion": "taylor", "scores": {name: {"score": 1.0 + place} for place, name in enumerate(names)}, **more}


def plan_of(scores: dict[str, Any], *removed: str, **more: Any) -> dict[str, Any]:
    changes = [{"kind": "bypass", "unit": name} for name in removed]
    return {"scores": digest(scores["scores"]), "teacher": "t", "changes": changes, **more}


def test_networks_are_listed_in_the_order_of_the_run():
    assert list_networks(ROUNDS) == ["teacher", "small", "trained", "smaller"]
    old = {"run_id": "a", "distilled/output_loss": 1, "teacher/task_loss": 2, "pruned/output_loss": 3, "eval/x": 4}
    assert list_networks(old) == ["teacher", "pruned", "distilled"]
    del old["distilled/output_loss"]
    assert list_networks(old) == ["teacher", "pruned"]


def test_costs_are_listed_where_they_change():
    assert dict(list_costs(ROUNDS)) == {"parameters": "4,000 -> 3,000 -> 1,500"}
    two = {"networks": ["teacher", "pruned"], "plan/budget": "params", "teacher/params": 4000, "pruned/params": 4000}
    assert dict(list_costs(two)) == {"parameters": "4,000 -> 4,000"}


def test_the_table_of_qualities_contains_no_costs():
    metrics = ROUNDS | {
        "small/loss": 1.0,
        "smaller/loss": 2.0,
        "teacher/loss": 0.5,
        "smaller/kid": 3.0,
        "eval/fid": 4.0,
    }
    expected = {"kid": [None, None, None, 3.0], "loss": [0.5, 1.0, None, 2.0]}
    assert tabulate_quality(metrics, ROUNDS["networks"]) == expected


def test_scores_of_several_stages_are_matched_with_their_plans(tmp_path):
    first, second = scores_of("a", "b", "c", level="depth"), scores_of("a", "c", level="depth")
    plans = {"plan": plan_of(first, "b", protected=["a"]), "plan_again": plan_of(second, "c", protected=["a"])}
    write(tmp_path, scores=first, scores_again=second, **plans)
    one, two = read_scorings(tmp_path, read_plans(tmp_path))
    assert (one.name, one.removed, one.protected, list(one.scores)) == ("scores", ["b"], ["a"], ["a", "b", "c"])
    assert (two.name, two.removed, two.protected, list(two.scores)) == ("scores-again", ["c"], ["a"], ["a", "c"])
    assert list_removed_units(read_plans(tmp_path)) == ["b", "c"]


@pytest.mark.parametrize(
    ("names", "level", "expected"),
    [
        (("a:0", "a:1"), None, True),  # version 0.1 stored no level
        (("a", "b"), None, False),
        (("a", "b"), "channel", True),
        (("a:0", "b"), "depth", False),
    ],
)
def test_channel_units_are_recognised_by_their_level(tmp_path, names, level, expected):
    scores = scores_of(*names, **({} if level is None else {"level": level}))
    write(tmp_path, scores=scores)
    assert [scoring.has_channels for scoring in read_scorings(tmp_path, [])] == [expected]


def test_losses_of_each_training_stage_are_drawn(tmp_path):
    assert list_histories(tmp_path) == {}
    (tmp_path / "metrics.csv").write_text("step,name,value\n")
    assert list_histories(tmp_path) == {"distil": tmp_path / "metrics.csv"}
    (tmp_path / "history").mkdir()
    for stage in ("finetune", "distil"):
        (tmp_path / "history" / f"{stage}.csv").write_text("step,name,value\n")
    paths = {stage: tmp_path / "history" / f"{stage}.csv" for stage in ("distil", "finetune")}
    assert list(list_histories(tmp_path).items()) == list(paths.items())


def read_labels(axis: Any, which: str) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels(which=which) if label.get_text()]


@pytest.mark.parametrize("direction", ["x", "y"])
@pytest.mark.parametrize(
    ("limits", "major", "minor"),
    [
        ((0.01, 10), {"0.01", "0.1", "1", "10"}, set()),
        ((0.2, 0.9), set(), {"0.2", "0.3", "0.4", "0.6"}),
        ((2e5, 2e7), {"1e+06", "1e+07"}, set()),
    ],
)
def test_the_labels_of_logarithmic_axes_are_plain_numbers(direction, limits, major, minor):
    figure, axes = plt.subplots()
    set_log_scale(axes, direction)
    axes.set(**{f"{direction}lim": limits})
    figure.canvas.draw()
    axis = getattr(axes, f"{direction}axis")
    assert major <= set(read_labels(axis, "major")) and minor <= set(read_labels(axis, "minor"))
    assert not any("$" in label for which in ("major", "minor") for label in read_labels(axis, which))
    plt.close(figure)


def test_scores_over_several_decades_have_plain_labels(tmp_path, monkeypatch):
    labels: list[str] = []

    def save(figure: Any, path: Path) -> Path:
        figure.canvas.draw()
        labels.extend(read_labels(figure.axes[0].xaxis, "major"))
        plt.close(figure)
        return path

    monkeypatch.setattr(figures, "save_figure", save)
    draw_unit_scores({"a": {"score": 0.01}, "b": {"score": 1.0}}, ["a"], "taylor", tmp_path / "scores.png")
    assert {"0.01", "0.1", "1"} <= set(labels) and not any("$" in label for label in labels)


def test_a_history_without_losses_has_no_figure(tmp_path):
    history = pd.DataFrame({"step": [1], "name": ["lr"], "value": [0.1]})
    assert draw_losses(history, tmp_path / "losses.png") is None and not (tmp_path / "losses.png").exists()
    loss = history.assign(name="train/loss")
    assert draw_losses(loss, tmp_path / "losses.png") == tmp_path / "losses.png"
    assert (tmp_path / "losses.png").stat().st_size > 1000


@pytest.fixture
def rounds(tmp_path: Path) -> Path:
    """The folder of a run with two rounds of pruning and two trainings, as far as a report reads it."""
    first, second = scores_of("a", "b", level="depth"), scores_of("a", level="depth")
    metrics = ROUNDS | {"plan/requested_ratio": None, "plan/achieved_ratio": 0.625, "plan/removed_units": 2}
    metrics |= {f"{name}/output_loss": 0.5 for name in ("small", "trained", "smaller")}
    measured = {"teacher/latency_ms": 2.0, "student/latency_ms": 1.0, "latency_ratio": 0.5, "latency_batch": 1}
    measured |= {"device": "cpu", "peak_memory_bytes": 1, "seconds": {"distil": 1.5}}
    write(tmp_path, scores=first, scores_again=second, plan=plan_of(first, "b"), plan_again=plan_of(second, "a"))
    write(tmp_path, metrics=metrics, measured=measured)
    (tmp_path / "config.yaml").write_text("data: {}\n")
    (tmp_path / "history").mkdir()
    for stage in ("distil", "finetune"):
        (tmp_path / "history" / f"{stage}.csv").write_text("step,name,value\n1,train/loss,0.5\n2,train/loss,0.25\n")
    return tmp_path


def test_a_report_of_several_rounds_shows_all_of_them(rounds):
    summary = report_run(rounds)
    assert "4,000 -> 3,000 -> 1,500" in summary
    assert "0.50000 small -> 0.50000 trained -> 0.50000 smaller" in summary
    page = (rounds / "report.html").read_text()
    names = {"losses_distil", "losses_finetune", "scores", "scores_again"}
    assert {path.stem for path in (rounds / "figures").iterdir()} == names and page.count("<img ") == 4
    assert "<th>teacher</th><th>small</th><th>trained</th><th>smaller</th>" in page
    assert "Losses of the stage finetune" in page and "Scores of the units (scores-again.json)" in page
    assert page.count('<tr class="gone"><td>b</td>') == page.count('<tr class="gone"><td>a</td>') == 1
    assert "<td>distil</td><td>1.5 s</td>" in page
    assert f"<code>{shlex.join(['python', '-m', 'experiments.report', str(rounds.parent)])}</code>" in page


@pytest.mark.parametrize("budget", ["params", "latency"])
def test_the_page_says_where_the_job_of_another_plan_times_again(rounds, budget):
    plan = {"ratio": 0.5, "harm": 1.0, "removed_units": 1, "params": 2000, "latency_ms": 1.0, "removed": [0]}
    totals = {"params": 4000, "latency_ms": 2.0}
    front = {"budget": budget, "totals": totals, "chosen": plan, "plans": [{"selection_ratio": 0.5, **plan}]}
    write(rounds, pareto=front)
    (rounds / "config.yaml").write_text("data: {}\nselection: {tolerance: 0.02}\n")
    report_run(rounds)
    page = (rounds / "report.html").read_text()
    assert f"<code>selection.ratio=0.5 selection.budget={budget} selection.pareto=false</code>" in page
    assert ("times the units again, so that its plan can differ" in page) == (budget == "latency")


def test_a_report_can_be_made_of_a_run_of_version_0_1(rounds):
    for name in ("scores-again.json", "plan-again.json"):
        (rounds / name).unlink()
    (rounds / "history" / "distil.csv").rename(rounds / "metrics.csv")
    shutil.rmtree(rounds / "history")
    scores = scores_of("a:0", "a:1")
    metrics = {key: value for key, value in read_json(rounds / "metrics.json").items() if key.startswith("plan/")}
    metrics |= {"teacher/params": 4000, "student/params": 2000, "teacher/task_loss": 1.0}
    metrics |= {"pruned/output_loss": 0.5, "distilled/output_loss": 0.25}
    write(rounds, scores=scores, plan=plan_of(scores, "a:1"), metrics=metrics)
    assert "4,000 -> 2,000" in report_run(rounds)
    page = (rounds / "report.html").read_text()
    assert "<th>teacher</th><th>pruned</th><th>distilled</th>" in page and "<h2>Distillation</h2>" in page
    assert "<td>a</td><td>2</td><td>1</td>" in page and "a:1" not in page
    assert {path.stem for path in (rounds / "figures").iterdir()} == {"losses", "scores"}
