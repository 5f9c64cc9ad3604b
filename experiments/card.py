"""The model card of an export: what it is, what it was made of, and what was measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from conf.schema import ROOT
from experiments.measures import described
from lightning_modules.backbones.base import NetworkBackbone


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
    made = "\n".join(line_of(change, scores) for change in changes)
    protocol = described(metrics["protocol"]) if "protocol" in metrics else None
    return f"""---
library_name: {network.library}
license: {licence}
tags: [pruned]
---
# {name}, pruned

Made by secateur from {source}. The teacher's licence ({licence}) holds for these weights, too.

{usage(network)}
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


def usage(network: NetworkBackbone) -> str:
    """How an export of this network is loaded, in Markdown."""
    if network.library == "transformers":
        return """    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
"""
    around: Any = network.surroundings
    without, captions = ([], []) if around is None else (around.missing(), list(around.table or ()))
    absent = "".join(f", {name}=None" for name in without)
    return f"""    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True{absent})

(`trust_remote_code` is needed where a file `pruned_unet.py` lies beside the weights.)
{stored(captions)}"""


def stored(captions: Sequence[str]) -> str:
    """How to ask for pictures where there is no text encoder."""
    if not captions:
        return ""
    rows = "\n".join(f"- {row}: {caption or '(no caption)'}" for row, caption in enumerate(captions[:20]))
    return f"""
There is no text encoder: the states of {len(captions)} captions lie in `text/`, by row.

    from safetensors.torch import load_file
    states = load_file(f"{{folder}}/text/text-00000.safetensors")["encoder_hidden_states"].float()
    pipeline(prompt_embeds=states[1:2], negative_prompt_embeds=states[:1], guidance_scale=3.0)

{rows}
"""


def line_of(change: dict[str, Any], scores: dict[str, Any]) -> str:
    """A line of the card: what went, how, and its score."""
    unit = change.get("unit")
    score = f", score {scores[unit]['score']:.4g}" if unit in scores else ""
    return f"- {change['kind']}: `{unit or change['variant']}`{score}"
