"""Prefix reuse: run a network again from some module on, with what came before it read back instead of computed."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.backbones.diffusion.pipeline_parts import by_sample


class Replay:
    """Records the outputs of a network's parts in one pass and reads them back in the next.

    The parts are the largest modules that contain no unit, and the units themselves; what lies between them (skip
    connections, concatenations) is cheap and runs again every time. Parts are told apart by the order of their
    calls, so a part that is called twice is recorded twice. The same values go in, so the same bits come out.
    """

    def __init__(self, network: nn.Module, units: Sequence[nn.Module], forwards: Any = None) -> None:
        self.network = network
        self.forwards: dict[nn.Module, Callable[..., Any]] = {} if forwards is None else forwards
        """compiled forward functions of parts; filled with those of all parts where it is given"""
        self.parts = {part: list(part.modules()) for part in parts(network, set(units))}
        self.record: list[tuple[nn.Module, Any]] = []
        if forwards is not None:
            # One class of parts comes in many shapes, each a graph; beyond the limit the rest would run eagerly.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
            for part in self.parts.keys() - self.forwards.keys():
                self.forwards[part] = torch.compile(part.forward)

    def held(self) -> int:
        """Bytes of the recorded tensors."""
        found = {id(tensor): tensor for _, output in self.record for tensor in tensors(output)}
        return sum(tensor.numel() * tensor.element_size() for tensor in found.values())

    def first_change(self) -> int:
        """The place, in the recorded pass, of the first call of a part that is gone or has other modules inside now.

        That is not always a removed unit itself: units may be inside other units, and the last basic block of a
        Transformer2D takes along what comes before it there. Where nothing changed, it is the end.
        """
        there = set(self.network.modules())
        changed = {part for part, inside in self.parts.items() if part not in there or list(part.modules()) != inside}
        return next((place for place, (part, _) in enumerate(self.record) if part in changed), len(self.record))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Run the network once inside; its parts' outputs are kept."""
        self.record = []

        def run(part: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self.record.append((part, output))
            return output

        with self._patched(run):
            yield

    @contextlib.contextmanager
    def reusing(self, upto: int) -> Iterator[None]:
        """Run the network once inside; the first `upto` calls of parts return what was recorded."""
        place = 0

        def run(part: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal place
            place += 1
            if place > upto:
                return forward(*args, **kwargs)
            recorded, output = self.record[place - 1]
            assert recorded is part, "the network's parts were not called in the recorded order"
            return output

        with self._patched(run):
            yield

    @contextlib.contextmanager
    def _patched(self, run: Callable[..., Any]) -> Iterator[None]:
        try:
            for part in self.parts:
                part.forward = _bound(run, part, self.forwards.get(part, part.forward))
            yield
        finally:
            for part in self.parts:
                part.__dict__.pop("forward", None)


def _bound(run: Callable[..., Any], part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: run(part, forward, *args, **kwargs)


def parts(module: nn.Module, units: set[nn.Module]) -> Iterator[nn.Module]:
    """The units, and the largest modules that have none inside."""
    is_whole = module in units or units.isdisjoint(module.modules())
    if is_whole and not isinstance(module, nn.ModuleList):  # a list is not called
        yield module
        return
    for child in module.children():
        yield from parts(child, units)


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a module's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, list | tuple | dict):
        for part in output.values() if isinstance(output, dict) else output:
            yield from tensors(part)


def outputs_without_each(
    backbone: Any, inputs: dict[str, Any], names: Sequence[str]
) -> Iterator[tuple[str | None, Tensor]]:
    """(None, the whole network's output), then (name, output without that unit), within `backbone.memory_bound`."""
    count = len(inputs["sample"])
    size = count if backbone.memory_bound is None else fitting(backbone, inputs, names)
    if size >= count:
        yield from reusing(backbone, inputs, names)
        return
    found: dict[str | None, list[Tensor]] = {}
    for start in range(0, count, size):
        for name, output in reusing(backbone, part_of(inputs, slice(start, start + size)), names):
            found.setdefault(name, []).append(output)
    yield from ((name, torch.cat(outputs)) for name, outputs in found.items())


def reusing(backbone: Any, inputs: dict[str, Any], names: Sequence[str]) -> Iterator[tuple[str | None, Tensor]]:
    """The same for one batch, with its dense pass's activations held."""
    units = [backbone.network.get_submodule(name) for name in names]
    replay = Replay(backbone.network, units, backbone.compiled)
    with replay.recording():
        dense = backbone.predict(inputs)
    yield None, dense
    for name in names:
        # A stand-in stands where the unit stood, so the parts before it answer from the record.
        with backbone.without([name]), replay.reusing(replay.first_change()):
            output = backbone.predict(inputs)
        yield name, output


def fitting(backbone: Any, inputs: dict[str, Any], names: Sequence[str]) -> int:
    """How many samples' activations keep to the memory bound; raises ValueError where not one's do."""
    replay = Replay(backbone.network, [backbone.network.get_submodule(name) for name in names])
    with replay.recording():
        backbone.predict(part_of(inputs, slice(0, 1)))
    held, bound = replay.held(), backbone.memory_bound
    if held > bound:
        raise ValueError(
            f"calibration.memory_gib={bound / 2**30:.3g} is less than the activations of one sample, "
            f"{held / 2**30:.3g} GiB; choose more, or null for no bound"
        )
    return bound // held


def part_of(inputs: Any, samples: slice) -> Any:
    """Some samples of a batch."""
    return by_sample(inputs, lambda values: values[samples])
