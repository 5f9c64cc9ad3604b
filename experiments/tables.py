"""Sets of runs as tables: what people read, and what they have to know before they compare rows."""

from typing import Any

import pandas as pd


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

    heads = ["criterion", "selection", "distillation (steps)", "ratio", "achieved", "parameters", "MACs", "latency"]
    judged = [("output_loss_pruned", "output loss, pruned", 4), ("output_loss", "output loss", 4)]
    if metric != "output loss":
        judged += [("quality_pruned", f"{metric}, pruned", 2), ("quality", metric, 2)]
    judged += [(name, name.removeprefix("eval/"), 2) for name in others(table)]
    judged = [(name, head, digits if table[name].abs().max() >= 1 else 4) for name, head, digits in judged]
    heads += [*(head for _, head, _ in judged), "runs"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for _, row in table.iterrows():
        cells = [
            row["criterion"],
            row["selection"],
            f"{row['distillation']} ({row['steps']})",
            f"{row['ratio']:g}",
            spread(row, "achieved", 3),
            f"{row['params'] / 1e6:.2f} M",
            f"{row['macs'] / 1e9:.3f} G",
            "x" + spread(row, "latency_ratio", 2),
            *(spread(row, name, digits) for name, _, digits in judged),
            str(row["runs"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def others(table: pd.DataFrame) -> list[str]:
    """The columns of what runs deliver in the measures after the first."""
    names = [name for name in table if name.startswith("eval/") and not name.endswith(" std")]
    return [name for name in names if table[name].notna().any()]


def warnings_of(table: pd.DataFrame) -> list[str]:
    """What a reader of the table has to know before comparing its rows."""
    notes = []
    if table["protocol"].nunique() > 1:
        notes.append("These runs were evaluated under different protocols; their qualities are not comparable.")
    selections = table.groupby("criterion")["selection"].agg(set)
    if len(selections) > 1 and any(chosen != selections.iloc[0] for chosen in selections):
        notes.append("The criteria were not all used with the same selection; compare rows of one selection only.")
    return notes
