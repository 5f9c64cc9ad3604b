"""The model card of an export: what it is, what it was made of, and what was measured."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from omegaconf import DictConfig, OmegaConf

from conf.schema import ROOT
from criteria.base import ChangeKind
from criteria.selection.base import group
from experiments.engine.measures import describe_protocol
from lightning_modules.backbones.base import NetworkBackbone

HUB_LIBRARIES = {"torch": "pytorch"}
"""Libraries under the names that the Hugging Face hub has for them, where these differ"""
UNKNOWN_LICENCE = "unknown"


def compose_model_card(
    cfg: DictConfig,
    plan: dict[str, Any],
    scores: dict[str, Any],
    metrics: dict[str, Any],
    network: NetworkBackbone,
    trainings: Sequence[tuple[str, int]] = (),
    onnx_usage: str = "",
) -> str:
    """Return the README.md of an export: metadata for the Hugging Face hub, and a description in Markdown.

    Args:
        cfg: the run's configuration.
        plan: the changes of all plans, the fingerprint of the teacher, and the predicted harm.
        scores: {unit: {"score": number}}; empty where nothing was scored.
        metrics: the content of metrics.json; figures that nobody measured are not in the card.
        network: the exported network, for its library and how it is loaded.
        trainings: name and optimiser steps of each distillation in their order.
        onnx_usage: how its ONNX export is opened, in Markdown; empty where there is none.
    """
    name, licence = name_and_licence(cfg.teacher)
    data = ModelCardData(
        library_name=HUB_LIBRARIES.get(network.library, network.library),
        license=licence,
        tags=["pruned"],
        pipeline_tag=network.pipeline_tag,
        base_model=cfg.teacher.path if is_hub_id(cfg.teacher.path) else None,
    )
    if results := evaluation_results(cfg, metrics, network):
        data.model_name, data.eval_results = f"{name}, pruned", results
    body = describe(cfg, plan, scores, metrics, network, trainings, onnx_usage)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}"))


def name_and_licence(teacher: DictConfig) -> tuple[str, str]:
    """Return the name and the licence of a teacher; those of its configuration only for the weights it is about."""
    name = teacher.get("name", "network")
    chosen = ROOT / "conf" / "teacher" / f"{name}.yaml"
    if chosen.exists() and teacher.path != OmegaConf.select(OmegaConf.load(chosen), "path"):
        return Path(teacher.path).name, UNKNOWN_LICENCE
    return name, teacher.get("license", UNKNOWN_LICENCE)


def is_hub_id(path: str) -> bool:
    """Tell whether a teacher's path is an id of the Hugging Face hub, <owner>/<name>."""
    return path.count("/") == 1 and not Path(path).exists()


def evaluation_results(cfg: DictConfig, metrics: dict[str, Any], network: NetworkBackbone) -> list[EvalResult]:
    """Return what was measured of the exported network, as the hub lists it; counts of its costs are not among it."""
    results = []
    for key, value in sorted(metrics.items()):
        measure = key.removeprefix("eval/")
        if measure == key or f"student/{measure}" in metrics or not isinstance(value, int | float):
            continue
        results.append(
            EvalResult(
                task_type=network.pipeline_tag or cfg.task.name,
                dataset_type=cfg.data.name,
                dataset_name=cfg.data.name,
                metric_type=measure,
                metric_value=value,
            )
        )
    return results


def describe(
    cfg: DictConfig,
    plan: dict[str, Any],
    scores: dict[str, Any],
    metrics: dict[str, Any],
    network: NetworkBackbone,
    trainings: Sequence[tuple[str, int]],
    onnx_usage: str,
) -> str:
    """Return the description in a model card, in Markdown. The arguments are those of `compose_model_card`."""
    teacher = cfg.teacher
    name, licence = name_and_licence(teacher)
    source = f"[{teacher.path}](https://huggingface.co/{teacher.path})" if is_hub_id(teacher.path) else f"`{name}`"
    rows = "\n".join(
        f"| {key} | {value} |" for key, value in sorted(metrics.items()) if isinstance(value, int | float | str)
    )
    changes = "\n".join(change_lines(plan["changes"], scores, network))
    protocol = describe_protocol(metrics["protocol"]) if "protocol" in metrics else None
    trained = ", then ".join(f"`{name}` ({steps} steps)" for name, steps in trainings) or "`none`"
    repair = f"repair `{cfg.repair.name}`, " if "_target_" in cfg.repair else ""
    return f"""# {name}, pruned

Made by secateur from {source}. The teacher's licence ({licence}) holds for these weights, too.

{network.card_usage()}{onnx_usage}
{f"Criterion `{cfg.criterion.name}`, sum of the removed units' scores {plan['predicted_harm']:.6g}. " if scores else ""}
Selection `{cfg.selection.name}`, {repair}distillation {trained}, seed {cfg.seed}. Teacher's fingerprint:
`{plan["teacher"][:16]}`.

## What was changed

{changes}

## What was measured

| | |
| --- | --- |
{rows}

{f"Protocol: {protocol}." if protocol else "No samples were evaluated."}
"""


def change_lines(changes: Sequence[dict[str, Any]], scores: dict[str, Any], network: NetworkBackbone) -> list[str]:
    """Return the lines that say what a plan changed: one per change, and one per group of channels that were cut."""
    removed_channels = [change["unit"] for change in changes if change["kind"] == ChangeKind.SLICE]
    others = [change for change in changes if change["kind"] != ChangeKind.SLICE]
    return [*width_lines(removed_channels, scores, network), *(change_line(change, scores) for change in others)]


def change_line(change: dict[str, Any], scores: dict[str, Any]) -> str:
    """Return one line: which unit was changed, how, and its score where it has one."""
    unit = change.get("unit")
    score = f", score {scores[unit]['score']:.4g}" if unit in scores else ""
    return f"- {change['kind']}: `{unit or change['variant']}`{score}"


def width_lines(removed: Sequence[str], scores: dict[str, Any], network: NetworkBackbone) -> list[str]:
    """Return one line per group of channels, of which there may be thousands: its width before and after, or the loss.

    The width before is known where the group's channels have scores.
    """
    gone, had = Counter(group(name) for name in removed), Counter(group(name) for name in scores)
    lines = []
    for name, less in gone.items():
        counts = f"{had[name]} -> {had[name] - less} {network.slices}"
        lines.append(f"- slice: `{name}`: " + (counts if name in had else f"{less} {network.slices} less"))
    return lines
