"""The model card of an export: what it is, what it was made of, and what was measured."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from conf.schema import ROOT
from criteria.selection.base import group
from experiments.engine.measures import describe_protocol
from lightning_modules.backbones.base import NetworkBackbone

LIBRARIES = {"torch": "pytorch"}
"""Libraries under the names that the Hugging Face hub has for them, where these differ."""


def model_card(
    cfg: DictConfig,
    plan: dict[str, Any],
    scores: dict[str, Any],
    metrics: dict[str, Any],
    network: NetworkBackbone,
) -> str:
    """README.md of an export, in Markdown, from the run's own artefacts; figures nobody measured are not in it."""
    teacher, changes = cfg.teacher, plan["changes"]
    name, licence = teacher.get("name", "network"), teacher.get("license", "unknown")
    chosen = ROOT / "conf" / "teacher" / f"{name}.yaml"
    if chosen.exists() and teacher.path != OmegaConf.select(OmegaConf.load(chosen), "path"):  # weights of another name
        name, licence = Path(teacher.path).name, "unknown"
    is_hub_id = teacher.path.count("/") == 1 and not Path(teacher.path).exists()
    source = f"[{teacher.path}](https://huggingface.co/{teacher.path})" if is_hub_id else f"`{name}`"
    rows = "\n".join(
        f"| {key} | {value} |" for key, value in sorted(metrics.items()) if isinstance(value, int | float | str)
    )
    channels = [change["unit"] for change in changes if change["kind"] == "slice"]
    lines = width_lines(channels, scores, network) if channels else [line_of(change, scores) for change in changes]
    made = "\n".join(lines)
    task = f"\npipeline_tag: {network.pipeline_tag}" if network.pipeline_tag else ""
    protocol = describe_protocol(metrics["protocol"]) if "protocol" in metrics else None
    return f"""---
library_name: {LIBRARIES.get(network.library, network.library)}
license: {licence}
tags: [pruned]{task}
---
# {name}, pruned

Made by secateur from {source}. The teacher's licence ({licence}) holds for these weights, too.

{network.card_usage()}
{f"Criterion `{cfg.criterion.name}`, sum of the removed units' scores {plan['predicted_harm']:.6g}. " if scores else ""}
Selection `{cfg.selection.name}`, distillation `{cfg.distillation.name}`
({cfg.trainer.steps if "_target_" in cfg.distillation else 0} steps), seed {cfg.seed}. Teacher's fingerprint:
`{plan["teacher"][:16]}`.

## What was changed

{made}

## What was measured

| | |
| --- | --- |
{rows}

{f"Protocol: {protocol}." if protocol else "No samples were evaluated."}
"""


def line_of(change: dict[str, Any], scores: dict[str, Any]) -> str:
    """A line of the card: what went, how, and its score."""
    unit = change.get("unit")
    score = f", score {scores[unit]['score']:.4g}" if unit in scores else ""
    return f"- {change['kind']}: `{unit or change['variant']}`{score}"


def width_lines(removed: Sequence[str], scores: dict[str, Any], network: NetworkBackbone) -> list[str]:
    """Return a line per group of channels, of which there may be thousands: how many it had, where known, and has."""
    gone, had = Counter(group(name) for name in removed), Counter(group(name) for name in scores)
    lines = []
    for name, less in gone.items():
        counts = f"{had[name]} -> {had[name] - less} {network.slices}"
        lines.append(f"- slice: `{name}`: " + (counts if name in had else f"{less} {network.slices} less"))
    return lines
