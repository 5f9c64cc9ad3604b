"""Makes the tables and the figure of this study from its runs (conf/experiment/repair.yaml).

    python -m experiments.studies.repair runs/repair

results.csv has a row per run. table.md compares, for each task and ratio, the repair without training, training alone,
and training after the repair; differences are of runs with the same seed, with their bootstrap interval.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from experiments.engine.artefacts import read_json
from experiments.engine.identity import read_config
from experiments.reporting.figures import save_figure, set_log_scale
from experiments.reporting.tables import format_markdown

RESAMPLES = 10_000
"""Resamples of the bootstrap (Efron 1979)."""
SETTING = ["task", "teacher_name", "criterion", "ratio"]
"""Columns that a row of the comparison has in common."""
NETWORKS = ("pruned", "repaired", "distilled")


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.repair",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table = read_results(options.runs)
    table.to_csv(options.out / "results.csv", index=False)
    compared = compare(table)
    (options.out / "table.md").write_text(compared + "\n")
    draw_losses(table, options.out / "repair.png")
    print(compared)


def read_results(roots: list[Path]) -> pd.DataFrame:
    """Return a row per finished run below the folders: what was done, and output loss and first measure per network."""
    rows = [read_run(path.parent) for root in roots for path in sorted(root.rglob("finished.json"))]
    if not rows:
        raise ValueError(f"{', '.join(map(str, roots))}: no finished run")
    table, key = pd.DataFrame(rows), [*SETTING, "distillation", "repair", "steps", "seed"]
    if len(repeated := table[table.duplicated(key)]):
        raise ValueError(f"there are several runs of {repeated.iloc[0][key].to_dict()}; remove all but one")
    return table.sort_values(key, ignore_index=True)


def read_run(folder: Path) -> dict[str, Any]:
    """Return the row of one run."""
    config, metrics = read_config(folder), read_json(folder / "metrics.json")
    row: dict[str, Any] = {
        "task": config["task"]["name"],
        "teacher_name": config["teacher"]["name"],
        "criterion": config["criterion"]["name"],
        "ratio": config["selection"].get("ratio") or round(metrics["plan/achieved_ratio"], 2),
        "repair": config["repair"]["name"],
        "distillation": config["distillation"]["name"],
        "steps": config["trainer"]["steps"] if config["distillation"]["name"] != "none" else 0,
        "seed": config["seed"],
        "achieved": metrics["plan/achieved_ratio"],
        "device": read_json(folder / "measured.json")["device"],
    }
    measure = next(iter(config["evaluation"]["metrics"]), None)
    row["measure"] = measure
    row["teacher"] = metrics.get(f"teacher/{measure}")
    for network in NETWORKS:
        row[f"output_loss_{network}"] = metrics.get(f"{network}/output_loss")
        row[f"quality_{network}"] = metrics.get(f"{network}/{measure}")
    return row


def compare(table: pd.DataFrame) -> str:
    """Return the comparison in Markdown: a row per task and ratio."""
    lines = []
    for (_, teacher, criterion, ratio), rows in table.groupby(SETTING):
        line = {"teacher": teacher, "criterion": criterion, "ratio": f"{ratio:g}"}
        line["output loss: pruned"] = span(rows["output_loss_pruned"])
        line["repaired"] = span(rows["output_loss_repaired"])
        trained = rows[rows["distillation"] != "none"]
        pairs = pair_by_seed(trained)
        for name in ("output_loss", "quality"):
            before, after = (pairs[f"{name}_distilled_{repair}"] for repair in ("none", "least_squares"))
            known = (before.notna() & after.notna()).to_numpy()
            title = "output loss" if name == "output_loss" else first_measure(rows)
            line[f"{name} trained"] = span(before[known])
            line[f"{name} repaired, trained"] = span(after[known])
            line[f"{name} difference"] = describe_difference((after - before)[known].to_numpy(float))
            line[f"{name} of"] = title if name == "quality" else ""
        line["seeds"] = str(len(pairs))
        lines.append(line)
    columns = {
        "output_loss trained": "trained",
        "output_loss repaired, trained": "repaired and trained",
        "output_loss difference": "difference",
        "quality of": "measure",
        "quality trained": "of it: trained",
        "quality repaired, trained": "of it: repaired and trained",
        "quality difference": "of it: difference",
    }
    named = pd.DataFrame(lines).drop(columns="output_loss of").rename(columns=columns)
    order = ["teacher", "criterion", "ratio", "output loss: pruned", "repaired", *columns.values(), "seeds"]
    return format_markdown(named[order])


def first_measure(rows: pd.DataFrame) -> str:
    """Return the name of the measure of some runs; empty where they took none."""
    return next((str(name) for name in rows["measure"].dropna()), "")


def pair_by_seed(trained: pd.DataFrame) -> pd.DataFrame:
    """Return a row per seed at which a network was trained with and without a repair."""
    sides = [
        trained[trained["repair"] == repair].set_index("seed").add_suffix(f"_{repair}")
        for repair in ("none", "least_squares")
    ]
    return sides[0].join(sides[1], how="inner")


def span(values: pd.Series) -> str:
    """Return the mean of some values, and their least and greatest where there are several."""
    known = values.dropna().drop_duplicates()
    if known.empty:
        return ""
    return f"{known.mean():.4g}" + (f" ({known.min():.4g} to {known.max():.4g})" if len(known) > 1 else "")


def describe_difference(differences: np.ndarray) -> str:
    """Return the mean of paired differences and the 95 % interval of a bootstrap over pairs."""
    if len(differences) < 3:
        return ""
    rng = np.random.default_rng(0)
    means = rng.choice(differences, (RESAMPLES, len(differences))).mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return f"{differences.mean():+.3g} [{low:+.3g}, {high:+.3g}]"


def draw_losses(table: pd.DataFrame, path: Path) -> Path:
    """Draw the output loss of each kind of network over the ratio, a panel per task."""
    tasks = list(dict.fromkeys(table["teacher_name"]))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3.6), squeeze=False)
    for task, axis in zip(tasks, axes[0], strict=True):
        rows = table[table["teacher_name"] == task]
        curves = {
            "pruned": rows[["ratio", "output_loss_pruned"]],
            "repaired": rows[["ratio", "output_loss_repaired"]],
            "trained": rows.loc[rows["repair"] == "none", ["ratio", "output_loss_distilled"]],
            "repaired and trained": rows.loc[rows["repair"] != "none", ["ratio", "output_loss_distilled"]],
        }
        for number, (label, points) in enumerate(curves.items()):
            points = points.dropna()
            means = points.groupby("ratio").mean().iloc[:, 0]
            style = {"marker": "os^D"[number], "ms": 5, "lw": 1.2, "color": f"C{number}"}
            axis.plot(means.index, means, label=label, **style)
        set_log_scale(axis, "y")
        axis.set_title(task)
        axis.set_xlabel("fraction of parameters removed")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("output loss on held-out samples")
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=8)
    return save_figure(figure, path)


if __name__ == "__main__":
    main()
