"""The front of one scoring in the report of a run: a figure of all its plans, and a table of some of them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.engine.artefacts import read_json
from experiments.engine.identity import read_config
from experiments.reporting.figures import KEPT, REMOVED, save_figure, set_log_scale
from experiments.reporting.pages import encode_address
from experiments.reporting.tables import format_counts

STEPS = 20
"""The table shows the first plan at each of so many equal steps of the ratio."""
AXES = {"params": "parameters", "macs": "MACs", "latency_ms": "latency (ms)"}
"""{cost in pareto.json: its name for readers}"""


def report_fronts(folder: Path) -> list[dict[str, Any]]:
    """Draw the front of each select stage that made one, and return what the run's page says about it."""
    return [
        describe_front(path, folder / "figures", read_config(folder)["selection"])
        for path in sorted(folder.glob("pareto*.json"))
    ]


def describe_front(path: Path, figures: Path, selection: Mapping[str, Any]) -> dict[str, Any]:
    """Draw one front as <name>.png, and return its figure and its table for the page.

    Args:
        path: pareto.json.
        figures: the folder of the figures.
        selection: the configuration of the selection.
    """
    front = read_json(path)
    plans, costs = front["plans"], [name for name in AXES if name in front["totals"]]
    shown, figure = choose_plans(front), draw_front(front, figures / f"{path.stem.replace('-', '_')}.png")
    texts = [[f"{plan['ratio']:.4f}", f"{plan['harm']:.4g}", str(plan["removed_units"])] for plan in shown]
    for name in costs:
        left = [plan[name] for plan in shown]
        column = [f"{value:.1f}" for value in left] if name == "latency_ms" else format_counts(left)
        for cells, text in zip(texts, column, strict=True):
            cells.append(text.replace(" ", "\N{NO-BREAK SPACE}"))
    return {
        "name": path.stem,
        "count": len(plans),
        "budget": front["budget"],
        "has_latency": "latency_ms" in costs,
        "is_on_front": any(is_chosen(front, plan) for plan in plans),
        "figure": encode_address(figure.read_bytes(), "image/png"),
        "columns": ["ratio", "harm", "units removed", *(AXES[name] for name in costs), "add to the command"],
        "rows": [
            {
                "cells": cells,
                "chosen": is_chosen(front, plan),
                "command": write_overrides(plan, front["budget"], selection),
            }
            for plan, cells in zip(shown, texts, strict=True)
        ],
    }


def is_chosen(front: Mapping[str, Any], plan: Mapping[str, Any]) -> bool:
    """Tell whether a plan of the front is the one that the run has built."""
    return bool(plan["removed"] == front["chosen"]["removed"])


def choose_plans(front: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the first plan at each step of the ratio, and the plan that the run has built."""
    steps = [math.floor(plan["ratio"] * STEPS) for plan in front["plans"]]
    return [
        plan
        for plan, step, before in zip(front["plans"], steps, [-1, *steps], strict=False)
        if step != before or is_chosen(front, plan)
    ]


def write_overrides(plan: Mapping[str, Any], budget: str, selection: Mapping[str, Any]) -> str:
    """Return the words that make the knapsack choose a plan, added to the command of a run with this selection.

    `budget` is that of the front: without `selection.budgets`, which the words set to null, the default would apply.
    """
    words = [f"selection.ratio={plan['selection_ratio']}", f"selection.budget={budget}"]
    tolerance = selection.get("tolerance")
    if isinstance(tolerance, Mapping) or tolerance < plan["ratio"] - plan["selection_ratio"]:
        words.append("selection.tolerance=0.02")
    words += [f"selection.{name}=null" for name in ("target", "budgets") if selection.get(name) is not None]
    return " ".join([*words, "selection.pareto=false"])


def draw_front(front: Mapping[str, Any], path: Path) -> Path:
    """Draw the harm of all plans over what they leave of each cost, the plan of the run and the teacher marked."""
    plans, chosen, totals = front["plans"], front["chosen"], front["totals"]
    costs = [name for name in AXES if name in totals]
    figure, axes = plt.subplots(1, len(costs), figsize=(4.6 * len(costs), 3.8), sharey=True, squeeze=False)
    is_positive = all(plan["harm"] > 0 for plan in [*plans, chosen])
    for axis, name in zip(axes[0], costs, strict=True):
        scale = 1 if name == "latency_ms" else 1e9 if totals[name] >= 1e9 else 1e6
        letter = {1: "", 1e6: " (M)", 1e9: " (G)"}[scale]
        axis.plot(
            [plan[name] / scale for plan in plans],
            [plan["harm"] for plan in plans],
            color=KEPT,
            marker=".",
            ms=4,
            lw=0.8 if name.startswith(front["budget"]) else 0,
            label=f"{len(plans)} plans",
        )
        style = {"color": REMOVED, "marker": "*", "ms": 13, "lw": 0}
        axis.plot(chosen[name] / scale, chosen["harm"], label=f"this run, {chosen['ratio']:.3f} removed", **style)
        axis.axvline(totals[name] / scale, color="black", ls=":", lw=1, label="teacher")
        if is_positive:
            set_log_scale(axis, "y")
        axis.set_xlabel(f"{AXES[name]}{letter} left")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("harm (sum of scores)")
    axes[0][-1].legend(fontsize=8)
    return save_figure(figure, path)
