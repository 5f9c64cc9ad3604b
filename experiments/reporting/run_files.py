"""What reports read from the folder of a run, also of one that an earlier version has made."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.engine.artefacts import digest, read_json

USUAL_NETWORKS = ("teacher", "pruned", "distilled")
"""Networks of runs whose metrics.json does not list them (version 0.1)."""


def list_networks(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of a run's networks in the order in which they were made, the teacher first."""
    if "networks" in metrics:
        return list(metrics["networks"])
    return [name for name in USUAL_NETWORKS if any(key.startswith(f"{name}/") for key in metrics)]


def list_samplings(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of a run's networks, then of those of their samples that have another number of steps."""
    networks = list_networks(metrics)
    return [*networks, *(name for name in metrics.get("protocol", {}).get("samplers", {}) if name not in networks)]


def list_histories(folder: Path) -> dict[str, Path]:
    """Return {training stage: CSV file with the columns step, name and value} of a run, ordered by stage name.

    A run of version 0.1 has a single file, metrics.csv, of the stage "distil".
    """
    paths = {path.stem: path for path in sorted((folder / "history").glob("*.csv"))}
    old = folder / "metrics.csv"
    return paths or ({"distil": old} if old.exists() else {})


def get_measures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return {measure: its own protocol} of a run; the first measure is the one that figures show."""
    measures: dict[str, Any] = metrics.get("protocol", {}).get("measures", {})
    return measures


def get_achieved_ratio(metrics: Mapping[str, Any], measured: Mapping[str, Any]) -> float:
    """Return the fraction of the budget that the built student saves.

    A latency budget's ratio is measured on the student, so it stands in measured.json.
    """
    ratio: float = {**metrics, **measured}["plan/achieved_ratio"]
    return ratio


def list_achieved_ratios(metrics: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return {budget: (ratio that was asked for, ratio that the built student saves)} of a run with several budgets.

    It is empty for a run with a single budget.
    """
    asked, figures = "plan/requested_ratio_", {**metrics, **measured}
    budgets = [key.removeprefix(asked) for key in metrics if key.startswith(asked)]
    return {name: (metrics[f"{asked}{name}"], figures[f"plan/achieved_ratio_{name}"]) for name in budgets}


def get_gap_closed(metrics: Mapping[str, Any]) -> float | None:
    """Return the share of the quality lost by pruning that the delivered network has regained, by the first measure.

    It is 1 at the teacher's quality and 0 at that of the network as pruned; None where one of the three is not known.
    """
    measure, networks = next(iter(get_measures(metrics)), "output_loss"), list_networks(metrics)
    if len(networks) < 2:
        return None
    usual = {"teacher/output_loss": 0.0}  # of the teacher to itself
    names = (f"teacher/{measure}", f"{networks[1]}/{measure}", f"eval/{measure}")
    teacher, pruned, delivered = ({**usual, **metrics}.get(name) for name in names)
    if teacher is None or pruned is None or delivered is None or pruned == teacher:
        return None
    return float((pruned - delivered) / (pruned - teacher))


@dataclass(frozen=True)
class Scoring:
    """The result of one score stage, and the units that were removed by these scores."""

    name: str
    """file name without its ending: `scores`, or `scores-again` of a stage of the name `again`"""
    criterion: str
    scores: dict[str, dict[str, float]]
    """{unit: {"score": ..., and "standard_error" where it is known}}, in the order of the forward pass"""
    removed: list[str]
    protected: list[str]
    """units that were kept whatever their scores"""
    has_channels: bool
    """True where units are channels; there may be thousands of them, so they are shown by group"""


def read_scorings(folder: Path, plans: list[dict[str, Any]]) -> list[Scoring]:
    """Return what each score stage of a run found; a run whose selection needs no scores has none.

    Args:
        folder: the run's folder.
        plans: the contents of all its plan files. Where there are several scores, each plan is matched with its own.
    """
    paths = sorted(folder.glob("scores*.json"), key=lambda path: path.stem)
    scorings = []
    for path in paths:
        stored = read_json(path)
        scores_key = digest(stored["scores"])
        own_plans = [plan for plan in plans if len(paths) == 1 or plan["scores"] == scores_key]
        scorings.append(
            Scoring(
                path.stem,
                stored["criterion"],
                stored["scores"],
                list_removed_units(own_plans),
                list_protected_units(own_plans),
                has_channels(stored),
            )
        )
    return scorings


def list_decisions(names: Iterable[str], removed: Iterable[str], protected: Iterable[str]) -> dict[str, str]:
    """Return {unit: what became of it}, which is "removed", "protected" or "kept"."""
    removed, protected = set(removed), set(protected)
    return {name: "removed" if name in removed else "protected" if name in protected else "kept" for name in names}


def read_plans(folder: Path) -> list[dict[str, Any]]:
    """Return the contents of a run's plan files, plan.json first."""
    return [read_json(path) for path in sorted(folder.glob("plan*.json"), key=lambda path: path.stem)]


def list_removed_units(plans: list[dict[str, Any]]) -> list[str]:
    """Return the names of the units that plans remove or replace."""
    return [change["unit"] for plan in plans for change in plan["changes"] if "unit" in change]


def list_protected_units(plans: list[dict[str, Any]]) -> list[str]:
    """Return the names of the units that plans had to keep, each name once."""
    return list(dict.fromkeys(name for plan in plans for name in plan.get("protected", [])))


def has_channels(stored: Mapping[str, Any]) -> bool:
    """Tell whether the units of a scores.json are channels; without a level (version 0.1) their names tell."""
    level = stored.get("level")
    return any(":" in name for name in stored["scores"]) if level is None else level == "channel"
