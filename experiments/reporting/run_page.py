"""The report of one run: its figures, report.html, and the summary that a job prints at its end."""

import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from experiments.engine.artefacts import read_array, read_json
from experiments.engine.identity import read_config
from experiments.engine.measures import describe_protocol, describe_references
from experiments.engine.texts import read_texts
from experiments.reporting import figures
from experiments.reporting.front import report_fronts
from experiments.reporting.pages import encode_address, write_page
from experiments.reporting.run_files import (
    Scoring,
    get_achieved_ratio,
    get_measures,
    list_achieved_ratios,
    list_histories,
    list_networks,
    list_protected_units,
    list_samplings,
    read_plans,
    read_scorings,
)
from experiments.reporting.run_names import name_run
from experiments.reporting.sounds import embed_sounds
from experiments.reporting.tables import abbreviate, format_counts, summarise_groups

COSTS = {
    "params": "parameters",
    "macs": "MACs, conv + linear",
    "macs_attention": "MACs, with attention",
    "flops": "FLOPs, as thop counts",
}
"""{cost of a network in metrics.json: its name for readers}"""


def report_run(folder: Path) -> str:
    """Write a run's figures, sounds and report.html into its folder; return the summary that the job prints."""
    metrics, measured = read_json(folder / "metrics.json"), read_json(folder / "measured.json")
    config, plans = read_config(folder), read_plans(folder)
    networks, scorings = list_samplings(metrics), read_scorings(folder, plans)
    score_figures = [draw_scoring(scoring, folder / "figures") for scoring in scorings]
    loss_figures = draw_histories(list_histories(folder), folder / "figures")
    sample_figure = draw_sample_images(folder, networks)
    summary = summarise(folder, metrics, measured, list_protected_units(plans))
    write_page(
        folder / "report.html",
        "run.html.j2",
        title=name_run(folder.name, config),
        report_command=shlex.join(["python", "-m", "experiments.report", str(folder.parent)]),
        summary=summary,
        networks=networks,
        samples=None if sample_figure is None else encode_address(sample_figure.read_bytes(), "image/png"),
        sounds=embed_sounds(folder, config, networks),
        texts=read_texts(folder, networks),
        quality=tabulate_quality(metrics, networks),
        better={name: protocol["better"] for name, protocol in get_measures(metrics).items()},
        protocol=describe_protocol(metrics["protocol"]) if "protocol" in metrics else None,
        references=describe_references(config, metrics.get("protocol", {})),
        losses={stage: encode_address(path.read_bytes(), "image/png") for stage, path in loss_figures.items()},
        scorings=[
            {
                "scoring": scoring,
                "figure": encode_address(path.read_bytes(), "image/png"),
                "groups": summarise_groups(scoring.scores, set(scoring.removed)) if scoring.has_channels else [],
            }
            for scoring, path in zip(scorings, score_figures, strict=True)
        ],
        repairs={
            path.stem: read_json(path) for path in sorted(folder.glob("repair*.json"), key=lambda path: path.stem)
        },
        fronts=report_fronts(folder),
        seconds=measured["seconds"],
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
    )
    return summary


# Figures


def draw_scoring(scoring: Scoring, folder: Path) -> Path:
    """Draw the scores of one score stage as scores.png, or scores_<stage>.png where it has a name of its own."""
    path = folder / f"{scoring.name.replace('-', '_')}.png"
    if scoring.has_channels:
        return figures.draw_group_scores(scoring.scores, set(scoring.removed), scoring.criterion, path)
    return figures.draw_unit_scores(scoring.scores, scoring.removed, scoring.criterion, path, scoring.protected)


def draw_histories(histories: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Draw the losses of each training stage and return {stage: figure}; a stage that logged no loss has none.

    The figure of a single stage is losses.png; those of several are losses_<stage>.png.
    """
    paths = {}
    for stage, history in histories.items():
        name = "losses" if len(histories) == 1 else f"losses_{stage}"
        table = pd.read_csv(history)
        # Names begin with the stage's name where that is not the usual one.
        table["name"] = table["name"].astype(str).str.replace(f"{stage}/", "train/")
        path = figures.draw_losses(table, folder / f"{name}.png")
        if path is not None:
            paths[stage] = path
    return paths


def draw_sample_images(folder: Path, networks: Sequence[str]) -> Path | None:
    """Draw the samples of all networks side by side as samples.png; None where the run has no images."""
    paths = {name: folder / "samples" / name / "images.npy" for name in networks}
    images = {name: read_array(path) for name, path in paths.items() if path.exists()}
    return figures.draw_sample_grids(images, folder / "figures" / "samples.png") if images else None


# Tables and the summary


def tabulate_quality(metrics: Mapping[str, Any], networks: Sequence[str]) -> dict[str, list[float | None]]:
    """Return {measure: its value for each network, None where it was not taken}, ordered by name."""
    pruned = tuple(f"{name}/" for name in networks[1:])
    names = {key.split("/")[1] for key in metrics if key.startswith(pruned)} - COSTS.keys()
    return {name: [metrics.get(f"{network}/{name}") for network in networks] for name in sorted(names)}


def summarise(
    folder: Path, metrics: Mapping[str, Any], measured: Mapping[str, Any], protected: Sequence[str] = ()
) -> str:
    """Return the block of lines at the end of a job, `protected` being the units that had to be kept."""
    networks, requested = list_networks(metrics), metrics["plan/requested_ratio"]
    ratios = list_achieved_ratios(metrics, measured)
    ratios = ratios or {metrics["plan/budget"]: (requested, get_achieved_ratio(metrics, measured))}
    removed = [
        f"{achieved:.4f} of {budget} ({f'asked for {round(asked, 4)}' if asked else 'a given plan'})"
        for budget, (asked, achieved) in ratios.items()
    ]
    lines = [
        (
            "removed",
            ", ".join(removed) + (f", {metrics['plan/removed_units']} units" if metrics["plan/removed_units"] else ""),
        ),
        *([("protected", f"{len(protected)} units ({abbreviate(protected)})")] if protected else []),
        *list_costs(metrics),
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
                for name in networks[1:]
                if f"{name}/output_loss" in metrics
            ),
        ),
    ]
    for measure, protocol in get_measures(metrics).items():
        values = [
            f"{format_value(metrics[f'{name}/{measure}'])} {name}"
            for name in (*list_samplings(metrics)[1:], "teacher")
            if f"{name}/{measure}" in metrics
        ]
        lines.append((measure, f"{', '.join(values)} ({describe_conditions(metrics['protocol'], protocol)})"))
    lines.append(("report", str(folder / "report.html")))
    if (folder / "export").exists():  # a pipeline may have no such stage
        lines.append(("exported network", str(folder / "export")))
    lines.append(("everything", str(folder)))
    return "\n".join(f"{name + ':':<24}{value}" for name, value in lines)


def describe_conditions(protocol: Mapping[str, Any], measure: Mapping[str, Any]) -> str:
    """Return in words what a measure was taken on: the samples, or the text or images that the network was given.

    `protocol` is that of all measures, `measure` the measure's own.
    """
    if measure.get("of") == "network":
        return ", ".join(f"{key} {value}" for key, value in measure.items() if key not in ("better", "of", "parts"))
    others = [f"{name}: {way['sampler']}, {way['steps']} steps" for name, way in protocol.get("samplers", {}).items()]
    return "; ".join([f"{protocol['samples']} samples, {protocol['sampler']}, {protocol['steps']} steps", *others])


def format_value(value: float) -> str:
    """Return a value with two decimals, or with three significant digits where it is less than 1."""
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def list_costs(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (name, "teacher's -> student's") for each cost that the networks have, and the target where one was set.

    A network that costs as much as the one before it, as after distillation, is left out.
    """
    networks = list_networks(metrics)
    if len(networks) < 2 or not all(f"{name}/params" in metrics for name in networks):
        networks = ["teacher", "student"]
    costs = {name: [metrics.get(f"{name}/{cost}") for cost in COSTS] for name in networks}
    distinct = networks[:1] + [b for a, b in itertools.pairwise(networks) if costs[a] != costs[b]]
    if len(distinct) == 1:  # nothing was removed
        distinct.append(networks[-1])
    lines = []
    for cost, name in COSTS.items():
        if not metrics.get(f"teacher/{cost}"):
            continue
        parts = ("macs", cost) if cost == "macs_attention" else (cost,)
        counts = [sum(metrics[f"{network}/{part}"] for part in parts) for network in distinct]
        has_target = cost == metrics["plan/budget"] and "plan/requested_target" in metrics
        if has_target:
            counts.append(metrics["plan/requested_target"])
        texts = [f"{count:,.0f}" for count in counts] if cost == "params" else format_counts(counts)
        target = f" (target {texts.pop()})" if has_target else ""
        tokens = f" ({metrics['macs_tokens']} tokens)" if "macs_tokens" in metrics and cost != "params" else ""
        lines.append((name, " -> ".join(texts) + tokens + target))
    return lines
