"""The content of the page of a set of runs as plain values, which its script draws as a table, curves and a panel."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from experiments.engine.artefacts import read_json
from experiments.engine.texts import read_texts
from experiments.reporting.run_files import (
    Scoring,
    get_measures,
    list_networks,
    list_samplings,
    read_plans,
    read_scorings,
)
from experiments.reporting.run_page import list_costs, tabulate_quality
from experiments.reporting.tables import format_setting, list_varying_fields, summarise_groups
from experiments.reporting.thumbnails import embed_thumbnail

GROUPS = {
    "method": "method",
    "criterion": "criterion",
    "selection": "selection",
    "repair": "repair",
    "distillation": "distillation",
    "steps": "training steps",
    "data": "data",
    "teacher": "teacher",
    "task": "task",
    "budget": "budget",
    "ratio": "ratio",
    "seed": "seed",
    "criterion_seed": "seed of the criterion",
    "latency_at": "latency timed at",
    "protocol": "protocol",
}
"""{column of the table of runs: its name for readers} of what runs are told apart, filtered and coloured by."""

COSTS = {
    "achieved": "achieved ratio",
    "params": "parameters",
    "macs": "MACs",
    "flops": "FLOPs",
    "target": "target",
    "latency_ratio": "latency, student / teacher",
    "latency_ms": "latency in ms",
    "output_loss_pruned": "output loss, pruned",
    "output_loss": "output loss",
}
"""{number of a run: its name for readers}; its ratio and the measures of the evaluation come before them."""

PROMPTS, PROMPT_LENGTH = 2, 300
"""How many continuations of a language model the panel shows, and how many characters of each."""


def describe_set(runs: pd.DataFrame, table: pd.DataFrame, root: Path, output: Path) -> dict[str, Any]:
    """Return all that the page shows: groups, numbers and runs, without NaN.

    Args:
        runs: what `collect_runs` returns.
        table: the same runs, averaged over seeds.
        root: the folder that the runs lie below.
        output: the folder of the page, which links to pages of runs are relative to.
    """
    rows = {row: number for number, row in enumerate(table["row"])}
    settings = [format_setting(setting) for setting in table["setting"]]
    fields = list_varying_fields(table)
    units: list[list[str]] = []
    content = []
    for run in runs.to_dict("records"):
        folder = root / Path(run["page"]).parent
        metrics, measured = read_json(folder / "metrics.json"), read_json(folder / "measured.json")
        row = rows[run["row"]]
        groups = {"method": table["method"][row]} | {name: run[name] for name in GROUPS if name in run}
        values = {name: run[name] for name in ("ratio", "gap_closed", *COSTS)}
        content.append(
            {
                "name": run["name"],
                "page": quote(os.path.relpath(folder / "report.html", output)),
                "row": row,
                "groups": groups | {name: settings[row].get(name) for name in fields},
                "values": values | list_measured_values(metrics),
                "panel": describe_run(folder, metrics, measured, len(runs), units),
            }
        )
    better = {name: protocol["better"] for run in content for name, protocol in run["panel"].pop("measures").items()}
    measures = {
        f"{network}/{name}": f"{name}{', pruned' if network == 'pruned' else ''}"
        for name in better
        for network in ("eval", "pruned")
    }
    return drop_nan(
        {
            "groups": GROUPS | fields,
            "numbers": {"ratio": "ratio", **measures, "gap_closed": "gap closed", **COSTS},
            "better": {f"{network}/{name}": text for name, text in better.items() for network in ("eval", "pruned")},
            "units": units,
            "runs": content,
        }
    )


def list_measured_values(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Return {network/measure: value} of a run, where the network is teacher, pruned or eval (the delivered one)."""
    networks = {"teacher": "teacher", "pruned": list_networks(metrics)[1], "eval": "eval"}
    return {
        f"{name}/{measure}": metrics.get(f"{network}/{measure}")
        for measure in get_measures(metrics)
        for name, network in networks.items()
    }


def describe_run(
    folder: Path, metrics: Mapping[str, Any], measured: Mapping[str, Any], runs: int, units: list[list[str]]
) -> dict[str, Any]:
    """Return what the panel shows of one run.

    Args:
        folder: the run's folder.
        metrics: the content of its metrics.json.
        measured: the content of its measured.json.
        runs: the number of runs on the page.
        units: the lists of unit names that earlier runs had, to which those of this run are added.
    """
    networks, plans = list_samplings(metrics), read_plans(folder)
    texts = read_texts(folder, networks)
    provenance = measured.get("provenance", {})
    command = provenance.get("job_command", provenance.get("command"))
    return {
        "networks": networks,
        "measures": get_measures(metrics),
        "quality": tabulate_quality(metrics, networks),
        "costs": list_costs(metrics),
        "samples": embed_thumbnail(folder, networks, runs),
        "texts": [
            [
                prompt[:PROMPT_LENGTH],
                {name: written[number][:PROMPT_LENGTH] for name, written in texts["texts"].items()},
            ]
            for number, prompt in enumerate(texts.get("prompts", [])[:PROMPTS])
        ],
        "strips": [describe_strip(scoring, units) for scoring in read_scorings(folder, plans)],
        "changes": [" ".join(change.values()) for plan in plans for change in plan["changes"] if "unit" not in change],
        "command": None if command is None else f"python {command}",
    }


def describe_strip(scoring: Scoring, units: list[list[str]]) -> dict[str, Any]:
    """Return the units of a scoring in the order of the forward pass: their names, scores, and the share that stays.

    Channels are shown by group, by their mean score. `names` is an index of `units`, where a new list is added: most
    runs have the units of the run before.
    """
    if scoring.has_channels:
        groups = summarise_groups(scoring.scores, set(scoring.removed))
        names = [group["group"] for group in groups]
        scores, kept = [group["mean"] for group in groups], [group["kept"] / group["units"] for group in groups]
    else:
        names, removed = list(scoring.scores), set(scoring.removed)
        scores, kept = (
            [entry["score"] for entry in scoring.scores.values()],
            [float(name not in removed) for name in names],
        )
    if names not in units:
        units.append(names)
    return {
        "criterion": scoring.criterion,
        "names": units.index(names),
        "scores": [float(f"{score:.4g}") for score in scores],
        "kept": [round(share, 3) for share in kept],
        "protected": [] if scoring.has_channels else [names.index(name) for name in scoring.protected if name in names],
    }


def drop_nan(content: Any) -> Any:
    """Return plain values for JSON: None in place of numbers that are not finite, which JSON does not have."""
    if isinstance(content, Mapping):
        return {str(key): drop_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [drop_nan(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
