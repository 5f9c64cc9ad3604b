"""The model card of an export: what it is, what it was made of, and what was measured."""

from typing import Any

from omegaconf import DictConfig

from experiments.run import effective


def model_card(cfg: DictConfig, plan: dict[str, Any], metrics: dict[str, Any]) -> str:
    """README.md of an export, in Markdown, from the run's own artefacts; figures nobody measured are not in it."""
    teacher, changes = cfg.teacher, plan["changes"]
    source = effective(cfg)["teacher"]["path"]
    rows = "\n".join(
        f"| {key} | {value} |" for key, value in sorted(metrics.items()) if isinstance(value, int | float | str)
    )
    made = "\n".join(f"- {change['kind']}: `{change.get('unit', change.get('variant'))}`" for change in changes)
    protocol = ", ".join(f"{key} {value}" for key, value in metrics.get("protocol", {}).items())
    return f"""---
library_name: diffusers
tags: [pruned]
---
# {teacher.get("name", "network")}, pruned

Made by secateur from `{source}`; the teacher's licence holds for these weights, too.

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

(`trust_remote_code` is needed where a file `pruned_unet.py` lies beside the weights.)

Criterion `{cfg.criterion.name}`, selection `{cfg.selection.name}`, distillation `{cfg.distillation.name}`
({cfg.trainer.steps if "_target_" in cfg.distillation else 0} steps), seed {cfg.seed}. Sum of the removed units' scores:
{plan["predicted_harm"]:.6g}. Teacher's fingerprint: `{plan["teacher"][:16]}`.

## What was changed

{made}

## What was measured

| | |
| --- | --- |
{rows}

{f"Protocol: {protocol}." if protocol else "No samples were evaluated."}
"""
