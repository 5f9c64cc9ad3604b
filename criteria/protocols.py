"""What criteria ask of a network, one protocol for each way to measure harm.

`criteria` knows networks by these alone; lightning_modules/backbones implements them. `Backbone`, which all of them
extend, is in criteria/base.py.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from criteria.base import Backbone, Batch, Unit


class Weighted(Backbone, Protocol):
    """A network whose weights can be read."""

    @property
    def network(self) -> nn.Module:
        """The network itself."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Return the network's parameters by name."""
        ...

    def freed_weights(self, unit: Unit, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the slices of `tensors` that belong to one unit.

        `tensors` have the names and shapes of `weights()`: the weights themselves, gradients, or sums.
        """
        ...


class Predicting(Backbone, Protocol):
    """A network that computes outputs and task losses from calibration samples."""

    def calibration_inputs(self, batch: Batch, seed: int) -> Batch:
        """Return the network's inputs for some samples; noise and timestep are functions of (seed, sample number)."""
        ...

    def predict(self, inputs: Batch) -> Tensor:
        """Return the network's output, batch first."""
        ...

    def losses(self, output: Tensor, inputs: Batch) -> Tensor:
        """Return the task loss of each sample, (N,)."""
        ...


class Removing(Backbone, Protocol):
    """A network whose units can be removed for a while."""

    def without(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Remove some units while the context lasts; the network is restored bit for bit, also after an error."""
        ...


class Scorable(Predicting, Removing, Protocol):
    """A network that computes the same outputs without single units."""

    def watching(self, names: Sequence[str]) -> AbstractContextManager[dict[str, tuple[Tensor, Tensor]]]:
        """Record the forward pass inside: {unit: (its output, the output of its bypass for the same input)}."""
        ...

    def predict_without_each(self, inputs: Batch, names: Sequence[str]) -> Iterator[tuple[str | None, Tensor]]:
        """Yield (None, dense output), then (name, output with only that unit removed) in any order."""
        ...


class Removals(Protocol):
    """Removals of single units, each made up for by a layer that is refitted: two passes over the samples."""

    states: dict[str, Tensor]
    """sums of the first pass"""

    def observe(self, inputs: Batch, numbers_N: Tensor) -> None:
        """Add some calibration samples to the sums."""
        ...

    def refit(self) -> None:
        """Compute the refitted layers from the sums."""
        ...

    def outputs(self, inputs: Batch) -> Iterator[tuple[str | None, Tensor]]:
        """Yield (None, dense output), then (name, output without that unit, with its layer refitted) in any order."""
        ...


class Repairable(Scorable, Protocol):
    """A network in which the removal of a unit can be made up for in closed form."""

    def repaired_removals(self, names: Sequence[str], ridges: Sequence[float]) -> Removals:
        """Return the removals of units; `ridges` are those to choose from."""
        ...


class Differentiable(Predicting, Weighted, Protocol):
    """A network whose losses have gradients with respect to its weights."""


class ReadsInputs(Predicting, Weighted, Protocol):
    """A network whose channels are inputs of linear layers that can be watched, as those of decoders are."""

    def consumers(self, name: str) -> dict[str, Tensor]:
        """Return {layer: the indices of those of its inputs that are the channels of a unit}."""
        ...

    def listening(self, listeners: Mapping[str, Callable[[Tensor], None]]) -> AbstractContextManager[None]:
        """Call a function with the input of its layer in every forward pass inside; `listeners` are by layer."""
        ...


class Gateable(Predicting, Protocol):
    """A network whose units can be weighed by gates between 0 (removed) and 1 (as it is)."""

    @property
    def stratifies_timesteps(self) -> bool:
        """Whether calibration samples have timesteps that go with their numbers."""
        ...

    def totals(self) -> dict[str, int]:
        """Return {budget: the cost of the whole network}."""
        ...

    def gated(self, gates: Mapping[str, Tensor], level: str) -> AbstractContextManager[None]:
        """Multiply each unit's part in the output by its gate while the context lasts.

        `gates` are {group: (units of the group,)}: the units of group "a" are named "a:0", "a:1", ... in its order, or
        it has one unit of its own name.
        """
        ...

    def soft_cost(self, gates: Mapping[str, Tensor], budget: str, level: str) -> Tensor:
        """Return the cost of the network when every unit is scaled by its gate: float64, differentiable.

        Gates of 0 and 1 give the exact cost.
        """
        ...


class Generative(Removing, Protocol):
    """A network that generates samples from seeds, also without single units."""

    def generate(self, batch: Batch, sampler: Callable[..., Any], steps: int, guidance: float = 1.0) -> Tensor:
        """Return samples in the network's own space (N,C,H,W), each from its entry of batch["seed"] and conditions."""
        ...

    def decode(self, samples: Tensor) -> Tensor:
        """Return generated samples as images: uint8 (N,H,W,C)."""
        ...
