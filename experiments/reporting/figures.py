"""Figures of one run, and of a comparison of runs. Each drawing function returns what it has written."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")  # no screen; before pyplot is imported

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter

from experiments.reporting.run_files import list_decisions
from experiments.reporting.tables import have_comparable_latencies, tabulate_channels

plt.rcParams["text.parse_math"] = False  # a `$` in a run's name is a dollar

LABEL_LENGTH = 72
"""Longest line of a method's name in a figure, in characters; a longer name has several lines."""
SHORT_LABEL = 28
"""Longest name of a method that leaves room for the curves beside it, in characters; else the legend lies below."""

KEPT, REMOVED, PROTECTED = "#4c78a8", "#e45756", "#9d9d9d"
COLOURS = {"kept": KEPT, "removed": REMOVED, "protected": PROTECTED}
"""{what became of a unit: its colour}"""


class PlainLogFormatter(LogFormatter):
    """Labels the ticks of a logarithmic axis that matplotlib would label, as plain numbers without math text."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def set_log_scale(axes: Axes, direction: Literal["x", "y"]) -> None:
    """Make one axis of a figure logarithmic, with plain numbers as labels."""
    axes.set(**{f"{direction}scale": "log"})
    axis = axes.xaxis if direction == "x" else axes.yaxis
    axis.set_major_formatter(PlainLogFormatter())
    axis.set_minor_formatter(PlainLogFormatter())


def draw_unit_scores(
    scores: dict[str, dict[str, float]],
    removed: Sequence[str],
    criterion: str,
    path: Path,
    protected: Sequence[str] = (),
) -> Path:
    """Draw a bar per unit with its standard error; removed units are red, protected ones grey.

    Args:
        scores: {unit: {"score": ..., and "standard_error" where it is known}}, in the order of the forward pass.
        removed: names of the removed units.
        criterion: name of the criterion, for the axis.
        path: the PNG file to write.
        protected: names of the units that were kept whatever their scores.
    """
    names, values = list(scores), np.array([entry["score"] for entry in scores.values()])
    errors = np.array([entry.get("standard_error", 0.0) for entry in scores.values()])
    figure, axis = plt.subplots(figsize=(8, 0.22 * len(names) + 1.2))
    colours = [COLOURS[decision] for decision in list_decisions(names, removed, protected).values()]
    axis.barh(names, values, color=colours, xerr=errors if errors.any() else None, error_kw={"lw": 0.8})
    if (values > 0).all() and values.max() > 50 * values.min():
        set_log_scale(axis, "x")
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    axis.set_xlabel(f"{criterion}: harm if removed")
    note = f", {len(protected)} protected (grey)" if protected else ""
    axis.set_title(f"{len(removed)} of {len(names)} units removed (red){note}", fontsize=10)
    return save_figure(figure, path)


def draw_group_scores(scores: dict[str, dict[str, float]], removed: set[str], criterion: str, path: Path) -> Path:
    """Draw a column per group of channels: the shares kept and removed above, the score of every unit below.

    Thousands of units stay readable, and one sees how a threshold divides the scores of each layer.
    """
    table = tabulate_channels(scores, removed)
    groups = table.groupby("group", sort=False)["removed"].agg(["sum", "size", "mean"])
    columns = table["group"].map({name: column for column, name in enumerate(groups.index)})
    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(min(max(0.15 * len(groups) + 1.5, 6), 18), 5.5), gridspec_kw={"hspace": 0.05}
    )
    above.bar(range(len(groups)), 1 - groups["mean"], color=KEPT, width=0.9)
    above.bar(range(len(groups)), groups["mean"], bottom=1 - groups["mean"], color=REMOVED, width=0.9)
    above.set_ylabel("share that stays")
    above.set_title(f"{len(removed)} of {len(table)} units in {len(groups)} groups removed (red)", fontsize=10)
    for is_removed, colour in ((False, KEPT), (True, REMOVED)):
        chosen = table["removed"] == is_removed
        below.scatter(columns[chosen], table["score"][chosen], s=4, color=colour, linewidths=0)
    if spans_more_than(list(table["score"].quantile([0.5, 0.9])), 20) and (table["score"] > 0).all():
        set_log_scale(below, "y")
    below.set_ylabel(criterion)
    names = [f"{name}  {row['size'] - row['sum']:.0f}/{row['size']:.0f}" for name, row in groups.iterrows()]
    below.set_xticks(range(len(groups)), names, rotation=90, fontsize=6)
    below.set_xlim(-0.7, len(groups) - 0.3)
    return save_figure(figure, path)


def draw_losses(history: pd.DataFrame, path: Path) -> Path | None:
    """Draw the loss and its terms over the steps, and the feature loss of each level before and after weighting.

    `history` has the columns step, name and value. Returns None, without a file, where it has no loss.
    """
    series = {name.removeprefix("train/"): part for name, part in history.groupby("name") if name.startswith("train/")}
    panels = {
        "loss": [name for name in ("loss", "task", "output") if name in series],
        "feature loss by level, as it is": sorted(name for name in series if name.startswith("feature/")),
        "feature loss by level, weighted": sorted(name for name in series if name.startswith("weighted_feature/")),
    }
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False)
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        for name in names:
            marker = "o" if len(series[name]) == 1 else None  # a line through one point is invisible
            axis.plot(series[name]["step"], series[name]["value"], lw=1, marker=marker, label=name.split("/")[-1])
        set_log_scale(axis, "y")
        axis.set_xlabel("optimiser step")
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=7)
    return save_figure(figure, path)


def draw_sample_grids(images: dict[str, np.ndarray], path: Path, side: int = 8) -> Path:
    """Draw a grid per network, side by side, of at most side x side samples from the same seeds.

    `images` are (N,H,W,C) uint8 arrays by network.
    """
    figure, axes = plt.subplots(1, len(images), figsize=(4.2 * len(images), 4.5), squeeze=False)
    side = min(side, math.ceil(math.sqrt(min(len(batch) for batch in images.values()))))
    for axis, (name, batch) in zip(axes[0], images.items(), strict=True):
        axis.imshow(tile(batch, side).squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(name)
        axis.axis("off")
    return save_figure(figure, path, dpi=150)


def tile(images_NHWC: np.ndarray, side: int) -> np.ndarray:
    """Return the first side x side images as one (side*H,side*W,C) picture, black where there are fewer."""
    count, height, width, channels = images_NHWC.shape
    tiles = np.zeros((side * side, height, width, channels), np.uint8)
    tiles[: min(count, side * side)] = images_NHWC[: side * side]
    rows = tiles.reshape(side, side, height, width, channels).swapaxes(1, 2)
    return rows.reshape(side * height, side * width, channels)


def spans_more_than(values: Sequence[float | None], factor: float) -> bool:
    """Tell whether all values are positive and the largest is more than `factor` times the smallest.

    None and NaN are left out. A logarithmic axis shows such values better.
    """
    known = [value for value in values if value is not None and not math.isnan(value)]
    return bool(known) and min(known) > 0 and max(known) > factor * min(known)


def draw_comparison(table: pd.DataFrame, folder: Path, suffix: str = "", title: str = "") -> list[Path]:
    """Draw rows that were measured alike: as bars where all have one ratio, else as curves over the ratio.

    Quality over latency is drawn where the latencies are comparable. File names end in `suffix`, and `title` stands
    above each figure.
    """
    metric, teacher = table["metric"].iloc[0], table["quality_teacher"].mean()
    teacher = None if pd.isna(teacher) else teacher
    label = f"{'output loss' if pd.isna(metric) or not metric else metric} ({table['better'].iloc[0]} is better)"
    table = table.assign(method=[textwrap.fill(method, LABEL_LENGTH) for method in table["method"]])
    log = table["better"].iloc[0] == "lower" and spans_more_than([*table["quality"], teacher], 20)
    paths = []
    if have_comparable_latencies(table):
        labels = ("latency, student / teacher", label)
        path = folder / f"quality_over_latency_ratio{suffix}.png"
        paths.append(draw_curves(table, ("latency_ratio", "quality"), labels, path, teacher, log, title))
    if 1 < len(table) == table["method"].nunique() and table["ratio"].nunique() == 1:
        return [*paths, draw_bars(table, label, folder / f"quality_by_method{suffix}.png", teacher, title)]
    path = folder / f"quality_over_ratio{suffix}.png"
    paths.append(draw_curves(table, ("ratio", "quality"), ("fraction removed", label), path, teacher, log, title))
    path = folder / f"output_loss_over_ratio{suffix}.png"
    labels = ("fraction removed", "joint output loss right after pruning")
    paths.append(draw_curves(table, ("ratio", "output_loss_pruned"), labels, path, log=True, title=title))
    return paths


def draw_bars(table: pd.DataFrame, label: str, path: Path, teacher: float | None, title: str = "") -> Path:
    """Draw the quality of each method as pruned and in the end, the best method on top; error bars are over seeds.

    There is one bar per method where nothing was trained.

    Args:
        table: rows with a "method" each, as `average_over_seeds` returns them.
        label: of the axis.
        path: the PNG file to write.
        teacher: the teacher's quality, drawn as a vertical line.
        title: of the figure.
    """
    higher = table["better"].iloc[0] == "higher"
    ordered = table.sort_values(["quality", "quality_pruned"], ascending=higher)
    positions = np.arange(len(ordered))
    figure, axis = plt.subplots(figsize=(7, 0.55 * len(ordered) + 1.2))
    series = [("quality_pruned", -0.2, PROTECTED, "as pruned"), ("quality", 0.2, KEPT, "in the end")]
    if (ordered["distillation"] == "none").all():
        series = [("quality", 0.0, PROTECTED, "as pruned")]
    for column, offset, colour, name in series:
        errors = ordered[f"{column} std"].fillna(0)
        bars = axis.barh(
            positions + offset, ordered[column], 0.38, xerr=errors if errors.any() else None, color=colour, label=name
        )
        axis.bar_label(bars, fmt="%.4g", fontsize=7, padding=3)
    if teacher is not None:
        axis.axvline(teacher, color="black", ls=":", lw=1, label="teacher")
    if not higher and spans_more_than([*table["quality"], *table["quality_pruned"], teacher], 20):
        set_log_scale(axis, "x")
    axis.set_yticks(positions, ordered["method"], fontsize=8)
    axis.margins(x=0.12)
    axis.set_xlabel(label)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return save_figure(figure, path)


def draw_curves(
    table: pd.DataFrame,
    columns: tuple[str, str],
    labels: tuple[str, str],
    path: Path,
    teacher: float | None = None,
    log: bool = False,
    title: str = "",
) -> Path:
    """Draw one column over another, a curve per method, with the standard deviation over seeds as error bars.

    Args:
        table: rows with a "method", as `average_over_seeds` returns them.
        columns: names of the columns on the horizontal and the vertical axis.
        labels: of the two axes.
        path: the PNG file to write.
        teacher: the teacher's value, drawn as a horizontal line.
        log: draw the vertical axis logarithmically where all values are positive.
        title: of the figure.
    """
    x, y = columns
    figure, axis = plt.subplots(figsize=(6, 4.2))
    methods = list(table.groupby("method"))
    colours = plt.get_cmap("tab10" if len(methods) <= 10 else "tab20").colors  # type: ignore[attr-defined]
    for number, (method, rows) in enumerate(methods):
        ordered = rows.sort_values(x)
        style = {"color": colours[number % len(colours)], "marker": "os^Dv"[number % 5], "ms": 5, "capsize": 3}
        axis.errorbar(ordered[x], ordered[y], yerr=ordered[f"{y} std"].fillna(0), label=method, **style)
    if log and (table[y] > 0).all():
        set_log_scale(axis, "y")
    if teacher is not None:
        axis.axhline(teacher, color="black", ls=":", lw=1, label="teacher")
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.set_title(title, fontsize=10)
    outside: dict[str, Any] = {}
    if any(len(line) > SHORT_LABEL for method, _ in methods for line in method.split("\n")):
        outside = {"loc": "upper left", "bbox_to_anchor": (0, -0.14)}
    elif len(methods) > 5:
        outside = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
    axis.legend(fontsize=8, **outside)
    axis.grid(alpha=0.3)
    return save_figure(figure, path)


def save_figure(figure: Any, path: Path, dpi: int = 120) -> Path:
    """Write a figure as PNG, the same bytes for the same figure, and close it; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return path
