"""A workspace and a report of Weights & Biases that compare the runs of a project."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import wandb
from wandb_workspaces.reports import v2 as reports
from wandb_workspaces.workspaces import Section, Workspace

from conf.schema import RESERVED
from experiments.reporting.dashboard import STEP, has_wandb_key

NAME = "secateur"
"""Name of the workspace, and title of the report."""

CRITERION = reports.Config("criterion_name")
TEXTS = {
    "Quality": "Each line is a criterion: the mean over runs, with a band of one standard deviation over seeds. To "
    "compare something else, such as distillations, change what the panels are grouped by.",
    "Loss balance": "The feature loss of each level as it is, and multiplied by its weight: no level should dominate.",
    "Training": "The quality while training stands here if `evaluation.every_n_steps` is set.",
    "Samples": "Teacher and student from the same seeds, and the network with the removed units in red.",
    "All runs": "One line per run, from its settings to its quality.",
}
"""{section: what its panels show}"""


def make_panels(measures: Sequence[str]) -> dict[str, list[Any]]:
    """Return {section: panels}; `measures` are names below `eval/`, the most important one first."""
    quality = [f"eval/{name}" for name in measures]
    over_ratio = [draw_over("plan/requested_ratio", "fraction removed", key) for key in quality]
    over_latency = [draw_over("latency_ratio", "latency, student / teacher", key) for key in quality]
    media = reports.MediaBrowser(
        title="samples while training", media_keys=["train/samples"], grid_x_axis="step", grid_y_axis="run"
    )
    figures = [
        reports.MediaBrowser(title=title, media_keys=[key], num_columns=1)
        for title, key in (("samples", "samples"), ("the network, removed units in red", "strip"))
    ]
    columns: list[Any] = [
        *(reports.Config(name) for name in ("criterion_name", "selection_name", "selection_ratio")),
        *(reports.SummaryMetric(name) for name in ("student/params", "student/macs", "student/latency_ms")),
        *(reports.SummaryMetric(key) for key in ("eval/output_loss", *quality)),
    ]
    return {
        "Quality": [*over_ratio, *over_latency],
        "Loss balance": [
            draw_training("feature loss by level, as it is", "^train/feature/.*"),
            draw_training("feature loss by level, weighted", "^train/weighted_feature/.*"),
            draw_training("terms of the loss", "^train/(loss|task|output)$"),
        ],
        "Training": [
            draw_training("quality while training", "^train/eval/.*"),
            draw_training("gradient norm before clipping", "^train/gradient_norm$"),
            *(
                reports.LinePlot(title=key.replace("_", " "), x=STEP, y=[f"train/{key}"])
                for key in ("learning_rate", "samples_per_second", "peak_memory_gib")
            ),
        ],
        "Samples": [media, *figures],
        "All runs": [
            reports.ParallelCoordinatesPlot(
                columns=[reports.ParallelCoordinatesPlotColumn(column) for column in columns]
            )
        ],
    }


def draw_over(x: str, label: str, key: str) -> Any:
    """Return a panel of one figure of finished runs over another: a line per criterion, with a band over seeds."""
    return reports.LinePlot(
        title=f"{key.removeprefix('eval/')} over {label}, by criterion",
        x=x,
        y=[key],
        title_x=label,
        groupby=CRITERION,
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
        max_runs_to_show=100,
    )


def draw_training(title: str, pattern: str) -> Any:
    """Return a panel of all values of training whose names match a pattern, on a logarithmic axis."""
    return reports.LinePlot(title=title, x=STEP, metric_regex=pattern, log_y=True)


def make_workspace(entity: str, project: str, measures: Sequence[str]) -> Workspace:
    """Return the workspace; `save()` sends it to W&B."""
    sections = [Section(name=name, panels=panels, is_open=True) for name, panels in make_panels(measures).items()]
    return Workspace(entity=entity, project=project, name=NAME, sections=sections)


def make_report(entity: str, project: str, measures: Sequence[str]) -> reports.Report:
    """Return the report; `save()` sends it to W&B."""
    runs = reports.Runset(entity=entity, project=project, name="finished runs", filters="State = 'finished'")
    blocks: list[Any] = [reports.TableOfContents()]
    for name, panels in make_panels(measures).items():
        for number, panel in enumerate(panels):  # two panels beside each other, on a grid that is 24 wide
            panel.layout = reports.Layout(x=12 * (number % 2), y=8 * (number // 2), w=12, h=8)
        blocks += [reports.H1(name), reports.P(TEXTS[name]), reports.PanelGrid(runsets=[runs], panels=panels)]
    return reports.Report(entity=entity, project=project, title=NAME, blocks=blocks, width="fluid")


def find_measures(api: Any, path: str) -> list[str]:
    """Return the measures of the newest finished run of a project; ["output_loss"] where it has none."""
    for run in api.runs(path, filters={"state": "finished"}, order="-created_at", per_page=1):
        keys = [key.removeprefix("eval/") for key in run.summary.keys() if key.startswith("eval/")]  # noqa: SIM118
        if measures := [key for key in keys if key not in RESERVED]:
            return measures
        break
    return ["output_loss"]


def main() -> None:
    """Make a workspace and a report in a project of Weights & Biases that compare its runs."""
    parser = argparse.ArgumentParser(prog="python -m experiments.dashboard", description=main.__doc__)
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="the project, such as my-team/secateur")
    parser.add_argument(
        "--measure",
        action="append",
        help="a measure to show, such as fid; repeatable; default: those of the newest run",
    )
    arguments = parser.parse_args()
    entity, _, project = arguments.project.partition("/")
    if not (entity and project) or "/" in project:
        parser.error(f"{arguments.project!r} is no project of W&B; choose ENTITY/PROJECT, such as my-team/secateur")
    if not has_wandb_key():
        sys.exit(
            "there is no key of W&B on this machine, so nothing was sent: run `wandb login`, or set WANDB_API_KEY, "
            f"then this command again. Runs that were made offline are not in {arguments.project} before "
            "`wandb sync runs/*/*/wandb/offline-run-*`"
        )
    measures = arguments.measure or find_measures(wandb.Api(), arguments.project)
    for view in (make_workspace(entity, project, measures), make_report(entity, project, measures)):
        view.save()
        print(view.url)
