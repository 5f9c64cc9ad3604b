"""The pictures of one run and of a comparison of runs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen; before pyplot is imported

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments.reporting.tables import are_channels, channel_units, timed_alike

plt.rcParams["text.parse_math"] = False  # a `$` in a run's name is a dollar

KEPT, REMOVED, PROTECTED = "#4c78a8", "#e45756", "#9d9d9d"


def unit_scores(
    scores: dict[str, dict[str, float]],
    removed: Sequence[str],
    criterion: str,
    path: Path,
    protected: Sequence[str] = (),
) -> None:
    """A bar a unit, in the order of the forward pass; removed ones in red, protected ones in grey; standard errors.

    Channels are too many for that: there is a column a group.
    """
    if are_channels(scores):
        channel_groups(scores, set(removed), criterion, path)
        return
    names, values = list(scores), np.array([entry["score"] for entry in scores.values()])
    errors = np.array([entry.get("standard_error", 0.0) for entry in scores.values()])
    figure, axis = plt.subplots(figsize=(8, 0.22 * len(names) + 1.2))
    colours = [REMOVED if name in removed else PROTECTED if name in protected else KEPT for name in names]
    axis.barh(names, values, color=colours, xerr=errors if errors.any() else None, error_kw={"lw": 0.8})
    if (values > 0).all() and values.max() > 50 * values.min():
        axis.set_xscale("log")
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    axis.set_xlabel(f"{criterion}: harm if removed")
    note = f", {len(protected)} protected (grey)" if protected else ""
    axis.set_title(f"{len(removed)} of {len(names)} units removed (red){note}", fontsize=10)
    save(figure, path)


def channel_groups(scores: dict[str, dict[str, float]], removed: set[str], criterion: str, path: Path) -> None:
    """A column a group of channels: the share of it that stays and goes, and below it the score of every unit.

    Thousands of units stay readable, and one sees how far a threshold divides the scores of each layer.
    """
    table = channel_units(scores, removed)
    gone = table.groupby("group", sort=False)["removed"].agg(["sum", "size", "mean"])
    places = table["group"].map({name: place for place, name in enumerate(gone.index)})
    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(min(max(0.15 * len(gone) + 1.5, 6), 18), 5.5), gridspec_kw={"hspace": 0.05}
    )
    above.bar(range(len(gone)), 1 - gone["mean"], color=KEPT, width=0.9)
    above.bar(range(len(gone)), gone["mean"], bottom=1 - gone["mean"], color=REMOVED, width=0.9)
    above.set_ylabel("share that stays")
    above.set_title(f"{len(removed)} of {len(table)} units in {len(gone)} groups removed (red)", fontsize=10)
    for is_gone, colour in ((False, KEPT), (True, REMOVED)):
        some = table["removed"] == is_gone
        below.scatter(places[some], table["score"][some], s=4, color=colour, linewidths=0)
    if spans(list(table["score"].quantile([0.5, 0.9])), 20) and (table["score"] > 0).all():
        below.set_yscale("log")
    below.set_ylabel(criterion)
    names = [f"{name}  {row['size'] - row['sum']:.0f}/{row['size']:.0f}" for name, row in gone.iterrows()]
    below.set_xticks(range(len(gone)), names, rotation=90, fontsize=6)
    below.set_xlim(-0.7, len(gone) - 0.3)
    save(figure, path)


def loss_curves(history: pd.DataFrame, path: Path) -> None:
    """The loss and its terms over the steps, and each feature level before and after its weight."""
    series = {name.removeprefix("train/"): part for name, part in history.groupby("name") if name.startswith("train/")}
    panels = {
        "loss": [name for name in ("loss", "task", "output") if name in series],
        "feature loss by level, as it is": sorted(name for name in series if name.startswith("feature/")),
        "feature loss by level, weighted": sorted(name for name in series if name.startswith("weighted_feature/")),
    }
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False)
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            mark = "o" if len(series[name]) == 1 else None  # a line of one point is none
            axis.plot(series[name]["step"], series[name]["value"], lw=1, marker=mark, label=name.split("/")[-1])
        axis.set_yscale("log")
        axis.set_xlabel("optimiser step")
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=7)
    save(figure, path)


def sample_grids(images: dict[str, np.ndarray], path: Path, side: int = 8) -> None:
    """Grids of each network's samples from the same seeds, side by side."""
    figure, axes = plt.subplots(1, len(images), figsize=(4.2 * len(images), 4.5), squeeze=False)
    side = min(side, math.ceil(math.sqrt(min(len(batch) for batch in images.values()))))
    for axis, (name, batch) in zip(axes[0], images.items(), strict=True):
        axis.imshow(grid(batch, side).squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(name)
        axis.axis("off")
    save(figure, path, dpi=150)


def grid(images_NHWC: np.ndarray, side: int) -> np.ndarray:
    """The first side x side images as one (H,W,C) picture, black where there are fewer."""
    count, height, width, channels = images_NHWC.shape
    shown = np.zeros((side * side, height, width, channels), np.uint8)
    shown[: min(count, side * side)] = images_NHWC[: side * side]
    return (
        shown.reshape(side, side, height, width, channels).swapaxes(1, 2).reshape(side * height, side * width, channels)
    )


def spans(values: Sequence[float | None], factor: float) -> bool:
    """Do positive values differ by more than this factor, so that a logarithmic axis shows them better?"""
    there = [value for value in values if value is not None and not math.isnan(value)]
    return bool(there) and min(there) > 0 and max(there) > factor * min(there)


def comparison(table: pd.DataFrame, folder: Path, suffix: str = "") -> list[Path]:
    """Draw runs that may share one pair of axes, as bars instead of curves where all have one ratio.

    Returns the files of the pictures.
    """
    name, level = table["metric"].iloc[0], table["quality_teacher"].mean()
    level = None if pd.isna(level) else level
    measure = f"{'output loss' if pd.isna(name) or not name else name} ({table['better'].iloc[0]} is better)"
    wide = table["better"].iloc[0] == "lower" and spans([*table["quality"], level], 20)
    drawn = []
    if timed_alike(table):  # latencies of several batches or devices share no axis
        drawn.append(folder / f"quality_over_latency_ratio{suffix}.png")
        curves(table, "latency_ratio", "quality", ("latency, student / teacher", measure), drawn[0], level, log=wide)
    if 1 < len(table) == table["method"].nunique() and table["ratio"].nunique() == 1:
        drawn.append(folder / f"quality_by_method{suffix}.png")
        bars(table, measure, drawn[-1], level)
        return drawn
    drawn.append(folder / f"quality_over_ratio{suffix}.png")
    curves(table, "ratio", "quality", ("fraction removed", measure), drawn[-1], level, log=wide)
    drawn.append(folder / f"output_loss_over_ratio{suffix}.png")
    labels = ("fraction removed", "joint output loss right after pruning")
    curves(table, "ratio", "output_loss_pruned", labels, drawn[-1], log=True)
    return drawn


def bars(table: pd.DataFrame, label: str, path: Path, level: float | None) -> None:
    """Two bars a method, the best one first: as pruned and in the end; spreads over seeds; `level` is the teacher's.

    One bar where nothing was trained.
    """
    higher = table["better"].iloc[0] == "higher"
    ordered = table.sort_values(["quality", "quality_pruned"], ascending=higher)
    places = np.arange(len(ordered))
    figure, axis = plt.subplots(figsize=(7, 0.55 * len(ordered) + 1.2))
    shown = [("quality_pruned", -0.2, PROTECTED, "as pruned"), ("quality", 0.2, KEPT, "in the end")]
    if (ordered["distillation"] == "none").all():
        shown = [("quality", 0.0, PROTECTED, "as pruned")]
    for column, offset, colour, name in shown:
        errors = ordered[f"{column} std"].fillna(0)
        drawn = axis.barh(
            places + offset, ordered[column], 0.38, xerr=errors if errors.any() else None, color=colour, label=name
        )
        axis.bar_label(drawn, fmt="%.4g", fontsize=7, padding=3)
    if level is not None:
        axis.axvline(level, color="black", ls=":", lw=1, label="teacher")
    if not higher and spans([*table["quality"], *table["quality_pruned"], level], 20):
        axis.set_xscale("log")
    axis.set_yticks(places, ordered["method"], fontsize=8)
    axis.margins(x=0.12)
    axis.set_xlabel(label)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, path)


def curves(
    groups: pd.DataFrame,
    x: str,
    y: str,
    labels: tuple[str, str],
    path: Path,
    level: float | None = None,
    log: bool = False,
) -> None:
    """y over x with a colour a method; bars are the spread over seeds; `level` is the teacher's."""
    figure, axis = plt.subplots(figsize=(6, 4.2))
    methods = list(groups.groupby("method"))
    colours = plt.get_cmap("tab10" if len(methods) <= 10 else "tab20").colors  # type: ignore[attr-defined]
    for place, (method, rows) in enumerate(methods):
        ordered = rows.sort_values(x)
        style = {"color": colours[place % len(colours)], "marker": "os^Dv"[place % 5], "ms": 5, "capsize": 3}
        axis.errorbar(ordered[x], ordered[y], yerr=ordered[f"{y} std"].fillna(0), label=method, **style)
    if log and (groups[y] > 0).all():
        axis.set_yscale("log")
    if level is not None:
        axis.axhline(level, color="black", ls=":", lw=1, label="teacher")
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)} if len(methods) > 5 else {}
    axis.legend(fontsize=8, **beside)
    axis.grid(alpha=0.3)
    save(figure, path)


def save(figure: Any, path: Path, dpi: int = 120) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
