"""The inputs of a diffusion network for a training batch: timesteps, noise and captions as the configuration says."""

from typing import Any

import torch
from torch import Tensor

from criteria.base import Batch
from datamodules.latents import SHARED
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.diffusion.pipeline_parts import move
from lightning_modules.losses.timesteps import Timesteps


def draw_training_inputs(backbone: NetworkBackbone, batch: Batch, timesteps: Timesteps, drop_text: float) -> Batch:
    """Return the inputs of a network for a training batch.

    Args:
        backbone: the network.
        batch: a batch of the data module.
        timesteps: draws timesteps and weighs samples.
        drop_text: see `drop_captions`; it has no effect on networks that take no text.
    """
    inputs = timesteps.training_inputs(backbone, batch)
    if not (backbone.takes_text and drop_text):
        return inputs
    return inputs | {"conditions": drop_captions(backbone, inputs, batch, drop_text)}


def drop_captions(backbone: NetworkBackbone, inputs: Batch, batch: Batch, probability: float) -> dict[str, Any]:
    """Return the conditions of `inputs`, where each sample has those of the empty caption with some probability.

    Networks learn so what classifier-free guidance needs (Ho & Salimans 2022, arXiv 2207.12598).
    """
    chosen_N = torch.rand(len(inputs["sample"])) < probability  # drawn on the CPU: the same on every device
    return empty_captions(backbone, inputs, batch, chosen_N)


def drop_conditions(backbone: Any, inputs: Batch, batch: Batch) -> dict[str, Any]:
    """Return the conditions of the pass of classifier-free guidance without captions or classes, for `inputs`."""
    if not backbone.takes_text:
        conditions: dict[str, Any] = backbone.empty_conditions(batch, inputs["conditions"])
        return conditions
    return empty_captions(backbone, inputs, batch, torch.ones(len(inputs["sample"]), dtype=torch.bool))


def empty_captions(backbone: NetworkBackbone, inputs: Batch, batch: Batch, chosen_N: Tensor) -> dict[str, Any]:
    """Return the conditions of `inputs`, where the chosen samples have those of the empty caption.

    The states of the empty caption are those in the batch ("empty_text"), else the text encoder's.
    """
    device = inputs["sample"].device
    empty = batch.get("empty_text") or backbone.pipeline_parts.encode_empty_text(1, device)
    return replace_chosen(inputs["conditions"], move(empty, device), chosen_N.to(device))


def replace_chosen(conditions: dict[str, Any], empty: dict[str, Any], chosen_N: Tensor) -> dict[str, Any]:
    """Return nested conditions in which the chosen samples have the values of `empty`, as far as it has values.

    What all samples share (SHARED) stays as it is.
    """
    replaced: dict[str, Any] = {}
    for key, value in conditions.items():
        if isinstance(value, dict):
            replaced[key] = replace_chosen(value, empty.get(key, {}), chosen_N)
        elif key in empty and key not in SHARED:
            replaced[key] = torch.where(chosen_N.view(-1, *[1] * (value.ndim - 1)), empty[key], value)
        else:
            replaced[key] = value
    return replaced
