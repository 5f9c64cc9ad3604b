"""Sets of runs as tables: rows averaged over seeds, their Markdown, and warnings for whoever compares the rows."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from criteria.selection.base import group
from experiments.engine.artefacts import digest

CHOICES = ["task", "teacher", "data", "criterion", "selection", "repair", "distillation"]
"""Columns with the names of what a run chose, in the order in which rows are sorted."""
SETTING = [*CHOICES, "steps", "ratio", "budget"]
"""Columns that usually tell rows apart."""
VALUE_LENGTH = 40
"""Longest value of a field in the name of a method, in characters; a longer one is shortened."""


def average_over_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row per setting, i.e. for runs that differ in seeds only: means, and deviations in "... std" columns.

    The column "method" tells the rows of different curves apart; "row" is the same as that of the runs. Where the runs
    of a row were timed at several batch sizes or on several devices, the row has no mean latency.
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
        "gap_closed",
        *(name for name in runs if "/" in name),  # of the measures after the first
    ]
    runs = runs.assign(**{name: pd.to_numeric(runs[name]) for name in values})
    grouped = runs.groupby("row")
    table = grouped[[*SETTING, "metric", "better", "protocol", "setting"]].first().join(grouped[values].mean())
    table = table.join(grouped[values].std().add_suffix(" std")).join(grouped.size().rename("runs"))
    table = table.join(grouped["latency_at"].agg(lambda conditions: "; ".join(sorted(set(conditions)))))
    table.loc[grouped["latency_at"].nunique() > 1, ["latency_ratio", "latency_ratio std"]] = math.nan
    table = table.reset_index().sort_values([*CHOICES, "ratio"], ignore_index=True)
    table["method"] = name_methods(table)
    return table


def name_methods(table: pd.DataFrame) -> list[str]:
    """Return a name per row that has all in which rows differ, but for the ratio.

    It begins with the criterion; then come the columns that vary, then other fields of the configuration.
    """
    columns = [name for name in SETTING if name not in ("criterion", "ratio")]
    varying_columns = [name for name in columns if table[name].nunique() > 1]
    varying_fields = list_varying_fields(table)
    return [
        ", ".join(
            [
                row["criterion"],
                *(f"{name} {row[name]}" for name in varying_columns),
                *(f"{word}={row['setting'][key]}" for key, word in varying_fields.items() if key in row["setting"]),
            ]
        )
        for row in table.assign(setting=table["setting"].map(format_setting)).to_dict("records")
    ]


def list_varying_fields(table: pd.DataFrame) -> dict[str, str]:
    """Return {field of the configuration: its shortest name} of the fields that columns do not show and that vary.

    A field that only one choice of a group has, such as those of a data set, follows from the name of that choice. The
    shortest name of a field is the end of it that no other field has.
    """
    fields_in_columns = {
        "criterion.name",
        "data.name",
        "distillation.name",
        "repair.name",
        "selection.budget",
        "selection.name",
        "selection.ratio",
        "selection.target",
        "selection.variant",  # BK-SDM's sets are the points of one curve
        "task.name",
        "teacher.name",
        "trainer.steps",
        # These follow from the criterion's name in the table, or from the selection.
        *(f"criterion.{name}" for name in ("level", "ratio", "target", "budget")),
    }
    fields = pd.DataFrame(list(table["setting"].map(format_setting)), index=table.index)
    choices = [table[name] for name in CHOICES if name != "criterion"]
    criteria = [fields["criterion.name"]] if "criterion.name" in fields else []
    names = [
        key
        for key in fields
        if key not in fields_in_columns
        and not key.startswith("evaluation.metric")
        and fields.groupby(choices + (criteria if key.startswith("criterion.") else []))[key]
        .nunique(dropna=False)
        .gt(1)
        .any()
    ]
    return {name: shorten_field(name, list(fields)) for name in names}


def format_setting(setting: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields of a configuration as texts; a long one has its end and a hash, and stays unlike others.

    Fields that only Hydra reads, such as `_partial_`, are left out.
    """
    texts = {key: str(value) for key, value in setting.items() if not key.rpartition(".")[2].startswith("_")}
    return {
        key: text if len(text) <= VALUE_LENGTH else f"...{text[12 - VALUE_LENGTH :]}#{digest(text)[:8]}"
        for key, text in texts.items()
    }


def shorten_field(name: str, names: Sequence[str]) -> str:
    """Return the shortest end of a field's dotted name that no other of `names` has."""
    parts = name.split(".")
    ends = [".".join(parts[start:]) for start in range(len(parts) - 1, 0, -1)]
    unique = (end for end in ends if sum(f".{other}".endswith(f".{end}") for other in names) == 1)
    return next(unique, name)


def have_comparable_latencies(table: pd.DataFrame) -> bool:
    """Tell whether all runs of all rows were timed at one batch size on one device."""
    return table["latency_at"].nunique() == 1 and bool(table["latency_ratio"].notna().all())


def choose_label_column(table: pd.DataFrame) -> str:
    """Return "criterion" where the columns of a table tell its rows apart, else "method", which does so always."""
    return "method" if table.duplicated(SETTING).any() else "criterion"


def list_varying_choices(table: pd.DataFrame) -> list[str]:
    """Return which of task, teacher and data differ between the rows of a table, whose label does not say so."""
    names = ("task", "teacher", "data")
    return [name for name in names if table[name].nunique() > 1] if choose_label_column(table) == "criterion" else []


def list_repairs(table: pd.DataFrame) -> list[str]:
    """Return the column "repair" where a row of a table has a repair, else nothing."""
    return ["repair"] if (table["repair"] != "none").any() else []


def name_quality(table: pd.DataFrame) -> str:
    """Return the names of the measures that the quality columns hold, "output loss" where no other was taken."""
    return ", ".join(sorted({str(name) for name in table["metric"].dropna()})) or "output loss"


def list_further_budgets(table: pd.DataFrame) -> list[str]:
    """Return the columns with the achieved ratio of each budget of runs with several, but for the first of all rows."""
    names = [name for name in table if name.startswith("achieved/") and not name.endswith(" std")]
    return [name for name in names if not (table[name].isna() | (table[name] == table["achieved"])).all()]


def list_further_measures(table: pd.DataFrame) -> list[str]:
    """Return the columns with the measures after the first, of the networks that runs deliver."""
    names = [name for name in table if name.startswith("eval/") and not name.endswith(" std")]
    return [name for name in names if table[name].notna().any()]


def list_warnings(table: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """Return sentences on what makes rows of a table incomparable, and on runs that lie in several folders."""
    warnings = []
    copies = [
        f"{copy} (as {Path(page).parent})"
        for page, names in zip(runs["page"], runs["copies"], strict=True)
        for copy in names
    ]
    if copies:
        warnings.append(f"Folders that hold a run that is counted already: {abbreviate(copies)}.")
    if not have_comparable_latencies(table):
        conditions = "; ".join(sorted(set(runs["latency_at"])))
        warnings.append(f"Latencies were measured at {conditions}: these are not comparable.")
    if table.loc[table["protocol"] != "", "protocol"].nunique() > 1:  # "" of runs without an evaluation
        warnings.append("These runs were evaluated under different protocols; their qualities are not comparable.")
    selections = table.groupby("criterion")["selection"].agg(set)
    if len(selections) > 1 and any(names != selections.iloc[0] for names in selections):
        warnings.append("The criteria were not all used with the same selection; compare rows of one selection only.")
    return warnings


# Markdown


def format_markdown(cells: pd.DataFrame) -> str:
    """Return a table of texts in Markdown, its columns aligned."""
    return cells.to_markdown(index=False, tablefmt="github", disable_numparse=True) + "\n"


def format_tables(table: pd.DataFrame) -> str:
    """Return a table in Markdown per teacher, since different teachers may be measured differently."""
    parts = list(table.groupby("teacher"))
    choices = [name for name in list_varying_choices(table) if name != "teacher"]
    return "\n".join((f"{name}\n\n" if len(parts) > 1 else "") + format_table(part, choices) for name, part in parts)


def format_table(table: pd.DataFrame, choices: Sequence[str] = ()) -> str:
    """Return the rows of one teacher in Markdown, as means, with standard deviations where there are several runs.

    `choices` are columns that follow the first one.
    """
    quality, label = name_quality(table), choose_label_column(table)
    columns = {
        label: list(table[label]),
        **{name: list(table[name]) for name in choices},
        "selection": list(table["selection"]),
        **{name: list(table[name]) for name in list_repairs(table)},
        "distillation (steps)": [f"{row['distillation']} ({row['steps']})" for _, row in table.iterrows()],
        "ratio": [f"{ratio:.4g}" for ratio in table["ratio"]],
        "achieved": format_spreads(table, "achieved", 3),
        **{name.replace("/", ", "): format_spreads(table, name, 3) for name in list_further_budgets(table)},
        "parameters": [f"{count / 1e6:.2f} M" for count in table["params"]],
        "MACs": format_counts(table["macs"]),
    }
    for head, name in (("target", "target"), ("FLOPs", "flops")):
        if table[name].notna().any():
            columns[head] = format_counts(table[name])
    columns["latency"] = format_latencies(table)
    measures = [("output_loss_pruned", "output loss, pruned", 4), ("output_loss", "output loss", 4)]
    if quality != "output loss":
        measures += [("quality_pruned", f"{quality}, pruned", 2), ("quality", quality, 2)]
    measures += [(name, name.removeprefix("eval/"), 2) for name in list_further_measures(table)]
    for name, head, digits in measures:
        columns[head] = format_spreads(table, name, digits if table[name].abs().max() >= 1 else 4)
    columns["gap closed"] = format_spreads(table, "gap_closed", 2)
    columns["runs"] = [str(count) for count in table["runs"]]
    return format_markdown(pd.DataFrame(columns))


def format_spreads(table: pd.DataFrame, name: str, digits: int) -> list[str]:
    """Return the means of a column, each with its standard deviation unless that is 0; "" where there is no mean."""
    texts = []
    for mean, deviation in zip(table[name], table[f"{name} std"], strict=True):
        spread = f" ± {deviation:.{digits}f}" if not pd.isna(deviation) and deviation > 0 else ""
        texts.append("" if pd.isna(mean) else f"{mean:.{digits}f}{spread}")
    return texts


def format_latencies(table: pd.DataFrame) -> list[str]:
    """Return the latencies as ratios of student to teacher, with batch size and device where these vary."""
    varying = not have_comparable_latencies(table)
    conditions = [f" ({text})" if varying else "" for text in table["latency_at"]]
    ratios = format_spreads(table, "latency_ratio", 2)
    return [f"x{ratio}{text}" if ratio else "" for ratio, text in zip(ratios, conditions, strict=True)]


def format_counts(counts: Iterable[float]) -> list[str]:
    """Return counts in one unit, billions (G) or millions (M), whichever suits the largest; nothing for NaN."""
    values = [float(count) for count in counts]
    size, letter, digits = (1e9, "G", 3) if any(value >= 1e9 for value in values) else (1e6, "M", 2)
    return ["" if math.isnan(value) else f"{value / size:.{digits}f} {letter}" for value in values]


def abbreviate(names: Sequence[str], count: int = 3) -> str:
    """Return the first names of a list in a line, with "..." where there are more."""
    return ", ".join([*names[:count], *(["..."] if len(names) > count else [])])


# Units of channels


def tabulate_channels(scores: dict[str, dict[str, float]], removed: set[str]) -> pd.DataFrame:
    """Return a row per unit, in the order of the forward pass, with the columns group, score and removed."""
    rows = [(group(name), entry["score"], name in removed) for name, entry in scores.items()]
    return pd.DataFrame(rows, columns=["group", "score", "removed"])


def summarise_groups(scores: dict[str, dict[str, float]], removed: set[str]) -> list[dict[str, Any]]:
    """Return a row per group of channels: how many units it has and keeps; lowest, mean and highest score."""
    groups = tabulate_channels(scores, removed).groupby("group", sort=False)
    table = groups["score"].agg(["min", "mean", "max"])
    table = table.assign(units=groups.size(), kept=groups.size() - groups["removed"].sum())
    return table.reset_index().to_dict("records")
