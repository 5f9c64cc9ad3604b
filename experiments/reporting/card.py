"""The model card of an export: what it is, what it was made of, and what was measured."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from conf.schema import ROOT
from criteria.selection.base import group
from experiments.engine.measures import described
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
    channels = [change["unit"] for change in changes if ":" in change.get("unit", "")]
    lines = width_lines(channels, scores, network) if channels else [line_of(change, scores) for change in changes]
    made = "\n".join(lines)
    task = "\npipeline_tag: image-classification" if network.library == "torch" else ""
    protocol = described(metrics["protocol"]) if "protocol" in metrics else None
    return f"""---
library_name: {"pytorch" if network.library == "torch" else network.library}
license: {licence}
tags: [pruned]{task}
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
    if network.library == "torch":
        return classifying(*network.example_inputs(1, "meta")["sample"].shape[1:])
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


def classifying(channels: int, height: int, width: int) -> str:
    """How an image classifier is loaded and asked about a picture, in Markdown."""
    return f"""    import sys
    import numpy, torch
    from PIL import Image
    sys.path.insert(0, folder)
    from image_networks import load  # the file beside the weights
    network = load(folder).eval()
    picture = Image.open("picture.png").convert("{"RGB" if channels == 3 else "L"}").resize(({width}, {height}))
    image = torch.from_numpy(numpy.atleast_3d(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        print(network(image).softmax(1))

`image_networks.py` needs torch and safetensors (and torchvision for the networks that are torchvision's).
"""


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


def width_lines(removed: Sequence[str], scores: dict[str, Any], network: NetworkBackbone) -> list[str]:
    """Of channels, which may be thousands, a line a group: how many it had, where that is known, and has."""
    unit = "channels" if network.library == "torch" else "units"
    gone = Counter(group(name) for name in removed)
    had = Counter(group(name) for name in scores)
    return [
        f"- slice: `{name}`: " + (f"{had[name]} -> {had[name] - less} {unit}" if name in had else f"{less} {unit} less")
        for name, less in gone.items()
    ]
