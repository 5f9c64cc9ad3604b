"""Removal of units for a while, and the outputs of units beside those of what would stand in for them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_modules.backbones.diffusion.pruned_unet import put_modules


@contextlib.contextmanager
def remove_for_a_while(backbone: Any, names: Iterable[str]) -> Iterator[None]:
    """Replace some units by their stand-ins while the context lasts; the units come back also after an error."""
    removed = backbone.remove(names)
    try:
        yield
    finally:
        put_modules(backbone.network, removed)


@contextlib.contextmanager
def record_outputs(backbone: Any, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Yield a dictionary that the forward pass inside fills: {unit: (its output, its stand-in's, of one input)}."""
    outputs: dict[str, tuple[Tensor, Tensor]] = {}

    def make_hook(name: str, stand_in: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            outputs[name] = get_feature_map(output), get_feature_map(forward_without_hooks(stand_in, args, kwargs))

        return hook

    handles = []
    for name in names:
        unit = backbone.network.get_submodule(name)
        handles.append(unit.register_forward_hook(make_hook(name, backbone.stand_in(unit)), with_kwargs=True))
    with removing(handles):
        yield outputs


@contextlib.contextmanager
def record_features(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that is filled with the feature maps of modules, by name, in forward passes in the context.

    If a module returns several values, only its feature map is recorded. Modules are given as objects, as their paths
    change under DDP.
    """
    maps: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            maps[name] = get_feature_map(output)

        return hook

    with removing([module.register_forward_hook(record(name)) for name, module in modules.items()]):
        yield maps


@contextlib.contextmanager
def removing(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the context."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward_without_hooks(stand_in: nn.Module, args: Any, kwargs: Any) -> Any:
    """Return the output of a stand-in without its hooks.

    A stand-in may be a part of the unit itself, such as the 1x1 shortcut of a ResNet block: a hook on the unit would
    then call itself.
    """
    return stand_in.forward(*args, **kwargs)


def get_feature_map(output: Any) -> Tensor:
    """Return the feature map among a module's outputs: the last tensor, as joint blocks return text first."""
    return output if isinstance(output, Tensor) else [part for part in output if isinstance(part, Tensor)][-1]
