"""What a criterion sees of a network, and what it owes: one finite score for every unit."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

SCORING_VERSION = 2
"""Goes up when the same criterion would give other scores; part of the key under which scores are cached."""


class Level(StrEnum):
    """A kind of units, all of which make up one pool."""

    DEPTH = "depth"
    """whole blocks: ResNet blocks, attentions, transformer blocks, decoder layers"""
    OPERATOR = "operator"
    """LD-Pruner's single operators"""
    CHANNEL = "channel"
    """blocks of channels (width)"""


class ChangeKind(StrEnum):
    """How a change of a plan removes something."""

    BYPASS = "bypass"
    """a block is passed over"""
    REPLACE = "replace"
    """an operator becomes a cheaper one of the same shape"""
    SLICE = "slice"
    """channels are cut out of weights"""
    RESTAGE = "restage"
    """the whole network becomes a smaller one of its kind (BK-SDM)"""


LEVELS = tuple(level.value for level in Level)

Batch = dict[str, Any]
"""Tensors and lists of one entry a sample; `conditions` is a dictionary of its own."""


@dataclass(frozen=True)
class Unit:
    """A named, removable piece of a network and what removing it alone would free."""

    name: str
    """module path"""
    kind: str
    """resnet | attention | transformer | block | layer; operators: conv | attention | norm; width: channel | head"""
    params: int
    macs: int
    """multiply-accumulates of one forward at batch 1, convolutions and linear layers"""
    change: str = "bypass"
    """what removing it is in a plan: bypass | replace | slice"""
    inside: str | None = None
    """the unit that contains this one, where there is one: only one of the two can be removed"""

    @property
    def units(self) -> tuple[str, ...]:
        """What has to go for this to go, as `Shared` has it: itself."""
        return (self.name,)


@dataclass(frozen=True)
class Shared:
    """A part that is in no unit and goes only when all of some units go: a Transformer2D's projections and norm."""

    name: str
    units: tuple[str, ...]
    params: int
    macs: int


class Backbone(Protocol):
    """The part of a network that a criterion works with."""

    def units(self, level: str = "depth") -> list[Unit]:
        """The removable units of one of LEVELS in the order of the forward pass; ValueError where it has none."""
        ...

    def without(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Remove some units while the context lasts; the network is restored bit for bit, also after an error."""
        ...

    def watching(self, names: Sequence[str]) -> AbstractContextManager[dict[str, tuple[Tensor, Tensor]]]:
        """Each unit's output, and what its bypass would give for the same input, of the forward pass inside."""
        ...

    def calibration_inputs(self, batch: Batch, seed: int) -> Batch:
        """What the network takes, made from data; noise and timestep are functions of (seed, sample number)."""
        ...

    def predict(self, inputs: Batch) -> Tensor:
        """The network's output, batch first."""
        ...

    def predict_without_each(self, inputs: Batch, names: Sequence[str]) -> Iterator[tuple[str | None, Tensor]]:
        """(None, dense output), then (name, output with only that unit removed), in any order."""
        ...

    def losses(self, output: Tensor, inputs: Batch) -> Tensor:
        """The task loss of an output, one value a sample: (N,)."""
        ...

    def gated(self, gates: Mapping[str, Tensor], level: str) -> AbstractContextManager[None]:
        """Each unit's part in the output is multiplied by its gate while the context lasts: 1 leaves it, 0 removes it.

        `gates` are {group: (its units,)}; the group of unit "a:3" is "a", that of any other the unit itself.
        """
        ...

    def soft_cost(self, gates: Mapping[str, Tensor], budget: str, level: str) -> Tensor:
        """What is left of a cost under gates: float64, with gradients; with gates of 0 and 1 what is counted."""
        ...

    def totals(self) -> dict[str, int]:
        """{budget: what the whole network costs}."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The network's parameters by name."""
        ...

    def freed_weights(self, name: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """What goes with a unit, of tensors with the names and shapes of the weights: themselves, or gradients."""
        ...

    @property
    def takes_text(self) -> bool:
        """Is the network conditioned on captions?"""
        ...

    @property
    def writes_text(self) -> bool:
        """Is it a language model?"""
        ...

    def generate(self, batch: Batch, sampler: Callable[..., Any], steps: int, guidance: float = 1.0) -> Tensor:
        """Samples in the network's own space (N,C,H,W), each from its entry of batch["seed"] and its conditions."""
        ...

    def decode(self, samples: Tensor) -> Tensor:
        """Images of generated samples: uint8 (N,H,W,C)."""
        ...


class Criterion:
    """A running measurement of how much harm the removal of each unit does, in the manner of a torchmetrics metric.

    Subclasses give `update` (or say `needs = "nothing"`) and `compute`. Values in `states` are summed over ranks
    before `compute` is called. Nothing here may change the network.
    """

    needs = "data"
    """what a batch holds: data (calibration samples) | seeds (of `seeds` images to generate) | nothing"""
    needs_grad = False
    level: str = Level.DEPTH
    """the pool of units that is scored"""
    module: Any = None
    """Callable (criterion, backbone) -> LightningModule that trains what the criterion trains, a step per calibration
    batch, with the network frozen. None: the batches are fed to `update`."""
    seeds = 0

    def supports(self, backbone: Backbone) -> str | None:
        """None, or the reason why this criterion cannot score this network: here, that it has no units of the level."""
        try:
            backbone.units(self.level)
        except ValueError as error:
            return str(error)
        return None

    def spreads_batches(self, backbone: Any) -> bool:
        """Tell whether each calibration batch is to be spread evenly over all samples.

        It is where a part of the batches has to speak for all, as with early stopping.
        """
        return getattr(self, "stable_for", None) is not None

    def files(self) -> list[Path]:
        """Files other than the teacher's that decide the scores, such as another model's weights."""
        return []

    def start(self, backbone: Backbone, units: Sequence[Unit], seed: int) -> None:
        """Begin: `seed` is `calibration.seed`."""
        self.backbone, self.units, self.seed = backbone, list(units), seed
        self.states: dict[str, Tensor] = {}

    def update(self, batch: Batch) -> None:
        """Take one calibration batch into account."""

    def settled(self) -> bool:
        """Need no further batch be looked at? (One process; several ranks look at all.)"""
        return False

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


def check_level(level: str, valid: Sequence[str] = LEVELS) -> str:
    """`criterion.level`; raises ValueError where it is none of the valid ones."""
    if level not in valid:
        raise ValueError(f"criterion.level={level!r} is unknown; choose one of: {', '.join(valid)}")
    return level


def check_scores(stored: dict[str, Any], units: Sequence[Unit]) -> None:
    """Raise ValueError where stored scores do not name exactly these units."""
    missing, unknown = {u.name for u in units} - set(stored), set(stored) - {u.name for u in units}
    if missing or unknown:
        raise ValueError(
            f"scores do not fit this network: missing {sorted(missing)[:5]}, unknown {sorted(unknown)[:5]}"
        )
