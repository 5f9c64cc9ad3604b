"""A network as a strip: its units in the order of the forward pass, and which of them were removed."""

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

from experiments.reporting.figures import COLOURS, KEPT, REMOVED, save_figure
from experiments.reporting.run_files import Scoring, list_decisions
from experiments.reporting.tables import tabulate_channels

SHARE = LinearSegmentedColormap.from_list("share", [KEPT, REMOVED])
"""Colours of a group of channels, from one that stays whole to one that is removed."""

LABELLED = 0.08
"""Share of the strip that a part needs to be wide enough for its name."""


def draw_strip(scoring: Scoring, path: Path) -> Path:
    """Draw a cell per unit, or per group of channels, in the order of the forward pass; returns the path.

    Kept units are blue, removed ones red, protected ones grey; a group of channels is the redder, the more of it is
    removed. Below the cells stand the names of the parts of the network.
    """
    colours = list_colours(scoring)
    figure, axis = plt.subplots(figsize=(10, 1.1))
    for number, colour in enumerate(colours.values()):
        axis.add_patch(Rectangle((number, 0), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.8))
    axis.set_xlim(0, len(colours))
    axis.set_yticks([])
    for side in ("top", "left", "right", "bottom"):
        axis.spines[side].set_visible(False)
    labels, start = {}, 0
    for part, names in itertools.groupby(map(name_part, colours)):
        axis.vlines(start, -0.08, 1.08, color="black", lw=0.8, clip_on=False)
        count = len(list(names))
        if count >= LABELLED * len(colours):
            labels[start + count / 2] = part
        start += count
    axis.set_xticks(list(labels), list(labels.values()), fontsize=7)
    noun = "groups of channels, red by the share removed" if scoring.has_channels else "units"
    removed = f"{len(scoring.removed)} of {len(scoring.scores)} removed"
    axis.set_title(f"{scoring.criterion}: {len(colours)} {noun}; {removed}", fontsize=9)
    return save_figure(figure, path)


def list_colours(scoring: Scoring) -> dict[str, object]:
    """Return the colour of each cell, {name of a unit or group: colour}, in the order of the forward pass."""
    if scoring.has_channels:
        shares = tabulate_channels(scoring.scores, set(scoring.removed)).groupby("group", sort=False)["removed"].mean()
        return {str(name): SHARE(share) for name, share in shares.items()}
    decisions = list_decisions(scoring.scores, scoring.removed, scoring.protected)
    return {name: COLOURS[decision] for name, decision in decisions.items()}


def name_part(unit: str) -> str:
    """Return the part of the network that a unit belongs to: the first name of its module path, with its number."""
    first, *more = unit.split(".")
    return f"{first}.{more[0]}" if more and more[0].isdigit() else first
