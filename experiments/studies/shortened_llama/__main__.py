"""Makes the table, the figure and the text samples of this study from its runs.

    python -m experiments.studies.shortened_llama runs/shortened_llama runs/shortened_llama_stories15m

The table and the figure show perplexities on the text that the networks were retrained on, and on another text, over
the fraction removed. They are of the first folder; the text samples are of all folders.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.engine.artefacts import read_json
from experiments.engine.identity import read_config
from experiments.reporting.figures import save_figure
from experiments.reporting.set_page import collect_runs
from experiments.reporting.tables import format_markdown

RETRAINED = {
    "none": "as pruned",
    "lora": "adapters (LoRA)",
    "task_only": "all weights (continued pretraining)",
    "language": "distilled from the unpruned network",
}
"""{distillation: its name in the table and the figure}"""
TEXTS = {"perplexity": "WikiText-2 test", "perplexity_stories": "stories"}
"""{measure of perplexity: the text it is measured on}"""


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m experiments.studies.shortened_llama",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    table, unpruned = read_results(options.runs[0])
    rows = [table, pd.DataFrame([{"criterion": "unpruned", "ratio": 0, "removed": 0, **unpruned}])]
    pd.concat(rows).to_csv(options.out / "results.csv", index=False)
    (options.out / "samples.md").write_text("".join(format_samples(root) for root in options.runs))
    draw_perplexities(table, unpruned, options.out / "perplexity.png")
    print(format_perplexities(table))


def read_results(root: Path) -> tuple[pd.DataFrame, dict[str, float]]:
    """Return a row per criterion, ratio and kind of retraining ("none": as pruned), and the unpruned perplexities.

    A criterion's name ends in "+" where the first four and the last two layers were protected. Raises ValueError where
    two runs agree in criterion, ratio and retraining.
    """
    rows: list[dict[str, Any]] = []
    unpruned: dict[str, float] = {}
    for run in collect_runs(root).to_dict("records"):
        folder = root / Path(run["page"]).parent
        plan, metrics = read_json(folder / "plan.json"), read_json(folder / "metrics.json")
        name = run["criterion"].removesuffix(" (channels)") + ("+" if plan["protected"] else "")
        fields: dict[str, Any] = {"criterion": name + (" (width)" if run["selection"] == "uniform" else "")}
        fields |= {"ratio": run["ratio"], "removed": run["achieved"], "parameters": run["params"]}
        fields["layers"] = sum(change["kind"] == "bypass" for change in plan["changes"])
        fields["device"] = read_json(folder / "measured.json")["device"]
        tokens = run["steps"] * run["setting"]["data.batch_size"] * run["setting"]["data.length"]
        training = {"retraining": run["distillation"], "tokens": tokens, "lr": run["setting"]["optimizer.lr"]}
        perplexities = {
            network: {text: metrics[f"{network}/{text}"] for text in TEXTS} for network in ("teacher", "pruned", "eval")
        }
        unpruned = perplexities["teacher"]
        rows.append(fields | {"retraining": "none", "tokens": 0, "lr": None} | perplexities["pruned"])
        if run["distillation"] != "none":
            rows.append(fields | training | perplexities["eval"])
    table, key = pd.DataFrame(rows), ["criterion", "ratio", "retraining"]
    repeated = table[(table["retraining"] != "none") & table.duplicated(key)]
    if len(repeated):
        raise ValueError(f"{root} has several runs of {repeated.iloc[0][key].to_dict()}; remove all but one")
    table = table.drop_duplicates(key)
    table["retraining"] = pd.Categorical(table["retraining"], list(RETRAINED))
    return table.sort_values(["retraining", "ratio", "perplexity"], ignore_index=True), unpruned


def format_perplexities(table: pd.DataFrame) -> str:
    """Return the perplexities in Markdown: a row per criterion and ratio, a column per kind of retraining.

    Behind the slash is the perplexity on the second text. The lowest perplexity on the first text is bold, for each
    ratio and kind of retraining.
    """
    kinds = [kind for kind in RETRAINED if (table["retraining"] == kind).any()]
    best = table.groupby(["ratio", "retraining"], observed=True)["perplexity"].transform("min")
    table = table.assign(least=table.groupby(["ratio", "criterion"])["perplexity"].transform("min"))
    cells = []
    for _, rows in table.sort_values(["ratio", "least"]).groupby(["ratio", "criterion"], sort=False):
        first = rows.iloc[0]
        line = {"criterion": first["criterion"], "layers": str(first["layers"] or "width")}
        line |= {"removed": f"{first['removed']:.3f}", **{RETRAINED[kind]: "" for kind in kinds}}
        for index, row in rows.iterrows():
            value = format_perplexity(row["perplexity"])
            value = f"**{value}**" if row["perplexity"] == best[index] else value
            line[RETRAINED[row["retraining"]]] = f"{value} / {format_perplexity(row['perplexity_stories'])}"
        cells.append(line)
    return format_markdown(pd.DataFrame(cells))


def format_perplexity(value: float) -> str:
    """Return a perplexity with four significant digits, from 1,000 on as a whole number."""
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


def draw_perplexities(table: pd.DataFrame, unpruned: dict[str, float], path: Path) -> Path:
    """Draw perplexity over the fraction removed, a row of panels per text.

    The panels show every criterion as pruned, every criterion with adapters (width pruning is dashed), and every kind
    of retraining of the networks whose layers were removed by perplexity.
    """
    names = sorted(table["criterion"].unique(), key=lambda name: ("width" in name, name))
    by_perplexity = table[table["criterion"] == "perplexity"]
    panels: list[tuple[str, dict[str, pd.DataFrame]]] = [
        (RETRAINED[kind], {name: table[(table["criterion"] == name) & (table["retraining"] == kind)] for name in names})
        for kind in ("none", "lora")
    ]
    retrained = {label: by_perplexity[by_perplexity["retraining"] == kind] for kind, label in RETRAINED.items()}
    panels.append(("removed by perplexity", retrained))
    figure, axes = plt.subplots(len(TEXTS), len(panels), figsize=(13.5, 7.2), sharex=True)
    for (column, text), row in zip(TEXTS.items(), axes, strict=True):
        for (title, curves), axis in zip(panels, row, strict=True):
            for number, (name, points) in enumerate(curves.items()):
                ordered = points.sort_values("removed")
                style = {"marker": "os^Dv"[number % 5], "ms": 4, "lw": 1.2, "ls": "--" if "width" in name else "-"}
                axis.plot(ordered["removed"], ordered[column], label=name, color=f"C{number % 10}", **style)
            axis.axhline(unpruned[column], color="black", ls=":", lw=1, label="unpruned")
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
            if column == "perplexity":
                axis.set_title(title, fontsize=10)
            else:
                axis.set_xlabel("fraction of parameters removed")
        row[0].set_ylabel(f"perplexity, {text}")
    axes[1][2].legend(fontsize=8)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncol=len(names) + 1, fontsize=8)
    return save_figure(figure, path)


def format_samples(root: Path) -> str:
    """Return the continuations of every prompt in Markdown, by the networks whose layers were removed by perplexity."""
    blocks: dict[str, list[str]] = {}
    for finished in sorted(root.rglob("finished.json")):
        run = finished.parent
        cfg = read_config(run)
        if cfg["criterion"]["name"] != "perplexity":
            continue
        samples = {path.parent.name: read_json(path) for path in sorted((run / "samples").rglob("texts.json"))}
        removed = f"{cfg['selection']['ratio']:g} removed"
        labels = {
            "teacher": "unpruned",
            "pruned": removed,
            "distilled": f"{removed}, {RETRAINED[cfg['distillation']['name']]}",
        }
        for name in (name for name in labels if name in samples):
            for prompt, text in zip(samples[name]["prompts"], samples[name]["texts"], strict=True):
                line, lines = f"- {labels[name]}: {' '.join(text.split())}", blocks.setdefault(prompt, [])
                lines += [line] if line not in lines else []
    sections = "".join(f"\n## {prompt} ...\n\n" + "\n".join(lines) + "\n" for prompt, lines in blocks.items())
    return f"# Continuations by the networks in {root.name}: 48 tokens, greedy decoding\n{sections}\n"


if __name__ == "__main__":
    main()
