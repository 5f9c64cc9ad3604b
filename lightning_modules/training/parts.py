"""Parts of networks that are compiled for training, or whose activations are computed again in the backward pass."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.prefix_reuse import allow_many_graphs, find_parts
from lightning_modules.modules.base import TrainedModule
from lightning_modules.training.ranks import DrawsForGlobalBatch


@contextlib.contextmanager
def compute_in_parts(module: TrainedModule, compiles: bool, checkpoint_activations: str) -> Iterator[None]:
    """Compile the parts of a module's networks, and save fewer activations of those that are trained, in a context.

    Parts are the largest modules with parameters inside which no output is read and no activation is recomputed: hooks
    inside a compiled function would be traced with it, and a change of them would not be noticed. Each shape is a graph
    of its own.

    Args:
        module: its `networks()` and `functions` are computed in another way while the context lasts.
        compiles: compile the parts and the functions.
        checkpoint_activations: one of CHECKPOINT_ACTIVATIONS in conf/schema.py.
    """
    methods: dict[tuple[nn.Module, str], Callable[..., Any]] = {}
    for backbone, read in module.networks().items():
        recomputed = find_recomputed(backbone, checkpoint_activations)
        for part in find_compiled(backbone.network, {*read, *recomputed}) if compiles else ():
            methods[part, "forward"] = torch.compile(part.forward, dynamic=False)
        for part in recomputed:
            methods[part, "forward"] = functools.partial(recompute, methods.get((part, "forward"), part.forward))
    for name in module.functions if compiles else ():
        methods[module, name] = torch.compile(getattr(module, name), dynamic=False)
    if compiles:
        allow_many_graphs()
    try:
        for (part, name), method in methods.items():
            setattr(part, name, method)
        yield
    finally:
        for part, name in methods:
            part.__dict__.pop(name, None)


def find_compiled(network: nn.Module, boundaries: set[nn.Module]) -> list[nn.Module]:
    """Return the largest modules with parameters that contain no boundary, and the boundaries that contain no other."""
    innermost = {module for module in boundaries if boundaries.isdisjoint(set(module.modules()) - {module})}
    return [part for part in find_parts(network, innermost) if any(True for _ in part.parameters())]


def find_recomputed(backbone: NetworkBackbone, checkpoint_activations: str) -> list[nn.Module]:
    """Return the modules of a network whose activations are not saved; none of a network that is not trained."""
    if checkpoint_activations == "none" or not any(weight.requires_grad for weight in backbone.parameters()):
        return []
    check_recomputation(backbone, checkpoint_activations)
    return [backbone.network.get_submodule(name) for name in backbone.survivors()]


def check_recomputation(backbone: NetworkBackbone, checkpoint_activations: str) -> None:
    """Raise ValueError if the activations of a network cannot be recomputed in the backward pass."""
    if checkpoint_activations != "none" and any(isinstance(part, _BatchNorm) for part in backbone.modules()):
        raise ValueError(
            f"trainer.checkpoint_activations={checkpoint_activations!r}: the batch norms of this network would count "
            "each batch twice; choose none"
        )


def recompute(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what a function returns; its activations are not saved, but computed again in the backward pass."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    draws = DrawsForGlobalBatch.active or contextlib.nullcontext()
    return checkpoint(
        forward, *args, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), draws), **kwargs
    )
