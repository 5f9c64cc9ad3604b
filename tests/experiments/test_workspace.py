"""The workspace and the report of Weights & Biases, built from the library's own objects, without a network."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from wandb_workspaces.reports.v2 import interface

from conf.schema import ROOT
from experiments.reporting import workspace

SECTIONS = ["Quality", "Loss balance", "Training", "Samples", "All runs"]


def to_spec(model: Any) -> dict[str, Any]:
    """What is sent to W&B."""
    return json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))


@pytest.fixture
def project(monkeypatch) -> None:
    """The project exists in W&B."""
    monkeypatch.setattr(interface, "_get_api", lambda: None)
    monkeypatch.setattr(interface, "execute_graphql", lambda *_: {"project": {"internalId": "P1"}})


def test_a_workspace_compares_the_runs_of_a_project():
    view = workspace.make_workspace("team", "prunings", ["fid", "kid"])._to_model()
    assert (view.entity, view.project, view.display_name) == ("team", "prunings", "secateur")
    sections = to_spec(view)["section"]["panelBankConfig"]["sections"]
    panels = {section["name"]: [panel["config"] for panel in section["panels"]] for section in sections}
    assert [name for name in panels if name in SECTIONS] == SECTIONS
    quality = panels["Quality"]
    assert [(panel["xAxis"], panel["metrics"]) for panel in quality] == [
        (x, [key]) for x in ("plan/requested_ratio", "latency_ratio") for key in ("eval/fid", "eval/kid")
    ]
    assert {(panel["groupBy"], panel["groupAgg"], panel["groupArea"]) for panel in quality} == {
        ("criterion_name.value", "mean", "stddev")
    }
    assert [panel["metricRegex"] for panel in panels["Loss balance"]] == [
        *("^train/feature/.*", "^train/weighted_feature/.*", "^train/(loss|task|output)$"),
    ]
    assert all(panel["xAxis"] == "trainer/global_step" for name in SECTIONS[1:3] for panel in panels[name])
    assert [panel["mediaKeys"] for panel in panels["Samples"]] == [["train/samples"], ["samples"], ["strip"]]
    (lines,) = panels["All runs"]
    assert [column["accessor"] for column in lines["columns"]] == [
        *(f"config:{name}.value" for name in ("criterion_name", "selection_name", "selection_ratio")),
        *(f"summary:{name}" for name in ("student/params", "student/macs", "student/latency_ms")),
        *(f"summary:eval/{name}" for name in ("output_loss", "fid", "kid")),
    ]


def test_a_report_has_the_same_panels_with_a_text_each(project):
    model = workspace.make_report("team", "prunings", ["fid"])._to_model()
    assert (model.project.entity_name, model.project.name, model.display_name) == ("team", "prunings", "secateur")
    blocks = to_spec(model)["blocks"]
    grids = [block["metadata"] for block in blocks if block["type"] == "panel-grid"]
    assert [block["children"][0]["text"] for block in blocks if block["type"] == "heading"] == SECTIONS
    view = workspace.make_workspace("team", "prunings", ["fid"])
    for grid, section in zip(grids, view.sections, strict=True):
        panels = grid["panelBankSectionConfig"]["panels"]
        assert [panel["viewType"] for panel in panels] == [panel._to_model().view_type for panel in section.panels]
        assert len({(panel["layout"]["x"], panel["layout"]["y"]) for panel in panels}) == len(panels)
        (runs,) = grid["runSets"]
        assert runs["project"] == {"entityName": "team", "name": "prunings", "id": "P1"}


class Run:
    def __init__(self, *keys: str) -> None:
        self.summary = dict.fromkeys(keys, 1.0)


@pytest.mark.parametrize(
    ("runs", "measures"),
    [
        (
            [Run("eval/output_loss", "eval/fid", "eval/kid", "eval/params", "train/loss"), Run("eval/other")],
            ["fid", "kid"],
        ),
        ([Run("eval/output_loss", "eval/task_loss", "eval/weights")], ["output_loss"]),
        ([], ["output_loss"]),
    ],
)
def test_the_measures_are_those_of_the_newest_finished_run(runs, measures):
    class Api:
        def runs(self, path: str, filters: dict[str, str], order: str, per_page: int) -> list[Run]:
            assert (path, filters, order) == ("team/prunings", {"state": "finished"}, "-created_at")
            return runs

    assert workspace.find_measures(Api(), "team/prunings") == measures


def test_the_command_saves_both_and_prints_where_they_are(monkeypatch, capsys, project):
    saved = []
    for kind in (workspace.Workspace, workspace.reports.Report):
        monkeypatch.setattr(kind, "save", lambda view: saved.append(type(view).__name__))
        monkeypatch.setattr(kind, "url", property(lambda view: f"https://wandb.ai/{view.entity}/{view.project}"))
    monkeypatch.setattr(workspace, "has_wandb_key", lambda: True)
    monkeypatch.setattr(sys, "argv", ["dashboard", "team/prunings", "--measure", "fid"])
    workspace.main()
    assert saved == ["Workspace", "Report"]
    assert capsys.readouterr().out == "https://wandb.ai/team/prunings\n" * 2


@pytest.mark.parametrize(
    ("project_name", "message"),
    [
        ("team/prunings", "there is no key of W&B on this machine, so nothing was sent: run `wandb login`"),
        ("prunings", "'prunings' is no project of W&B; choose ENTITY/PROJECT"),
        ("a/b/c", "'a/b/c' is no project of W&B; choose ENTITY/PROJECT"),
    ],
)
def test_without_a_key_or_a_project_it_says_what_to_do(monkeypatch, capsys, project_name, message):
    monkeypatch.setattr(workspace, "has_wandb_key", lambda: False)
    monkeypatch.setattr(sys, "argv", ["dashboard", project_name])
    with pytest.raises(SystemExit) as caught:
        workspace.main()
    assert message in f"{caught.value}{capsys.readouterr().err}"


def test_without_the_extra_the_command_names_it(tmp_path: Path):
    hide = "import sys; sys.modules['wandb_workspaces'] = None; "
    process = subprocess.run(
        [sys.executable, "-c", f"{hide}import experiments.dashboard"], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 1
    assert process.stderr.strip() == "this command needs wandb-workspaces: pip install -e '.[dashboard]'"
