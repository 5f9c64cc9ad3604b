"""The report of a set of runs: one table, curves, and a page.

python -m experiments.report runs/prune                     # writes into runs/prune/report/
python -m experiments.report runs/prune --output report     # writes into report/
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from plotly.offline import get_plotlyjs

from conf.nested import flatten_dict
from experiments.engine.artefacts import UnwritableDirectory, digest, make_folder, read_json, remove, write_json
from experiments.engine.identity import decides_by_latency, drop_settings_without_effect, read_config
from experiments.engine.measures import describe_protocol, list_columns
from experiments.reporting import figures
from experiments.reporting.pages import write_page
from experiments.reporting.run_files import (
    get_achieved_ratio,
    get_gap_closed,
    get_measures,
    list_achieved_ratios,
    list_networks,
)
from experiments.reporting.run_names import get_name, name_run
from experiments.reporting.set_content import describe_set
from experiments.reporting.tables import (
    CHOICES,
    average_over_seeds,
    choose_label_column,
    format_counts,
    format_tables,
    have_comparable_latencies,
    list_further_budgets,
    list_further_measures,
    list_repairs,
    list_varying_choices,
    list_warnings,
    name_methods,
    name_quality,
)

log = logging.getLogger(__name__)

SEEDS = ("seed", "criterion.seed", "calibration.seed", "evaluation.seed", "data.seed")
"""Fields in which the runs of one row of a table may differ; the row is their average."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters of a cell that spreadsheets take for a formula."""


def report_set(root: Path, output: Path | None = None) -> Path:
    """Write results.csv, table.md, the figures and index.html of the runs below `root` into a folder.

    Args:
        root: the folder that the runs lie below; nothing else in it is changed.
        output: the folder to write into; None is root/report/.

    Returns the path of index.html. Raises ValueError where there is no finished run, UnwritableDirectory where the
    folder cannot be written to.
    """
    runs = collect_runs(root)
    table = average_over_seeds(runs)
    warnings = list_warnings(table, runs)
    for warning in warnings:
        log.warning(warning)
    folder = root / "report" if output is None else output
    make_folder(folder, "--output FOLDER")
    write_csv(runs, folder / "results.csv")
    (folder / "table.md").write_text(format_tables(table))
    pictures = draw_comparisons(table, folder)
    return write_page(
        folder / "index.html",
        "set.html.j2",
        title=root.name,
        metric=name_quality(runs),
        better=" or ".join(sorted(set(runs["better"]))),
        table=choose_columns(table),
        runs=runs.to_dict("records"),
        content=describe_set(runs, table, root, folder),
        plotly=get_plotlyjs(),
        unfinished=list_unfinished(root),
        protocols=sorted(set(table["protocol"]) - {""}),
        warnings=warnings,
        pictures=sorted(path.name for path in pictures),
    )


def collect_runs(root: Path) -> pd.DataFrame:
    """Return a row per finished run below `root`, ordered by what was run on what, ratio and seed.

    Runs of the same "row" differ in seeds only. A run that lies in several folders has one row, of the first folder;
    the other folders are its "copies". Where different teachers have one name, part of their fingerprints is added to
    it. Raises ValueError where there is no finished run.
    """
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(root.rglob("finished.json")):
        folder = path.parent
        if not (folder / "plan.json").exists():
            continue
        metrics, measured = read_json(folder / "metrics.json"), read_json(folder / "measured.json")
        cfg = read_config(folder)
        run_id = metrics["run_id"]
        if decides_by_latency(cfg["selection"]):  # the device decided the plan
            run_id += measured["device"]
        if run_id in rows:
            rows[run_id]["copies"].append(str(folder.relative_to(root)))
        else:
            rows[run_id] = make_row(root, folder, cfg, metrics, measured)
    if not rows:
        raise ValueError(f"{root} has no finished run below it (looked for finished.json beside plan.json)")
    if not any(row["metric"] for row in rows.values()):  # no run drew samples: the output loss is what there is
        for row in rows.values():
            row |= {"quality_pruned": row["output_loss_pruned"], "quality": row["output_loss"]}
    runs = pd.DataFrame(list(rows.values()))
    ambiguous = runs.groupby("teacher")["fingerprint"].transform("nunique") > 1
    runs.loc[ambiguous, "teacher"] += " (" + runs["fingerprint"].str[:8] + ")"
    runs["row"] = runs["setting"].map(digest) + runs["teacher"]
    order = [name for name in CHOICES if name != "teacher"]
    return runs.sort_values([*order, "ratio", "seed", "run"], ignore_index=True)


def make_row(
    root: Path, folder: Path, cfg: dict[str, Any], metrics: dict[str, Any], measured: dict[str, Any]
) -> dict[str, Any]:
    """Return the row of one run.

    Args:
        root: the folder of the set, which paths to pages are relative to.
        folder: the run's folder.
        cfg: its configuration.
        metrics: the content of its metrics.json.
        measured: the content of its measured.json.
    """
    measures = get_measures(metrics)
    metric = next(iter(measures), None)
    pruned = list_networks(metrics)[1]  # the first network after the teacher is not trained yet
    row = {
        "run": folder.name,
        "name": name_run(folder.name, cfg),
        "page": str((folder / "report.html").relative_to(root)),
        "copies": [],
        "setting": get_setting(cfg, measured["device"]),
        "task": get_name(cfg, "task"),
        "data": get_name(cfg, "data"),
        "teacher": cfg["teacher"]["name"],
        "fingerprint": read_json(folder / "plan.json")["teacher"],
        "criterion": name_criterion(cfg),
        "selection": cfg["selection"]["name"],
        "repair": get_name(cfg, "repair") or "none",  # before version 0.2 there was no repair
        "distillation": cfg["distillation"]["name"],
        "steps": cfg["trainer"]["steps"] if "_target_" in cfg["distillation"] else 0,
        "budget": metrics["plan/budget"],
        "ratio": metrics["plan/requested_ratio"],
        "target": metrics.get("plan/requested_target"),
        "seed": cfg["seed"],
        "criterion_seed": cfg["criterion"].get("seed"),
        "achieved": get_achieved_ratio(metrics, measured),
        "params": metrics["student/params"],
        "macs": metrics["student/macs"],
        "flops": metrics.get("student/flops"),
        "latency_ratio": measured["latency_ratio"],
        "latency_ms": measured["student/latency_ms"],
        "latency_at": f"batch {measured['latency_batch']}, {measured['device']}",
        "output_loss_pruned": metrics[f"{pruned}/output_loss"],
        "output_loss": metrics["eval/output_loss"],
        "gap_closed": get_gap_closed(metrics),
        "metric": metric,
        "better": measures[metric]["better"] if metric else "lower",
        "protocol": describe_protocol(metrics.get("protocol", {}), metric),
    }
    row |= {f"achieved/{name}": value for name, (_, value) in list_achieved_ratios(metrics, measured).items()}
    if row["ratio"] is None:  # units that were given: the ratio that they come to
        row["ratio"] = round(row["achieved"], 4)
    qualities = {"quality_pruned": ("pruned", pruned), "quality": ("eval", "eval"), "quality_teacher": ("teacher",) * 2}
    for quality, (prefix, network) in qualities.items():
        row[quality] = metrics.get(f"{network}/{metric}") if metric else None
        row |= {f"{prefix}/{name}": metrics.get(f"{network}/{name}") for name in list_columns(measures)[1:]}
    return row


def name_criterion(cfg: dict[str, Any]) -> str:
    """Return the criterion of a run, with the level of its units where these are not whole blocks.

    It is "none" where no score plays a part.
    """
    if cfg["selection"]["name"] == "bk_sdm":
        return "none"
    level = cfg["criterion"].get("level", "depth")
    name: str = cfg["criterion"]["name"]
    return name if level == "depth" else f"{name} ({level}s)"


def get_setting(cfg: dict[str, Any], device: str) -> dict[str, Any]:
    """Return a run's configuration as flat fields, without seeds and without what follows from other fields.

    Stored latents are identified by their path, since they may have been deleted meanwhile. The device is a field where
    it decided the plan.
    """
    fields = flatten_dict(drop_settings_without_effect(cfg | {"latents": None})) | {"latents": cfg["latents"]}
    if decides_by_latency(cfg["selection"]):
        fields["device"] = device
    return {key: value for key, value in fields.items() if key not in SEEDS and not key.endswith("_target_")}


def list_unfinished(root: Path) -> list[str]:
    """Return the names of the runs below a folder that have begun and not finished."""
    folders = [path.parent for path in root.rglob("config.yaml")]
    return sorted(folder.name for folder in folders if not (folder / "finished.json").exists())


def write_csv(runs: pd.DataFrame, path: Path) -> Path:
    """Write a row per run; texts that a spreadsheet would run as formulas begin with an apostrophe."""
    table = runs.drop(columns=["setting", "page", "copies", "fingerprint", "name", "row"])
    table = table.map(lambda value: f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value)
    table.to_csv(path, index=False)
    return path


def draw_comparisons(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw the figures of each teacher and protocol, after removing those of an earlier report; returns their paths."""
    manifest = folder / ".manifest.json"
    for name in read_json(manifest)["pictures"] if manifest.exists() else ():
        remove(folder / Path(name).name)
    parts = [part for _, part in table.groupby(["teacher", "protocol"])]
    pictures = [
        picture
        for number, part in enumerate(parts)
        for picture in figures.draw_comparison(
            part.assign(method=name_methods(part)),
            folder,
            f"_{number + 1}" if number else "",
            write_title(part) if len(parts) > 1 else "",
        )
    ]
    write_json(manifest, {"pictures": [picture.name for picture in pictures]})
    return pictures


def write_title(table: pd.DataFrame) -> str:
    """Return the title of the figures of rows that were measured alike: their task, teacher and data."""
    return ", ".join("/".join(sorted(set(table[name]) - {""})) for name in ("task", "teacher", "data"))


def choose_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of a table that the page shows, large counts as texts."""
    names = [
        choose_label_column(table),
        *list_varying_choices(table),
        "selection",
        *list_repairs(table),
        "distillation",
        "steps",
        "ratio",
        "achieved",
        *list_further_budgets(table),
        *(name for name in ("target", "flops") if table[name].notna().any()),
        "latency_ratio",
        *([] if have_comparable_latencies(table) else ["latency_at"]),
        "output_loss_pruned",
        "quality_pruned",
        "quality",
        *list_further_measures(table),
        "gap_closed",
        "runs",
    ]
    return table.assign(**{name: format_counts(table[name]) for name in ("target", "flops")})[names]


def main() -> None:
    logging.basicConfig(format="%(message)s")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description="Compare all finished runs below a folder."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, help="the folder to write into, by default report/ of the folder")
    arguments = parser.parse_args()
    try:
        page = report_set(arguments.folder, arguments.output)
    except (ValueError, UnwritableDirectory) as error:
        sys.exit(str(error))
    print((page.parent / "table.md").read_text())
    print(f"page: {page}")
