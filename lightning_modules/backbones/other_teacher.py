"""Whether a network can teach the student of another network: from the same inputs it has to compute the same thing."""

from typing import Any

import torch
from torch import nn

from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.costs import make_meta_twin
from lightning_modules.backbones.diffusion.schedule import prediction_type, signal_to_noise
from lightning_modules.metrics.published import digest_of_weights


def check_other_teacher(other: Any, own: Any) -> None:
    """Raise ValueError, with the reason, where a network cannot teach students that were pruned from another one.

    Args:
        other: the network that is to teach.
        own: the network that students are pruned from. They get its inputs: its noise, its latents, its texts.
    """
    if type(other) is not type(own):
        raise ValueError(f"it is a {type(other.network).__name__}, not a {type(own.network).__name__}")
    found, expected = compute_output_shape(other, own), compute_output_shape(own, own)
    if found != expected:
        raise ValueError(f"its output for one sample is of shape {found}, not {expected}")
    if own.noise_scheduler is not None:
        if prediction_type(other.noise_scheduler) != prediction_type(own.noise_scheduler):
            predicted = [prediction_type(network.noise_scheduler) for network in (other, own)]
            raise ValueError(f"it predicts {predicted[0]!r}, not {predicted[1]!r}")
        ratios, own_ratios = signal_to_noise(other.noise_scheduler), signal_to_noise(own.noise_scheduler)
        if ratios.shape != own_ratios.shape or not torch.allclose(ratios, own_ratios):
            raise ValueError("it has another noise schedule")
    if identify_parts(other) != identify_parts(own):
        raise ValueError("the VAE or a text encoder of its pipeline has other weights or another scaling factor")
    if other.class_names and own.class_names and other.class_names != own.class_names:
        raise ValueError("it has other classes")


def compute_output_shape(network: NetworkBackbone, given: NetworkBackbone) -> tuple[int, ...]:
    """Return the shape of a network's output for one example of the inputs of `given`; nothing is computed.

    Raises ValueError where it cannot take them.
    """
    (twin, _), (_, inputs) = make_meta_twin(network), make_meta_twin(given)
    try:
        return tuple(twin.predict(inputs).shape)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"it does not take the same inputs: {error}") from error


def identify_parts(backbone: NetworkBackbone) -> tuple[str, Any]:
    """Return a hash of the weights of the other parts of a pipeline, and the scaling factor of its VAE."""
    parts = backbone.pipeline_parts
    if parts is None:
        return "", None
    return digest_of_weights(*parts.modules()), parts.vae.config.scaling_factor if parts.has_vae else None


def has_same_layers(other: nn.Module, own: nn.Module) -> bool:
    """Tell whether two networks have parameters of the same names and shapes."""
    shapes = [{name: tensor.shape for name, tensor in network.named_parameters()} for network in (other, own)]
    return shapes[0] == shapes[1]
