"""Makes the tables and figures of this study from its runs.

    python -m experiments.studies.autobot runs/autobot

They show the accuracy right after pruning over the iterations of gate training, beside the paper's; the accuracy of
every criterion at the same FLOPs, as pruned and after fine-tuning; and the share of each layer's channels that is kept.
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
from experiments.reporting.figures import save_figure
from experiments.reporting.set_page import collect_runs
from experiments.reporting.tables import format_markdown, tabulate_channels

PAPER = {10: (66.04, 2.25), 50: (79.09, 0.0), 100: (81.98, 1.08), 200: (84.47, 0.44), 300: (84.70, 0.84)}
"""{iterations: accuracy right after pruning in percent, and its standard deviation over three seeds}.

From the paper's logs, which have no standard deviation for 50 iterations."""
TRAINED = {
    "none": "as pruned",
    "task_only": "fine-tuned",
    "normalized": "distilled, normalised features",
    "output_only": "distilled, outputs",
}
"""{distillation: its name in tables and figures}"""
KEY = ["criterion", "iterations", "seed"]
"""columns that identify a pruned network, whatever its training afterwards"""
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
    table, layers, unpruned = read_results(options.runs)
    table.to_csv(options.out / "results.csv", index=False)
    layers.to_csv(options.out / "layers.csv", index=False)
    draw_iterations(table, options.out / "iterations.png")
    draw_criteria(table, unpruned, options.out / "criteria.png")
    draw_layers(layers, options.out / "layers.png")
    print(f"unpruned: {unpruned:.2f}\n\n{format_iterations(table)}\n{format_criteria(table)}")


def read_results(root: Path) -> tuple[pd.DataFrame, pd.DataFrame, float]:
    """Return a table of runs, one of the share of channels kept per group, and the unpruned accuracy in percent.

    "iterations" are those of gate training, 0 for other criteria; "steps" those of the training afterwards. Raises
    ValueError where the runs have several teachers, targets or values of `calibration.augment`, or where two runs agree
    in all columns that identify one.
    """
    rows: list[dict[str, Any]] = []
    layers = []
    runs = collect_runs(root)
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
        units = tabulate_channels(read_json(folder / "scores.json")["scores"], removed)
        for place, (group, share) in enumerate(units.groupby("group", sort=False)["removed"].mean().items()):
            layers.append({**{key: row[key] for key in KEY}, "place": place, "group": group, "kept": 1 - share})
    table = pd.DataFrame(rows).sort_values([*KEY, "distillation", "steps"], ignore_index=True)
    if len(repeated := table[table.duplicated([*KEY, "distillation", "steps"])]):
        raise ValueError(f"{root} has several runs of {repeated.iloc[0][[*KEY, 'distillation', 'steps']].to_dict()}")
    return table[COLUMNS], pd.DataFrame(layers).drop_duplicates([*KEY, "place"]), float(table["unpruned"].iloc[0])


def select_pruned(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row per pruned network, which several runs may have trained in different ways."""
    return table.drop_duplicates(KEY)


def select_paper_iterations(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of all criteria, those of gates only where they were trained for the paper's 200 iterations."""
    return table[table["iterations"].isin((0, 200))]


def select_gated(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row per network that was pruned by gates."""
    pruned = select_pruned(table)
    return pruned[pruned["criterion"] == "bottleneck"]


def format_spread(values: pd.Series) -> str:
    """Return the mean and, where there are several values, their standard deviation."""
    return f"{values.mean():.2f}" + (f" ± {values.std():.2f}" if len(values) > 1 else "")


def format_iterations(table: pd.DataFrame) -> str:
    """Return the accuracy as pruned over the iterations of gate training, in Markdown."""
    columns = ["iterations", "MFLOPs", "accuracy as pruned, %", "seeds", "the paper's, 3 seeds"]
    cells = []
    for iterations, rows in select_gated(table).groupby("iterations"):
        mean, deviation = PAPER.get(iterations, (None, 0.0))
        paper = "" if mean is None else f"{mean:.2f}" + (f" ± {deviation:.2f}" if deviation else "")
        flops, accuracy = format_spread(rows["flops"] / 1e6), format_spread(rows["pruned"])
        cells.append((str(iterations), flops, accuracy, str(len(rows)), paper))
    return format_markdown(pd.DataFrame(cells, columns=columns))


def format_criteria(table: pd.DataFrame) -> str:
    """Return the accuracy of every criterion as pruned and after each kind of training, in Markdown."""
    table = select_paper_iterations(table)
    trainings = [name for name in TRAINED if name != "none" and (table["distillation"] == name).any()]
    pruned = select_pruned(table).groupby("criterion")
    cells = []
    for criterion in pruned["pruned"].mean().sort_values(ascending=False).index:
        rows = pruned.get_group(criterion)
        row = {
            "criterion": criterion,
            "MFLOPs": format_spread(rows["flops"] / 1e6),
            "parameters": f"{rows['params'].mean() / 1e6:.3f} M",
            "as pruned": format_spread(rows["pruned"]),
        }
        for training in trainings:
            trained = table[(table["criterion"] == criterion) & (table["distillation"] == training)]
            parts = [f"{format_spread(part['accuracy'])} ({steps} steps)" for steps, part in trained.groupby("steps")]
            row[TRAINED[training]] = ", ".join(parts) or "not run"
        cells.append(row)
    return format_markdown(pd.DataFrame(cells))


def draw_iterations(table: pd.DataFrame, path: Path) -> Path:
    """Draw the accuracy as pruned over the iterations of gate training: every seed, their mean, and the paper's."""
    gated = select_gated(table)
    figure, axis = plt.subplots(figsize=(6, 4))
    means = gated.groupby("iterations")["pruned"].agg(["mean", "std"]).fillna(0)
    axis.scatter(gated["iterations"], gated["pruned"], s=12, color="C0", alpha=0.5, label="a seed")
    axis.errorbar(means.index, means["mean"], means["std"], color="C0", marker="o", ms=4, capsize=3, label="mean")
    values, deviations = zip(*PAPER.values(), strict=True)
    axis.errorbar(list(PAPER), values, deviations, color="black", ls=":", marker="s", ms=4, capsize=3, label="paper")
    axis.set_xlabel("iterations of 64 images")
    axis.set_ylabel("accuracy right after pruning, %")
    axis.grid(alpha=0.3)
    axis.legend()
    return save_figure(figure, path)


def draw_criteria(table: pd.DataFrame, unpruned: float, path: Path) -> Path:
    """Draw a group of bars per criterion at the same FLOPs: as pruned, and after each kind of training.

    Where a training has several lengths, the one that most criteria have is drawn, so that bars of one colour compare.
    """
    table = select_paper_iterations(table)
    values: dict[str, Mapping[Any, float]] = {
        TRAINED["none"]: select_pruned(table).groupby("criterion")["pruned"].mean().to_dict()
    }
    for training in list(TRAINED)[1:]:
        trained = table[table["distillation"] == training]
        if len(trained):
            steps = trained.groupby("steps")["criterion"].nunique().idxmax()
            means = trained[trained["steps"] == steps].groupby("criterion")["accuracy"].mean().to_dict()
            values[f"{TRAINED[training]}, {steps} steps"] = means
    pruned = values[TRAINED["none"]]
    names = sorted(pruned, key=pruned.__getitem__, reverse=True)
    figure, axis = plt.subplots(figsize=(7.5, 4))
    width = 0.8 / len(values)
    for number, (label, means) in enumerate(values.items()):
        positions = np.arange(len(names)) + (number - (len(values) - 1) / 2) * width
        bars = axis.bar(positions, [means.get(name, np.nan) for name in names], width, label=label)
        axis.bar_label(bars, fmt=lambda value: f"{value:.1f}" if np.isfinite(value) else "", fontsize=7)
    axis.axhline(unpruned, color="black", ls=":", lw=1, label="unpruned")
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_ylabel("accuracy, %")
    axis.set_ylim(0, 115)
    axis.legend(fontsize=8, loc="upper center", ncol=2)
    return save_figure(figure, path)


def draw_layers(layers: pd.DataFrame, path: Path) -> Path:
    """Draw the share of channels kept per group: a panel per criterion, a line per seed, bars for the mean."""
    layers = select_paper_iterations(layers)
    names = sorted(layers["criterion"].unique(), key=lambda name: (name != "bottleneck", name))
    figure, axes = plt.subplots(len(names), 1, figsize=(9, 1.5 * len(names) + 0.8), sharex=True, squeeze=False)
    for name, axis in zip(names, axes[:, 0], strict=True):
        shares = layers[layers["criterion"] == name]
        for _, rows in shares.groupby("seed"):
            axis.plot(rows["place"], rows["kept"], color="C0", lw=0.6, alpha=0.6)
        mean = shares.groupby("place")["kept"].mean()
        colours = ["C0" if "conv1" in group else "C1" for group in list_groups(shares)]
        axis.bar(mean.index, mean, color=colours, alpha=0.6)
        axis.set_ylim(0, 1)
        axis.set_ylabel(name, fontsize=8)
        axis.tick_params(labelsize=7)
    axes[-1, 0].set_xlabel("layers in the order of the forward pass: conv1 (blue) and conv2 (orange) of each block")
    figure.suptitle("share of the channels that stays", fontsize=10)
    figure.tight_layout()
    return save_figure(figure, path)


def list_groups(rows: pd.DataFrame) -> list[str]:
    """Return the names of the groups of channels in the order of the forward pass."""
    return list(rows.drop_duplicates("place").sort_values("place")["group"])


if __name__ == "__main__":
    main()
