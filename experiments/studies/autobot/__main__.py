"""The tables and figures of this study, from its runs.

    python -m experiments.studies.autobot runs/autobot

Accuracy right after pruning over the iterations of the gates, beside the paper's; that of every criterion at the same
FLOPs, as pruned and after fine-tuning; and which channels of which layer the gates leave.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments.engine.artefacts import read_json
from experiments.engine.identity import read_config
from experiments.reporting.figures import save
from experiments.reporting.page import collect
from experiments.reporting.tables import channel_units

PAPER = {10: (66.04, 2.25), 50: (79.09, 0.0), 100: (81.98, 1.08), 200: (84.47, 0.44), 300: (84.70, 0.84)}
"""{iterations: accuracy right after pruning and its standard deviation over three seeds}, from the paper's own logs (of
the second none is given)."""
TRAINED = {
    "none": "as pruned",
    "task_only": "fine-tuned",
    "normalized": "distilled, normalised features",
    "output_only": "distilled, outputs",
}
KEY = ["criterion", "iterations", "seed"]
COLUMNS = [*KEY, "flops", "params", "distillation", "steps", "pruned", "accuracy"]


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.autobot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table, layers, unpruned = results(options.runs)
    table.to_csv(options.out / "results.csv", index=False)
    layers.to_csv(options.out / "layers.csv", index=False)
    draw_iterations(table, options.out / "iterations.png")
    draw_criteria(table, unpruned, options.out / "criteria.png")
    draw_layers(layers, options.out / "layers.png")
    print(f"unpruned: {unpruned:.2f}\n\n{by_iterations(table)}\n{by_criterion(table)}")


def results(root: Path) -> tuple[pd.DataFrame, pd.DataFrame, float]:
    """A row a run; the share that stays of each group, criterion and run; the accuracy of the unpruned network.

    "iterations" are those of the gates, 0 for other criteria; "steps" those of the training afterwards. Raises
    ValueError for several teachers, targets, or ways to take the calibration images.
    """
    rows: list[dict[str, Any]] = []
    layers = []
    runs = collect(root)
    runs["calibration.augment"] = [setting["calibration.augment"] for setting in runs["setting"]]
    for field in ("teacher", "target", "calibration.augment"):
        if runs[field].nunique() != 1:
            raise ValueError(
                f"{root} has runs of several values of {field}: {', '.join(map(str, runs[field].unique()))}"
            )
    for run in runs.to_dict("records"):
        folder = root / Path(run["page"]).parent
        cfg = read_config(folder)
        name = cfg["criterion"]["name"]
        steps = cfg["calibration"]["samples"] // cfg["calibration"]["batch_size"] if name == "bottleneck" else 0
        name += " (mean)" if cfg["criterion"].get("reduction") == "mean" else ""
        row = {"criterion": name, "iterations": steps}
        row["seed"] = cfg["criterion"].get("seed", cfg["calibration"]["seed"])
        row |= {key: run[key] for key in ("flops", "params", "distillation", "steps")}
        row |= {"pruned": run["quality_pruned"], "accuracy": run["quality"], "unpruned": run["quality_teacher"]}
        rows.append(row)
        removed = {change["unit"] for change in read_json(folder / "plan.json")["changes"]}
        units = channel_units(read_json(folder / "scores.json")["scores"], removed)
        for place, (group, gone) in enumerate(units.groupby("group", sort=False)["removed"].mean().items()):
            layers.append({**{key: row[key] for key in KEY}, "place": place, "group": group, "kept": 1 - gone})
    table = pd.DataFrame(rows).sort_values([*KEY, "distillation", "steps"], ignore_index=True)
    if len(twice := table[table.duplicated([*KEY, "distillation", "steps"])]):
        raise ValueError(f"{root} has several runs of {twice.iloc[0][[*KEY, 'distillation', 'steps']].to_dict()}")
    return table[COLUMNS], pd.DataFrame(layers).drop_duplicates([*KEY, "place"]), float(table["unpruned"].iloc[0])


def as_pruned(table: pd.DataFrame) -> pd.DataFrame:
    """A row a pruned network, however it was trained afterwards."""
    return table.drop_duplicates(KEY)


def at_the_papers(table: pd.DataFrame) -> pd.DataFrame:
    """Of the gates only those trained for 200 iterations."""
    return table[table["iterations"].isin((0, 200))]


def gated(table: pd.DataFrame) -> pd.DataFrame:
    """The networks as pruned by gates."""
    pruned = as_pruned(table)
    return pruned[pruned["criterion"] == "bottleneck"]


def spread(values: pd.Series) -> str:
    """Mean and, of several values, their standard deviation."""
    return f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")


def by_iterations(table: pd.DataFrame) -> str:
    """Accuracy as pruned over the iterations of the gates, in Markdown."""
    lines = ["| iterations | MFLOPs | accuracy as pruned, % | seeds | the paper's, 3 seeds |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for iterations, rows in gated(table).groupby("iterations"):
        paper = PAPER.get(iterations)
        told = "" if paper is None else f"{paper[0]:.2f}" + (f" ± {paper[1]:.2f}" if paper[1] else "")
        flops = spread(rows["flops"] / 1e6)
        lines.append(f"| {iterations} | {flops} | {spread(rows['pruned'])} | {len(rows)} | {told} |")
    return "\n".join(lines) + "\n"


def by_criterion(table: pd.DataFrame) -> str:
    """Every criterion at the paper's iterations, as pruned and trained afterwards, in Markdown."""
    table = at_the_papers(table)
    ways = [way for way in TRAINED if way != "none" and (table["distillation"] == way).any()]
    lines = ["| criterion | MFLOPs | parameters | as pruned | " + " | ".join(TRAINED[way] for way in ways) + " |"]
    lines.append("| --- |" + " --- |" * (3 + len(ways)))
    pruned = as_pruned(table).groupby("criterion")
    for name in pruned["pruned"].mean().sort_values(ascending=False).index:
        rows = pruned.get_group(name)
        cells = [spread(rows["flops"] / 1e6), f"{rows['params'].mean() / 1e6:.3f} M", spread(rows["pruned"])]
        for way in ways:
            done = table[(table["criterion"] == name) & (table["distillation"] == way)]
            parts = [f"{spread(some['accuracy'])} ({steps} steps)" for steps, some in done.groupby("steps")]
            cells.append(", ".join(parts) or "not run")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_iterations(table: pd.DataFrame, path: Path) -> None:
    """Accuracy as pruned over the iterations of the gates: every seed, their mean, and the paper's."""
    shown = gated(table)
    figure, axis = plt.subplots(figsize=(6, 4))
    means = shown.groupby("iterations")["pruned"].agg(["mean", "std"]).fillna(0)
    axis.scatter(shown["iterations"], shown["pruned"], s=12, color="C0", alpha=0.5, label="a seed")
    axis.errorbar(means.index, means["mean"], means["std"], color="C0", marker="o", ms=4, capsize=3, label="mean")
    values, deviations = zip(*PAPER.values(), strict=True)
    axis.errorbar(list(PAPER), values, deviations, color="black", ls=":", marker="s", ms=4, capsize=3, label="paper")
    axis.set_xlabel("iterations of 64 images")
    axis.set_ylabel("accuracy right after pruning, %")
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


def draw_criteria(table: pd.DataFrame, unpruned: float, path: Path) -> None:
    """A group of bars a criterion at the same FLOPs: as pruned, and after each way of training.

    Of several lengths of a training the one that most criteria have is drawn, so that bars of one colour compare.
    """
    table = at_the_papers(table)
    values: dict[str, Mapping[Any, float]] = {
        TRAINED["none"]: as_pruned(table).groupby("criterion")["pruned"].mean().to_dict()
    }
    for way in list(TRAINED)[1:]:
        trained = table[table["distillation"] == way]
        if len(trained):
            steps = trained.groupby("steps")["criterion"].nunique().idxmax()
            found = trained[trained["steps"] == steps].groupby("criterion")["accuracy"].mean().to_dict()
            values[f"{TRAINED[way]}, {steps} steps"] = found
    pruned = values[TRAINED["none"]]
    names = sorted(pruned, key=pruned.__getitem__, reverse=True)
    figure, axis = plt.subplots(figsize=(7.5, 4))
    width = 0.8 / len(values)
    for place, (label, found) in enumerate(values.items()):
        at = np.arange(len(names)) + (place - (len(values) - 1) / 2) * width
        bars = axis.bar(at, [found.get(name, np.nan) for name in names], width, label=label)
        axis.bar_label(bars, fmt=lambda value: f"{value:.1f}" if np.isfinite(value) else "", fontsize=7)
    axis.axhline(unpruned, color="black", ls=":", lw=1, label="unpruned")
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_ylabel("accuracy, %")
    axis.set_ylim(0, 115)
    axis.legend(fontsize=8, loc="upper center", ncol=2)
    save(figure, path)


def draw_layers(layers: pd.DataFrame, path: Path) -> None:
    """The share of each group that stays, a panel a criterion, a thin line a seed and a thick one their mean."""
    layers = at_the_papers(layers)
    names = sorted(layers["criterion"].unique(), key=lambda name: (name != "bottleneck", name))
    figure, axes = plt.subplots(len(names), 1, figsize=(9, 1.5 * len(names) + 0.8), sharex=True, squeeze=False)
    for name, axis in zip(names, axes[:, 0], strict=True):
        some = layers[layers["criterion"] == name]
        for _, rows in some.groupby("seed"):
            axis.plot(rows["place"], rows["kept"], color="C0", lw=0.6, alpha=0.6)
        mean = some.groupby("place")["kept"].mean()
        axis.bar(mean.index, mean, color=["C0" if "conv1" in group else "C1" for group in groups_of(some)], alpha=0.6)
        axis.set_ylim(0, 1)
        axis.set_ylabel(name, fontsize=8)
        axis.tick_params(labelsize=7)
    axes[-1, 0].set_xlabel("layers in the order of the forward pass: conv1 (blue) and conv2 (orange) of each block")
    figure.suptitle("share of the channels that stays", fontsize=10)
    figure.tight_layout()
    save(figure, path)


def groups_of(rows: pd.DataFrame) -> list[str]:
    """The groups by their places."""
    return list(rows.drop_duplicates("place").sort_values("place")["group"])


if __name__ == "__main__":
    main()
