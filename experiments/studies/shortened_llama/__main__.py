"""The tables and figures of this study, from its runs.

    python -m experiments.studies.shortened_llama runs/shortened_llama runs/shortened_llama_stories15m

Perplexities on the text that networks were retrained on and on another one, over what was removed, a panel a way of
retraining; and what the networks write, also those of further folders.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.engine.artefacts import read_json
from experiments.engine.identity import read_config
from experiments.reporting.figures import save
from experiments.reporting.page import collect

RETRAINED = {
    "none": "as pruned",
    "lora": "adapters (LoRA)",
    "task_only": "all weights (continued pretraining)",
    "language": "distilled from the unpruned network",
}
TEXTS = {"perplexity": "WikiText-2 test", "perplexity_stories": "stories"}


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
    table, unpruned = results(options.runs[0])
    rows = [table, pd.DataFrame([{"criterion": "unpruned", "ratio": 0, "removed": 0, **unpruned}])]
    pd.concat(rows).to_csv(options.out / "results.csv", index=False)
    (options.out / "samples.md").write_text("".join(samples(root) for root in options.runs))
    draw(table, unpruned, options.out / "perplexity.png")
    print(markdown(table))


def results(root: Path) -> tuple[pd.DataFrame, dict[str, float]]:
    """A row a criterion, ratio and way of retraining, with "none" for the network as pruned; the unpruned perplexities.

    "+" behind a criterion's name says that the first four and the last two layers were kept. Raises ValueError where
    two runs differ in something else.
    """
    rows: list[dict[str, Any]] = []
    unpruned: dict[str, float] = {}
    for run in collect(root).to_dict("records"):
        folder = root / Path(run["page"]).parent
        plan, metrics = read_json(folder / "plan.json"), read_json(folder / "metrics.json")
        name = run["criterion"].removesuffix(" (channels)") + ("+" if plan["protected"] else "")
        fields: dict[str, Any] = {"criterion": name + (" (width)" if run["selection"] == "uniform" else "")}
        fields |= {"ratio": run["ratio"], "removed": run["achieved"], "parameters": run["params"]}
        fields["layers"] = sum(change["kind"] == "bypass" for change in plan["changes"])
        fields["device"] = read_json(folder / "measured.json")["device"]
        tokens = run["steps"] * run["setting"]["data.batch_size"] * run["setting"]["data.length"]
        trained = {"retraining": run["distillation"], "tokens": tokens, "lr": run["setting"]["optimizer.lr"]}
        of = {
            network: {text: metrics[f"{network}/{text}"] for text in TEXTS} for network in ("teacher", "pruned", "eval")
        }
        unpruned = of["teacher"]
        rows.append(fields | {"retraining": "none", "tokens": 0, "lr": None} | of["pruned"])
        if run["distillation"] != "none":
            rows.append(fields | trained | of["eval"])
    table, key = pd.DataFrame(rows), ["criterion", "ratio", "retraining"]
    twice = table[(table["retraining"] != "none") & table.duplicated(key)]
    if len(twice):
        raise ValueError(f"{root} has several runs of {twice.iloc[0][key].to_dict()}; remove all but one")
    table = table.drop_duplicates(key)
    table["retraining"] = pd.Categorical(table["retraining"], list(RETRAINED))
    return table.sort_values(["retraining", "ratio", "perplexity"], ignore_index=True), unpruned


def markdown(table: pd.DataFrame) -> str:
    """Perplexities on both texts: a row a criterion and ratio, a column a way of retraining."""
    kinds = [kind for kind in RETRAINED if (table["retraining"] == kind).any()]
    lines = ["| criterion | layers | removed | " + " | ".join(RETRAINED[kind] for kind in kinds) + " |"]
    lines.append("| --- |" + " --- |" * (2 + len(kinds)))
    best = table.groupby(["ratio", "retraining"], observed=True)["perplexity"].transform("min")
    table = table.assign(least=table.groupby(["ratio", "criterion"])["perplexity"].transform("min"))
    for _, rows in table.sort_values(["ratio", "least"]).groupby(["ratio", "criterion"], sort=False):
        first = rows.iloc[0]
        cells = dict.fromkeys(kinds, "")
        for index, row in rows.iterrows():
            value = shown(row["perplexity"])
            value = f"**{value}**" if row["perplexity"] == best[index] else value
            cells[row["retraining"]] = f"{value} / {shown(row['perplexity_stories'])}"
        line = [first["criterion"], str(first["layers"] or "width"), f"{first['removed']:.3f}", *cells.values()]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines) + "\n"


def shown(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


def draw(table: pd.DataFrame, unpruned: dict[str, float], path: Path) -> None:
    """Perplexity over the fraction removed, a row a text: every criterion as pruned and with adapters, width dashed;
    and every way of retraining of what was removed by perplexity."""
    names = sorted(table["criterion"].unique(), key=lambda name: ("width" in name, name))
    of_perplexity = table[table["criterion"] == "perplexity"]
    panels: list[tuple[str, dict[str, pd.DataFrame]]] = [
        (RETRAINED[kind], {name: table[(table["criterion"] == name) & (table["retraining"] == kind)] for name in names})
        for kind in ("none", "lora")
    ]
    ways = {label: of_perplexity[of_perplexity["retraining"] == kind] for kind, label in RETRAINED.items()}
    panels.append(("removed by perplexity", ways))
    figure, axes = plt.subplots(len(TEXTS), len(panels), figsize=(13.5, 7.2), sharex=True)
    for (column, text), row in zip(TEXTS.items(), axes, strict=True):
        for (title, curves), axis in zip(panels, row, strict=True):
            for place, (name, points) in enumerate(curves.items()):
                ordered = points.sort_values("removed")
                style = {"marker": "os^Dv"[place % 5], "ms": 4, "lw": 1.2, "ls": "--" if "width" in name else "-"}
                axis.plot(ordered["removed"], ordered[column], label=name, color=f"C{place % 10}", **style)
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
    save(figure, path)


def samples(root: Path) -> str:
    """What the networks write, as Markdown: those whose layers were removed by perplexity, every prompt."""
    blocks: dict[str, list[str]] = {}
    for finished in sorted(root.rglob("finished.json")):
        run = finished.parent
        cfg = read_config(run)
        written = {path.parent.name: read_json(path) for path in sorted((run / "samples").rglob("texts.json"))}
        if cfg["criterion"]["name"] != "perplexity":
            continue
        part = f"{cfg['selection']['ratio']:g} removed"
        labels = {
            "teacher": "unpruned",
            "pruned": part,
            "distilled": f"{part}, {RETRAINED[cfg['distillation']['name']]}",
        }
        for name in (name for name in labels if name in written):
            for prompt, text in zip(written[name]["prompts"], written[name]["texts"], strict=True):
                line, lines = f"- {labels[name]}: {' '.join(text.split())}", blocks.setdefault(prompt, [])
                lines += [line] if line not in lines else []
    shown = "".join(f"\n## {prompt} ...\n\n" + "\n".join(lines) + "\n" for prompt, lines in blocks.items())
    return f"# What the networks in {root.name} write, 48 tokens by the most likely one\n{shown}\n"


if __name__ == "__main__":
    main()
