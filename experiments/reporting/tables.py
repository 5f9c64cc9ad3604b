"""Sets of runs as tables: what people read, and what they have to know before they compare rows."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from criteria.selection.base import group
from experiments.engine.artefacts import digest


def averaged(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs that differ in seeds only, as mean and standard deviation; `method` names what a curve is of.

    Where they were timed at several batches or on several devices, there is no mean of their latencies.
    """
    values = [
        "achieved",
        "params",
        "macs",
        "flops",
        "target",
        "latency_ratio",
        "output_loss_pruned",
        "output_loss",
        "quality_pruned",
        "quality",
        "quality_teacher",
        *(name for name in runs if "/" in name),  # of the measures after the first
    ]
    runs = runs.assign(**{name: pd.to_numeric(runs[name]) for name in values})
    grouped = runs.groupby(runs["setting"].map(digest) + runs["teacher"])
    labels = ["teacher", "criterion", "selection", "distillation", "steps", "ratio", "budget"]
    labels += ["metric", "better", "protocol"]
    table = grouped[[*labels, "setting"]].first().join(grouped[values].mean())
    table = table.join(grouped[values].std().add_suffix(" std")).join(grouped.size().rename("runs"))
    table = table.join(grouped["latency_at"].agg(lambda places: "; ".join(sorted(set(places)))))
    table.loc[grouped["latency_at"].nunique() > 1, ["latency_ratio", "latency_ratio std"]] = math.nan
    table = table.sort_values(["teacher", "criterion", "selection", "distillation", "ratio"]).reset_index(drop=True)
    table["method"] = methods(table)
    return table


def methods(table: pd.DataFrame) -> list[str]:
    """What tells the rows apart, other than the ratio: the names first, then whatever else varies."""
    named = ["teacher", "selection", "distillation", "steps", "budget"]
    known = {
        "criterion.name",
        "selection.ratio",
        "selection.target",
        "teacher.name",
        "selection.name",
        "selection.variant",  # BK-SDM's sets are the points of one curve
        "selection.budget",
        "distillation.name",
        "trainer.steps",
        *(f"criterion.{name}" for name in ("level", "ratio", "target", "budget")),  # told by the name or the selection
    }
    fields = pd.DataFrame([{key: str(value) for key, value in fields.items()} for fields in table["setting"]])
    varying = [name for name in named if table[name].nunique() > 1]
    # A field that one group choice has and another has not is told by that choice's name already.
    others = [
        key
        for key in fields
        if key not in known
        and not key.startswith("evaluation.metric")
        and any(
            part[key].nunique(dropna=False) > 1
            for _, part in fields.groupby(
                [f"{name}.name" for name in ("teacher", "distillation", "selection")]
                + (["criterion.name"] if key.startswith("criterion.") else [])
            )
        )
    ]
    return [
        ", ".join(
            [
                table["criterion"][i],
                *(f"{name} {table[name][i]}" for name in varying),
                *(f"{key}={fields[key][i]}" for key in others if not pd.isna(fields[key][i])),
            ]
        )
        for i in table.index
    ]


def timed_alike(table: pd.DataFrame) -> bool:
    """Were all runs of all rows timed at one batch on one device, so that their latencies may be compared?"""
    return table["latency_at"].nunique() == 1 and bool(table["latency_ratio"].notna().all())


def told_by(table: pd.DataFrame) -> str:
    """The column that rows are told apart by: the criterion, or where other fields vary, too, the whole method."""
    shown = ["teacher", "criterion", "selection", "distillation", "steps", "ratio", "budget"]
    return "method" if table.duplicated(shown).any() else "criterion"


def metric_of(table: pd.DataFrame) -> str:
    """What the qualities in a table are."""
    return ", ".join(sorted({str(name) for name in table["metric"].dropna()})) or "output loss"


def by_teacher(table: pd.DataFrame) -> str:
    """A table a teacher: what different teachers are measured by need not be the same."""
    parts = list(table.groupby("teacher"))
    return "\n".join((f"{name}\n\n" if len(parts) > 1 else "") + markdown(part) for name, part in parts)


def markdown(table: pd.DataFrame) -> str:
    """The table people read; spreads where there are several runs."""
    metric = metric_of(table)

    def spread(row: Any, name: str, digits: int) -> str:
        value, std = row[name], row[f"{name} std"]
        if pd.isna(value):
            return ""
        return f"{value:.{digits}f}" + (f" ± {std:.{digits}f}" if not pd.isna(std) and std > 0 else "")

    def latency(row: Any) -> str:
        if pd.isna(row["latency_ratio"]):  # timed at several places
            return ""
        return f"x{spread(row, 'latency_ratio', 2)}" + ("" if timed_alike(table) else f" ({row['latency_at']})")

    optional = [(head, name) for head, name in (("target", "target"), ("FLOPs", "flops")) if table[name].notna().any()]
    counts = [(head, amounts(table[name])) for head, name in (("MACs", "macs"), *optional)]
    told = told_by(table)
    heads = [told, "selection", "distillation (steps)", "ratio", "achieved", "parameters"]
    heads += [*(head for head, _ in counts), "latency"]
    judged = [("output_loss_pruned", "output loss, pruned", 4), ("output_loss", "output loss", 4)]
    if metric != "output loss":
        judged += [("quality_pruned", f"{metric}, pruned", 2), ("quality", metric, 2)]
    judged += [(name, name.removeprefix("eval/"), 2) for name in others(table)]
    judged = [(name, head, digits if table[name].abs().max() >= 1 else 4) for name, head, digits in judged]
    heads += [*(head for _, head, _ in judged), "runs"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for place, (_, row) in enumerate(table.iterrows()):
        cells = [
            row[told],
            row["selection"],
            f"{row['distillation']} ({row['steps']})",
            f"{row['ratio']:.4g}",
            spread(row, "achieved", 3),
            f"{row['params'] / 1e6:.2f} M",
            *(values[place] for _, values in counts),
            latency(row),
            *(spread(row, name, digits) for name, _, digits in judged),
            str(row["runs"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def amounts(values: Iterable[float]) -> list[str]:
    """Counts in one unit for all, billions (G) or millions (M), whichever suits the largest; nothing for NaN."""
    counts = [float(value) for value in values]
    size, letter, digits = (1e9, "G", 3) if any(count >= 1e9 for count in counts) else (1e6, "M", 2)
    return ["" if math.isnan(count) else f"{count / size:.{digits}f} {letter}" for count in counts]


def first_of(names: Sequence[str], count: int = 3) -> str:
    """Some names in a line."""
    return ", ".join([*names[:count], *(["..."] if len(names) > count else [])])


def others(table: pd.DataFrame) -> list[str]:
    """The columns of what runs deliver in the measures after the first."""
    names = [name for name in table if name.startswith("eval/") and not name.endswith(" std")]
    return [name for name in names if table[name].notna().any()]


def warnings_of(table: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """What a reader of the table has to know before comparing its rows."""
    notes = []
    copies = [
        f"{copy} (as {Path(page).parent})"
        for page, names in zip(runs["page"], runs["copies"], strict=True)
        for copy in names
    ]
    if copies:
        notes.append(f"Folders that hold a run that is counted already: {first_of(copies)}.")
    if not timed_alike(table):
        places = "; ".join(sorted(set(runs["latency_at"])))
        notes.append(f"Latencies were measured at {places}: these are not comparable.")
    if table["protocol"].nunique() > 1:
        notes.append("These runs were evaluated under different protocols; their qualities are not comparable.")
    selections = table.groupby("criterion")["selection"].agg(set)
    if len(selections) > 1 and any(chosen != selections.iloc[0] for chosen in selections):
        notes.append("The criteria were not all used with the same selection; compare rows of one selection only.")
    return notes


# Units of channels


def are_channels(scores: Iterable[str]) -> bool:
    """Are units of these names channels? Then they may be thousands, and what is shown of them goes by group."""
    return any(":" in name for name in scores)


def channel_units(scores: dict[str, dict[str, float]], removed: set[str]) -> pd.DataFrame:
    """A row a unit, in the order of the forward pass: its group, its score, and whether it goes."""
    rows = [(group(name), entry["score"], name in removed) for name, entry in scores.items()]
    return pd.DataFrame(rows, columns=["group", "score", "removed"])


def channel_groups(scores: dict[str, dict[str, float]], removed: set[str]) -> list[dict[str, Any]]:
    """A row a group: how many units it has and keeps, and their lowest, mean and highest score."""
    found = channel_units(scores, removed).groupby("group", sort=False)
    table = found["score"].agg(["min", "mean", "max"])
    table = table.assign(units=found.size(), kept=found.size() - found["removed"].sum())
    return table.reset_index().to_dict("records")
