"""What a criterion sees of a network, and what it owes: one finite score for every unit."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

SCORING_VERSION = 1
"""Goes up when the same criterion would give other scores; part of the key under which scores are cached."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Unit:
    """A named, removable piece of a network and what removing it alone would free."""

    name: str
    """module path"""
    kind: str
    """resnet | attention | transformer"""
    params: int
    macs: int
    """multiply-accumulates of one forward at batch 1, convolutions and linear layers"""


class Backbone(Protocol):
    """The part of a network that a criterion works with."""

    def units(self) -> list[Unit]:
        """The removable units in the order of the forward pass."""
        ...

    def without(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Bypass some units while the context lasts; the network is restored bit for bit, also after an error."""
        ...

    def calibration_inputs(self, batch: Batch, seed: int) -> Batch:
        """What the network takes, made from data; noise and timestep are functions of (seed, sample number)."""
        ...

    def predict(self, inputs: Batch) -> Tensor:
        """The network's output, batch first."""
        ...

    def predict_without_each(self, inputs: Batch, names: Sequence[str]) -> Iterator[tuple[str | None, Tensor]]:
        """(None, dense output), then (name, output with only that unit bypassed), in any order."""
        ...

    def freed_weights(self, name: str) -> list[Tensor]:
        """The parameters that go when a unit is removed."""
        ...


class Criterion:
    """A running measurement of how much harm the removal of each unit does, in the manner of a torchmetrics metric.

    Subclasses give `update` (or set `needs_data = False`) and `compute`. Values in `states` are summed over ranks
    before `compute` is called. Nothing here may change the network.
    """

    needs_data = True
    needs_grad = False

    def start(self, backbone: Backbone, units: Sequence[Unit], seed: int) -> None:
        """Begin: `seed` is `calibration.seed`."""
        self.backbone, self.units, self.seed = backbone, list(units), seed
        self.states: dict[str, Tensor] = {}

    def update(self, batch: Batch) -> None:
        """Take one calibration batch into account."""

    def compute(self) -> dict[str, dict[str, float]]:
        """{unit: {"score": harm, ...}}, from `states` alone."""
        raise NotImplementedError

    def finish(self) -> dict[str, dict[str, float]]:
        """The scores, every unit exactly once, higher = more harm if removed.

        Raises ValueError naming the unit whose score is not finite.
        """
        scores = self.compute()
        check_scores(scores, self.units)
        for name, entry in scores.items():
            if not math.isfinite(entry["score"]):
                raise ValueError(
                    f"the score of unit {name!r} is {entry['score']}: the network's output is not finite without it"
                )
        return scores

    def table(self, **columns: Tensor) -> dict[str, dict[str, float]]:
        """Columns of one value a unit, as {unit: {column: value}}."""
        return {
            unit.name: {key: float(column[i]) for key, column in columns.items()} for i, unit in enumerate(self.units)
        }


def zeros(count: int) -> Tensor:
    """A state to sum into: float64, one value a unit."""
    return torch.zeros(count, dtype=torch.float64)


def check_scores(stored: dict[str, Any], units: Sequence[Unit]) -> None:
    """Raise ValueError where stored scores do not name exactly these units."""
    missing, unknown = {u.name for u in units} - set(stored), set(stored) - {u.name for u in units}
    if missing or unknown:
        raise ValueError(
            f"scores do not fit this network: missing {sorted(missing)[:5]}, unknown {sorted(unknown)[:5]}"
        )
