"""Reports: one page for a run, and one for any set of runs.

python -m experiments.report runs/prune        # table (CSV, Markdown), curves and a page in runs/prune/report/
"""

import argparse
import base64
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.engine.artefacts import read_json, remove, write_json
from experiments.engine.identity import read_config, without_no_effect
from experiments.engine.measures import columns, described
from experiments.engine.texts import texts_of
from experiments.reporting import figures
from experiments.reporting.dashboard import flat
from experiments.reporting.sounds import page_sounds
from experiments.reporting.tables import (
    amounts,
    are_channels,
    averaged,
    by_teacher,
    channel_groups,
    first_of,
    metric_of,
    others,
    timed_alike,
    told_by,
    warnings_of,
)

PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
)
COSTS = {
    "params": "parameters",
    "macs": "MACs, conv + linear",
    "macs_attention": "MACs, with attention",
    "flops": "FLOPs, as thop counts",
}
"""What metrics.json has of a network's costs, and what they are called."""
SEEDS = ("seed", "criterion.seed", "calibration.seed", "evaluation.seed", "data.seed")
"""Runs whose configurations agree in all but these are one row of a table, averaged."""


def report_run(folder: Path) -> str:
    """Draw a run's figures and its report.html; returns the summary that the job prints."""
    metrics, measured = read_json(folder / "metrics.json"), read_json(folder / "measured.json")
    plan = read_json(folder / "plan.json")
    config = read_config(folder)
    removed = [change["unit"] for change in plan["changes"] if "unit" in change]
    protected = plan.get("protected", [])
    scores: dict[str, Any] = {}
    if (folder / "scores.json").exists():  # selections with sets of their own need none
        stored = read_json(folder / "scores.json")
        scores = stored["scores"]
        figures.unit_scores(scores, removed, stored["criterion"], folder / "figures" / "scores.png", protected)
    histories = sorted((folder / "history").glob("*.csv"))
    for path in histories:
        name = "losses" if len(histories) == 1 else f"losses_{path.stem}"
        figures.loss_curves(pd.read_csv(path), folder / "figures" / f"{name}.png")
    networks = metrics["networks"]
    images = {name: folder / "samples" / name / "images.npy" for name in networks}
    images = {name: path for name, path in images.items() if path.exists()}
    if images:
        figures.sample_grids(
            {name: np.load(path, mmap_mode="r", allow_pickle=False) for name, path in images.items()},
            folder / "figures" / "samples.png",
        )

    summary = summarise(folder, metrics, measured, protected)
    measures = sorted(
        {key.split("/")[1] for name in networks[1:] for key in metrics if key.startswith(f"{name}/")} - {*COSTS}
    )
    page = PAGES.get_template("run.html.j2").render(
        quality={key: [metrics.get(f"{name}/{key}") for name in networks] for key in measures},
        better={key: part["better"] for key, part in measures_of(metrics).items()},
        protocol=described(metrics["protocol"]) if "protocol" in metrics else None,
        networks=networks,
        title=folder.name,
        summary=summary,
        sounds=page_sounds(folder, config, networks),
        written=texts_of(folder, networks),
        metrics=metrics,
        measured=measured,
        removed=set(removed),
        protected=protected,
        units={} if are_channels(scores) else scores,
        groups=channel_groups(scores, set(removed)) if are_channels(scores) else [],
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        pictures={path.stem: inline(path) for path in sorted((folder / "figures").glob("*.png"))},
    )
    (folder / "report.html").write_text(page)
    return summary


def summarise(folder: Path, metrics: dict[str, Any], measured: dict[str, Any], protected: Sequence[str] = ()) -> str:
    """The block at the end of a job."""
    requested = metrics["plan/requested_ratio"]
    achieved = achieved_ratio(metrics, measured)
    lines = [
        (
            "removed",
            f"{achieved:.4f} of {metrics['plan/budget']} "
            f"({f'asked for {round(requested, 4)}' if requested else 'a given plan'})"
            + (f", {metrics['plan/removed_units']} units" if metrics["plan/removed_units"] else ""),
        ),
        *([("protected", f"{len(protected)} units ({first_of(protected)})")] if protected else []),
        *costs(metrics),
        (
            "latency",
            f"{measured['teacher/latency_ms']:.1f} ms -> {measured['student/latency_ms']:.1f} ms "
            f"(x{measured['latency_ratio']:.2f}; batch {measured['latency_batch']}, {measured['device']})",
        ),
        ("peak memory of the job", f"{measured['peak_memory_bytes'] / 2**30:.2f} GiB"),
        (
            "output loss",
            " -> ".join(
                f"{metrics[f'{name}/output_loss']:.5f} {name}"
                for name in metrics["networks"][1:]
                if f"{name}/output_loss" in metrics
            ),
        ),
    ]
    for metric, own in measures_of(metrics).items():
        values = [
            f"{shown(metrics[f'{name}/{metric}'])} {name}"
            for name in (*metrics["networks"][1:], "teacher")
            if f"{name}/{metric}" in metrics
        ]
        lines.append((metric, f"{', '.join(values)} ({taken_how(metrics['protocol'], own)})"))
    lines += [
        ("report", str(folder / "report.html")),
        ("exported network", str(folder / "export")),
        ("everything", str(folder)),
    ]
    return "\n".join(f"{name + ':':<24}{value}" for name, value in lines)


def taken_how(protocol: dict[str, Any], own: dict[str, Any]) -> str:
    """The samples that a measure was taken of; of a measure of the network itself, its own protocol."""
    if own.get("of") == "network":
        return ", ".join(f"{key} {value}" for key, value in own.items() if key not in ("better", "of", "parts"))
    return f"{protocol['samples']} samples, {protocol['sampler']}, {protocol['steps']} steps"


def measures_of(metrics: dict[str, Any]) -> dict[str, Any]:
    """The protocols of the measures that were taken, by name; the first is the one that is drawn."""
    return metrics.get("protocol", {}).get("measures", {})


def shown(value: float) -> str:
    """Two decimals, or where that says too little three digits."""
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def achieved_ratio(metrics: dict[str, Any], measured: dict[str, Any]) -> float:
    """What the built student lacks of the budget: of a latency budget it is measured, and not the units' sum."""
    return (metrics | measured)["plan/achieved_ratio"]


def costs(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of what teacher and student cost, as far as such networks have it, and of the target if there was one."""
    lines = []
    for cost, head in COSTS.items():
        if not metrics.get(f"teacher/{cost}"):
            continue
        summed = ("macs", cost) if cost == "macs_attention" else (cost,)
        counts = [sum(metrics[f"{name}/{part}"] for part in summed) for name in ("teacher", "student")]
        if cost == metrics["plan/budget"] and "plan/requested_target" in metrics:
            counts.append(metrics["plan/requested_target"])
        teacher, student, *target = [f"{count:,.0f}" for count in counts] if cost == "params" else amounts(counts)
        tokens = f" ({metrics['macs_tokens']} tokens)" if "macs_tokens" in metrics and cost != "params" else ""
        lines.append((head, f"{teacher} -> {student}{tokens}" + (f" (target {target[0]})" if target else "")))
    return lines


def inline(path: Path) -> str:
    """A picture as a data address, so that the page is one file."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


# Sets of runs


def collect(root: Path) -> pd.DataFrame:
    """A row a finished run below `root`, ordered by what it is. Raises ValueError where there is none.

    A run that several folders hold has one row, of the first of them; the others are its "copies". A teacher's name
    has a part of its fingerprint where others have that name.
    """
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(root.rglob("finished.json")):
        folder = path.parent
        if not (folder / "plan.json").exists():
            continue
        metrics, measured = read_json(folder / "metrics.json"), read_json(folder / "measured.json")
        cfg = read_config(folder)
        run_id = metrics["run_id"]
        if cfg["selection"].get("budget") == "latency":  # the device decided the plan
            run_id += measured["device"]
        if run_id in rows:
            rows[run_id]["copies"].append(str(folder.relative_to(root)))
            continue
        protocol, measures = metrics.get("protocol", {}), measures_of(metrics)
        metric = next(iter(measures), None)
        row = {
            "run": folder.name,
            "page": str((folder / "report.html").relative_to(root)),
            "copies": [],
            "setting": setting(cfg, measured["device"]),
            "teacher": cfg["teacher"]["name"],
            "fingerprint": read_json(folder / "plan.json")["teacher"],
            "criterion": scored_by(cfg),
            "selection": cfg["selection"]["name"],
            "distillation": cfg["distillation"]["name"],
            "steps": cfg["trainer"]["steps"] if "_target_" in cfg["distillation"] else 0,
            "budget": metrics["plan/budget"],
            "ratio": metrics["plan/requested_ratio"],
            "target": metrics.get("plan/requested_target"),
            "seed": cfg["seed"],
            "criterion_seed": cfg["criterion"].get("seed"),
            "achieved": achieved_ratio(metrics, measured),
            "params": metrics["student/params"],
            "macs": metrics["student/macs"],
            "flops": metrics.get("student/flops"),
            "latency_ratio": measured["latency_ratio"],
            "latency_ms": measured["student/latency_ms"],
            "latency_at": f"batch {measured['latency_batch']}, {measured['device']}",
            "output_loss_pruned": metrics[f"{first_pruned(metrics)}/output_loss"],
            "output_loss": metrics["eval/output_loss"],
            "metric": metric,
            "better": measures[metric]["better"] if metric else "lower",
            "protocol": described(protocol, metric),
        }
        if row["ratio"] is None:  # units that were given: their own ratio
            row["ratio"] = round(row["achieved"], 4)
        for name, key in (
            ("quality_pruned", first_pruned(metrics)),
            ("quality", "eval"),
            ("quality_teacher", "teacher"),
        ):
            row[name] = metrics.get(f"{key}/{metric}") if metric else None
            row |= {f"{key}/{other}": metrics.get(f"{key}/{other}") for other in columns(measures)[1:]}
        rows[run_id] = row
    if not rows:
        raise ValueError(f"{root} has no finished run below it (looked for finished.json beside plan.json)")
    if not any(row["metric"] for row in rows.values()):  # no run drew samples: the output loss is what there is
        for row in rows.values():
            row |= {"quality_pruned": row["output_loss_pruned"], "quality": row["output_loss"]}
    runs = pd.DataFrame(list(rows.values()))
    several = runs.groupby("teacher")["fingerprint"].transform("nunique") > 1
    runs.loc[several, "teacher"] += " (" + runs["fingerprint"].str[:8] + ")"
    return runs.sort_values(["criterion", "selection", "distillation", "ratio", "seed", "run"], ignore_index=True)


def first_pruned(metrics: dict[str, Any]) -> str:
    """Return the name of the first network that a run has made: as pruned, before any training."""
    name: str = metrics["networks"][1]
    return name


def scored_by(cfg: dict[str, Any]) -> str:
    """The criterion, with the level of its units where that is not whole blocks; `none` where no score plays a part."""
    if cfg["selection"]["name"] == "bk_sdm":
        return "none"
    level = cfg["criterion"].get("level", "depth")
    name: str = cfg["criterion"]["name"]
    return name if level == "depth" else f"{name} ({level}s)"


def setting(cfg: dict[str, Any], device: str) -> dict[str, Any]:
    """A run's configuration as flat fields, without seeds and without what is derived from others.

    Latents are told by their path, as they need not be there any more; the device is a field where it decided the plan.
    """
    fields = flat(without_no_effect(cfg | {"latents": None})) | {"latents": cfg["latents"]}
    if cfg["selection"].get("budget") == "latency":
        fields["device"] = device
    return {key: value for key, value in fields.items() if key not in SEEDS and not key.endswith("_target_")}


FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a cell begins with that spreadsheets take for a formula."""


def escaped(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose texts no spreadsheet runs as formulas: those that begin like one begin with an apostrophe."""
    return table.map(lambda value: f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value)


def report_set(root: Path) -> Path:
    """Write report/ below `root`: results.csv, table.md, curves and index.html; returns the page."""
    runs = collect(root)
    table = averaged(runs)
    notes = warnings_of(table, runs)
    print(*notes, sep="\n")
    metric = metric_of(runs)
    better = " or ".join(sorted(set(runs["better"])))
    folder = root / "report"
    folder.mkdir(exist_ok=True)
    manifest = folder / ".manifest.json"
    for old in read_json(manifest)["pictures"] if manifest.exists() else ():
        remove(folder / Path(old).name)
    table_of_runs = runs.drop(columns=["setting", "page", "copies", "fingerprint"])
    escaped(table_of_runs).to_csv(folder / "results.csv", index=False)
    (folder / "table.md").write_text(by_teacher(table))
    pictures = [
        picture
        for number, (_, part) in enumerate(table.groupby(["teacher", "protocol"]))  # what may share one pair of axes
        for picture in figures.comparison(part, folder, f"_{number + 1}" if number else "")
    ]
    write_json(manifest, {"pictures": [picture.name for picture in pictures]})
    waiting = sorted(p.parent.name for p in root.rglob("config.yaml") if not (p.parent / "finished.json").exists())
    shown = [
        told_by(table),
        "selection",
        "distillation",
        "steps",
        "ratio",
        "achieved",
        *(name for name in ("target", "flops") if table[name].notna().any()),
        "latency_ratio",
        *([] if timed_alike(table) else ["latency_at"]),
        "output_loss_pruned",
        "quality_pruned",
        "quality",
        *others(table),
        "runs",
    ]
    page = PAGES.get_template("set.html.j2").render(
        title=root.name,
        metric=metric,
        better=better,
        rows=table.assign(**{name: amounts(table[name]) for name in ("target", "flops")})[shown].to_dict("records"),
        columns=shown,
        runs=runs.to_dict("records"),
        waiting=waiting,
        protocols=sorted(table["protocol"].unique()),
        notes=notes,
        pictures={path.stem: inline(path) for path in sorted(pictures)},
    )
    (folder / "index.html").write_text(page)
    return folder / "index.html"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description="Compare all finished runs below a folder."
    )
    parser.add_argument("folder", type=Path)
    root = parser.parse_args().folder
    try:
        page = report_set(root)
    except ValueError as error:
        sys.exit(str(error))
    print((page.parent / "table.md").read_text())
    print(f"page: {page}")


if __name__ == "__main__":
    main()
