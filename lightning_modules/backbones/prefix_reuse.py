"""Prefix reuse: outputs without each unit, where modules before the unit return their recorded outputs.

The dense pass records the outputs of all modules; a pass without a unit computes only from the unit on.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.backbones.diffusion.pipeline_parts import by_sample

GRAPHS_PER_FUNCTION = 256
"""Limit of compilation: parts of one class have many shapes, each a graph; those beyond the limit would not be
compiled."""


class Replay:
    """Records the outputs of a network's parts in one pass, and returns them instead of computing them in the next.

    Parts are the units, and the largest modules that contain no unit. What is computed between them (skip connections,
    concatenations) is cheap and computed every time. A part that is called twice is recorded twice, in the order of the
    calls. The same bits come out, since the same values go in.

    `forwards`: {part: its compiled forward function}, to which those of missing parts are added; None compiles nothing.
    """

    def __init__(self, network: nn.Module, units: Sequence[nn.Module], forwards: Any = None) -> None:
        self.network = network
        self.forwards: dict[nn.Module, Callable[..., Any]] = {} if forwards is None else forwards
        self.parts = {part: list(part.modules()) for part in find_parts(network, set(units))}
        self.record: list[tuple[nn.Module, Any]] = []
        if forwards is not None:
            allow_many_graphs()
            for part in self.parts.keys() - self.forwards.keys():
                self.forwards[part] = torch.compile(part.forward)

    def recorded_bytes(self) -> int:
        """Return the bytes of the recorded tensors, each counted once."""
        recorded = {id(tensor): tensor for _, output in self.record for tensor in find_tensors(output)}
        return sum(tensor.numel() * tensor.element_size() for tensor in recorded.values())

    def first_change(self) -> int:
        """Return how many recorded calls come before the first part that was removed or has other modules inside.

        This part is not always the removed unit: units may be inside other units, and with the last basic block of a
        Transformer2D the modules before it are removed too. Where nothing changed, all calls are counted.
        """
        present = set(self.network.modules())
        changed = {part for part, inside in self.parts.items() if part not in present or list(part.modules()) != inside}
        return self.find_first_call(changed)

    def count_calls_before(self, layer: nn.Module) -> int:
        """Return how many recorded calls come before the first part that contains a layer."""
        return self.find_first_call({part for part, inside in self.parts.items() if layer in inside})

    def find_first_call(self, parts: set[nn.Module]) -> int:
        """Return the index of the first recorded call of one of some parts; the number of all calls where none is."""
        return next((count for count, (part, _) in enumerate(self.record) if part in parts), len(self.record))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the outputs of the parts in the one forward pass inside."""
        self.record = []

        def run(part: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self.record.append((part, output))
            return output

        with self._patched(run):
            yield

    @contextlib.contextmanager
    def replaying(self, count: int) -> Iterator[None]:
        """Let the first `count` calls of parts, in the one forward pass inside, return what was recorded.

        The pass may end early with an exception.
        """
        calls = 0

        def run(part: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > count:
                return forward(*args, **kwargs)
            recorded, output = self.record[calls - 1]
            assert recorded is part, "the network's parts were not called in the recorded order"
            return output

        with self._patched(run):
            yield

    @contextlib.contextmanager
    def _patched(self, run: Callable[..., Any]) -> Iterator[None]:
        try:
            for part in self.parts:
                part.forward = functools.partial(run, part, self.forwards.get(part, part.forward))
            yield
        finally:
            for part in self.parts:
                part.__dict__.pop("forward", None)


def allow_many_graphs() -> None:
    """Raise the limit of graphs per compiled function to GRAPHS_PER_FUNCTION."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS_PER_FUNCTION)


def find_parts(module: nn.Module, units: set[nn.Module]) -> Iterator[nn.Module]:
    """Yield the units inside a module, and the largest modules that contain no unit."""
    is_part = module in units or units.isdisjoint(module.modules())
    if is_part and not isinstance(module, nn.ModuleList):  # a list is not called
        yield module
        return
    for child in module.children():
        yield from find_parts(child, units)


def find_tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in a module's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, list | tuple | dict):
        for part in output.values() if isinstance(output, dict) else output:
            yield from find_tensors(part)


def outputs_without_each(
    backbone: Any, inputs: dict[str, Any], names: Sequence[str]
) -> Iterator[tuple[str | None, Tensor]]:
    """Yield (None, the dense output), then (name, the output with only that unit removed).

    The activations of a dense pass are held meanwhile. With a `backbone.memory_bound` the batch is divided into parts
    whose activations are at most so many bytes; raises ValueError where those of one sample are more.
    """
    count = len(inputs["sample"])
    size = count if backbone.memory_bound is None else count_fitting_samples(backbone, inputs, names)
    if size >= count:
        yield from replay_batch(backbone, inputs, names)
        return
    outputs: dict[str | None, list[Tensor]] = {}
    for start in range(0, count, size):
        for name, output in replay_batch(backbone, take_samples(inputs, slice(start, start + size)), names):
            outputs.setdefault(name, []).append(output)
    yield from ((name, torch.cat(parts)) for name, parts in outputs.items())


def replay_batch(backbone: Any, inputs: dict[str, Any], names: Sequence[str]) -> Iterator[tuple[str | None, Tensor]]:
    """Yield the outputs of `outputs_without_each` for a whole batch at once."""
    units = [backbone.network.get_submodule(name) for name in names]
    replay = Replay(backbone.network, units, backbone.compiled)
    with replay.recording():
        dense = backbone.predict(inputs)
    yield None, dense
    for name in names:
        with backbone.without([name]), replay.replaying(replay.first_change()):
            output = backbone.predict(inputs)
        yield name, output


def count_fitting_samples(backbone: Any, inputs: dict[str, Any], names: Sequence[str]) -> int:
    """Return the number of samples whose activations fit the memory bound; raises ValueError for less than one."""
    replay = Replay(backbone.network, [backbone.network.get_submodule(name) for name in names])
    with replay.recording():
        backbone.predict(take_samples(inputs, slice(0, 1)))
    held, bound = replay.recorded_bytes(), backbone.memory_bound
    if held > bound:
        raise ValueError(
            f"calibration.memory_gib={bound / 2**30:.3g} is less than the activations of one sample, "
            f"{held / 2**30:.3g} GiB; choose more, or null for no bound"
        )
    return bound // held


def take_samples(inputs: Any, samples: slice) -> Any:
    """Return some samples of a batch of inputs."""
    return by_sample(inputs, lambda values: values[samples])
