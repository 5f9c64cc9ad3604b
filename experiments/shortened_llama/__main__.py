"""The figures and tables of this study: python -m experiments.shortened_llama runs/shortened_llama [--speed results.csv]

Perplexity over what was removed, a panel a way of retraining; what the networks write; and, with the results of
`python -m experiments.generation_speed`, how much faster depth and width make them.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments.figures import save
from experiments.report import collect
from experiments.run import read_json

HERE = Path(__file__).parent
RETRAINED = {
    "none": "as pruned",
    "lora": "adapters (LoRA)",
    "task_only": "all weights (continued pretraining)",
    "language": "distillation from the unpruned network",
}
COLUMNS = {
    "method": "criterion",
    "distillation": "retraining",
    "ratio": "ratio",
    "achieved": "removed",
    "layers": "layers",
    "params": "parameters",
    "runs": "runs",
    "pruned": "perplexity_pruned",
    "quality": "perplexity",
    "spread": "perplexity_std",
    "teacher": "perplexity_unpruned",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.shortened_llama", description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--speed", type=Path, help="results.csv of experiments.generation_speed")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    table = results(options.runs)
    table.rename(columns=COLUMNS)[list(COLUMNS.values())].to_csv(options.out / "results.csv", index=False)
    (options.out / "table.md").write_text(markdown(table))
    draw(table, options.out / "perplexity.png")
    (options.out / "samples.md").write_text(samples(options.runs))
    if options.speed is not None:
        speed(pd.read_csv(options.speed), options.out / "speed.png")
    print(markdown(table))


def results(root: Path) -> pd.DataFrame:
    """A row a method, way of retraining and ratio; runs that differ in the seed of a random order are averaged."""
    runs = collect(root)
    runs["method"] = [
        row.criterion + ("+" if row.setting.get("selection.protected") else "") for row in runs.itertuples()
    ]
    runs["layers"] = [row.setting["teacher.name"] for row in runs.itertuples()]
    runs["layers"] = [layers(root / Path(page).parent) for page in runs["page"]]
    grouped = runs.groupby(["method", "distillation", "ratio"])
    table = grouped[["achieved", "params", "layers"]].mean().assign(
        runs=grouped.size(),
        pruned=grouped["quality_pruned"].mean(),
        quality=grouped["quality"].mean(),
        spread=grouped["quality"].std(),
        teacher=grouped["quality_teacher"].mean(),
    )
    return table.reset_index().sort_values(["distillation", "ratio", "quality"], ignore_index=True)


def layers(run: Path) -> int:
    """Layers that a run removed; none of width."""
    return sum(change["kind"] == "bypass" for change in read_json(run / "plan.json")["changes"])


def markdown(table: pd.DataFrame) -> str:
    """Perplexities: a row a method, a column a way of retraining and ratio; the best of each column in bold."""
    columns = [(kind, ratio) for kind in RETRAINED for ratio in sorted(table["ratio"].unique())]
    found = table.set_index(["method", "distillation", "ratio"])["quality"]
    best = {column: found.xs(column, level=("distillation", "ratio")).min() for column in columns if column in keys(found)}
    heads = ["criterion", *(f"{kind} {ratio:g}" for kind, ratio in best)]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    order = table.groupby("method")["quality"].mean().sort_values().index
    for method in order:
        cells = []
        for column, least in best.items():
            value = found.get((method, *column))
            cells.append("" if value is None else f"**{value:.1f}**" if value == least else f"{value:.1f}")
        lines.append("| " + " | ".join([method, *cells]) + " |")
    return "\n".join(lines) + "\n"


def keys(found: pd.Series) -> set[Any]:
    """The (retraining, ratio) pairs that there are."""
    return {(kind, ratio) for _, kind, ratio in found.index}


def draw(table: pd.DataFrame, path: Path) -> None:
    """A panel a way of retraining: perplexity over the fraction of parameters removed; width is dashed."""
    kinds = [kind for kind in RETRAINED if (table["distillation"] == kind).any()]
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 4.4), squeeze=False)
    methods = sorted(table["method"].unique(), key=lambda name: ("channels" in name, name))
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for axis, kind in zip(axes[0], kinds, strict=True):
        for place, method in enumerate(methods):
            rows = table[(table["distillation"] == kind) & (table["method"] == method)].sort_values("achieved")
            style = {"color": colours[(2 * place) % 20 + place // 10], "marker": "os^Dv"[place % 5], "ms": 4, "lw": 1.2}
            axis.plot(rows["achieved"], rows["quality"], "--" if "channels" in method else "-", label=method, **style)
        axis.axhline(table["teacher"].mean(), color="black", ls=":", lw=1, label="unpruned")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("fraction of parameters removed")
        axis.set_title(RETRAINED[kind], fontsize=10)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("perplexity, WikiText-2 test, 128 tokens")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, path)


def samples(root: Path) -> str:
    """What the networks make of the first prompts, as Markdown: runs by perplexity at every ratio."""
    lines = ["# What the networks write", ""]
    for finished in sorted(root.rglob("finished.json")):
        run = finished.parent
        if not run.name.startswith("perplexity-") or not (run / "samples").exists():
            continue
        lines += [f"## {run.name.rpartition('-')[0]}", ""]
        written = {path.parent.name: read_json(path) for path in sorted((run / "samples").rglob("texts.json"))}
        for name, texts in written.items():
            first = texts[1]
            lines += [f"- {name}: *{first['prompt']}* {' '.join(first['text'].split())}"]
        lines.append("")
    return "\n".join(lines)


def speed(table: pd.DataFrame, path: Path) -> None:
    """Latency relative to the unpruned network over the batch size, a panel an output length."""
    lengths = sorted(table["length"].unique())
    figure, axes = plt.subplots(1, len(lengths), figsize=(5 * len(lengths), 4), squeeze=False)
    for axis, length in zip(axes[0], lengths, strict=True):
        for model, rows in table[table["length"] == length].groupby("model", sort=False):
            ordered = rows.sort_values("batch")
            axis.plot(ordered["batch"], ordered["latency_ratio"], "--" if "uniform" in str(model) else "-", marker="o",
                      ms=4, label=model)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("batch size")
        axis.set_title(f"{length} tokens written")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("latency, as a share of the unpruned network's")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, path)


if __name__ == "__main__":
    main()
