"""Units of a network, and the base class of criteria: one finite score for every unit."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

SCORING_VERSION = 3
"""Goes up when the same criterion would give other scores; part of the key under which scores are cached."""

Batch = dict[str, Any]
"""Tensors and lists with one entry per sample; `conditions` is a dictionary of its own."""

Scores = dict[str, dict[str, float]]
"""{unit: {"score": harm, ...}}; the other columns say how it was measured, such as `standard_error`."""


class Choice(StrEnum):
    """One of a few values of a field; it is written and shown as its value."""

    def __repr__(self) -> str:
        return repr(self.value)


AnyChoice = TypeVar("AnyChoice", bound=Choice)


class Level(Choice):
    """A kind of units, all of which make up one pool."""

    DEPTH = "depth"
    """whole blocks: ResNet blocks, attentions, transformer blocks, decoder layers"""
    OPERATOR = "operator"
    """LD-Pruner's single operators"""
    CHANNEL = "channel"
    """blocks of channels (width)"""


class Needs(Choice):
    """What a criterion looks at."""

    DATA = "data"
    """calibration samples"""
    SEEDS = "seeds"
    """seeds of samples to generate"""
    NOTHING = "nothing"
    """weights alone"""


class ChangeKind(Choice):
    """How a change of a plan removes something."""

    BYPASS = "bypass"
    """a block is passed over"""
    REPLACE = "replace"
    """an operator becomes a cheaper one of the same shape"""
    SLICE = "slice"
    """channels are cut out of weights"""
    RESTAGE = "restage"
    """the whole network becomes a smaller one of its kind (BK-SDM)"""


@dataclass(frozen=True)
class Unit:
    """A named, removable piece of a network and what its removal alone would free."""

    name: str
    """module path; of channels, module path and number ("mid_block.resnets.0.conv1:3")"""
    kind: str
    """resnet | attention | transformer | block | layer; operators: conv | attention | norm; width: channel | head"""
    params: int
    macs: int
    """multiply-accumulates of one forward pass at batch size 1, of convolutions and linear layers"""
    change: ChangeKind = ChangeKind.BYPASS
    """how a plan removes it"""
    inside: str | None = None
    """the name of the unit that contains this one, if any: only one of the two can be removed"""
    level: Level = Level.DEPTH
    """the pool that the unit belongs to"""

    @property
    def units(self) -> tuple[str, ...]:
        """Names of the units that must be removed before this part is freed: a unit depends on itself alone.

        Mirrors `Shared.units`, so that costs of units and of shared parts can be summed by the same code.
        """
        return (self.name,)


@dataclass(frozen=True)
class Shared:
    """A part outside all units that is removed when all of some units are: a Transformer2D's projections and norm."""

    name: str
    units: tuple[str, ...]
    params: int
    macs: int


class Backbone(Protocol):
    """What every criterion may ask of a network; protocols.py has what some criteria need besides."""

    def units(self, level: str = Level.DEPTH) -> list[Unit]:
        """Return the removable units of one level in the order of the forward pass; ValueError where it has none."""
        ...

    @property
    def takes_text(self) -> bool:
        """Whether the network is conditioned on captions."""
        ...

    @property
    def writes_text(self) -> bool:
        """Whether the network is a language model."""
        ...


Network = TypeVar("Network", bound=Backbone)
"""The protocol of the networks that a criterion can score."""


class Criterion(Generic[Network]):
    """A running measurement of how much harm the removal of each unit does, in the manner of a torchmetrics metric.

    `start`, then `update` with each calibration batch, then `finish`. Sums over batches are in `states`, tensors that
    are summed over ranks before `finish`; all else is the same on every rank. A new criterion is a class and a YAML
    file; one that trains parameters has its LightningModule (`module`) besides.

    Scores are additive harms: 0 where the removal changes nothing, higher where it does more harm, and the harm of a
    set of units is predicted as the sum of their scores. Negative scores are allowed, for removals that help. A
    criterion whose scores give an order only, or harms with another zero, says so in its docstring.
    """

    needs: Needs = Needs.DATA
    """what a batch holds: calibration samples, `seeds` seeds, or nothing"""
    passes = 1
    """how often all calibration batches are fed to `update`; between two passes `end_pass` is called"""
    needs_grad = False
    """whether `update` computes gradients: it is then not run in inference mode"""
    level: Level = Level.DEPTH
    """the pool of units that is scored"""
    module: Callable[..., Any] | None = None
    """(criterion, backbone) -> the LightningModule under which Trainer.fit trains the criterion's own parameters, with
    the network frozen. None: calibration batches are fed to `update` under Trainer.test."""
    seeds = 0
    """the number of samples to generate, for criteria that need seeds"""
    stable_for: int | None = None
    """scoring may stop early once this many batches have changed no plan; None: all batches are looked at"""

    def supports(self, backbone: Network) -> str | None:
        """Return None, or the reason why this network cannot be scored."""
        try:
            backbone.units(self.level)
        except ValueError as error:
            return str(error)
        return None

    def spreads_batches(self, backbone: Any) -> bool:
        """Return whether calibration batches must each be spread evenly over all samples.

        They must where a part of the batches has to speak for all, as with early stopping.
        """
        return self.stable_for is not None

    def files(self) -> list[Path]:
        """Return the files other than the teacher's that decide the scores, such as another model's weights."""
        return []

    def start(self, backbone: Network, units: Sequence[Unit], seed: int) -> None:
        """Begin a measurement; `seed` is `calibration.seed`."""
        self.backbone, self.units, self.seed = backbone, list(units), seed
        self.states: dict[str, Tensor] = {}

    def update(self, batch: Batch) -> None:
        """Add one calibration batch to the measurement."""

    def end_pass(self) -> None:
        """Use `states`, which are summed over ranks now, and replace them by those of the next pass."""

    def settled(self) -> bool:
        """Return True when scoring may stop early; asked only where one process sees all batches."""
        return False

    def compute(self) -> Scores:
        """Return the scores of all units, computed from `states` alone."""
        raise NotImplementedError

    def finish(self) -> Scores:
        """Return the scores: every unit exactly once, finite, higher = more harm if removed.

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

    def table(self, **columns: Tensor) -> Scores:
        """Return columns, each with one value per unit, as {unit: {column: value}}."""
        return {
            unit.name: {key: float(column[i]) for key, column in columns.items()} for i, unit in enumerate(self.units)
        }


def zeros(count: int) -> Tensor:
    """Return a state to sum into: float64 zeros, one per unit."""
    return torch.zeros(count, dtype=torch.float64)


def parse_choice(kind: type[AnyChoice], field: str, value: str, valid: Iterable[AnyChoice] = ()) -> AnyChoice:
    """Return the member of `kind` that a field of the configuration names.

    Raises ValueError with field, value and choices where it is none of the `valid` ones (by default all).
    """
    choices = list(valid) or list(kind)
    if value not in choices:
        raise ValueError(f"{field}={value!r} is unknown; choose one of: {', '.join(choices)}")
    return kind(value)


def parse_level(level: str, valid: Iterable[Level] = ()) -> Level:
    """Return `criterion.level`; raises ValueError where it is none of the `valid` ones (by default all)."""
    return parse_choice(Level, "criterion.level", level, valid)


def check_scores(stored: Scores, units: Sequence[Unit]) -> None:
    """Raise ValueError where stored scores do not name exactly these units."""
    missing, unknown = {u.name for u in units} - set(stored), set(stored) - {u.name for u in units}
    if missing or unknown:
        raise ValueError(
            f"scores do not fit this network: missing {sorted(missing)[:5]}, unknown {sorted(unknown)[:5]}"
        )
