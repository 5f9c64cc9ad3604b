"""Samples that cannot be used: replaced by others, counted, and too many of them an error."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from datamodules.readers.base import BadSample, Record, Source, merged
from datamodules.seeding import derive

LEAST = 500
"""samples that the limit is taken of, at the least: with the usual hundredth, five may be bad before any run stops"""
ATTEMPTS = 20
"""other samples that are tried in the place of one"""
NAMED = 5
"""messages in an error"""

T = TypeVar("T")


class TooManyBadSamples(ValueError):
    """More samples cannot be used than `data.max_bad_fraction` allows; the message has the first five."""


def usable(read: Callable[[int], T], index: int, length: int, *seed: int | str) -> tuple[T, int, list[str]]:
    """(read(index), index, []) or, where that is a BadSample, what there is of another sample: (it, its index, [why]).

    Which other one is a function of `seed` alone. Raises TooManyBadSamples where none of twenty can be used.
    """
    try:
        return read(index), index, []
    except BadSample as error:
        why = [str(error)]
    for attempt in range(ATTEMPTS):
        other = derive(*seed, "replacement", attempt) % length
        try:
            return read(other), other, why[:1]
        except BadSample as error:
            why.append(str(error))
    raise TooManyBadSamples(f"a sample cannot be used, and none of {ATTEMPTS} others can in its place:\n" + listed(why))


def take_usable(
    source: Source, indices: np.ndarray, positions: Sequence[int], seed: int
) -> tuple[Record, np.ndarray, list[str]]:
    """Some samples of a source, bad ones replaced: the record, the indices of what is in it, what was wrong.

    A replacement is a function of (seed, position), whatever else is in the batch.
    """
    with contextlib.suppress(BadSample):
        return source.take(indices), indices, []

    def one(index: int) -> Record:
        return source.take(np.array([index]))

    found = [usable(one, int(i), len(source), seed, p) for i, p in zip(indices, positions, strict=True)]
    records, used, why = zip(*found, strict=True)
    return merged(records), np.array(used), [message for messages in why for message in messages]


def listed(messages: Sequence[str]) -> str:
    return "\n".join(f"  {message}" for message in messages[:NAMED])


class Skipped:
    """Counts replaced samples as their batches come, says so, and stops where they are too many.

    The limit is `fraction` of the samples seen, or of `least` where fewer were; at a fraction of 0 none may be bad.
    """

    def __init__(self, what: str, fraction: float, least: int = LEAST) -> None:
        self.what, self.fraction, self.least = what, fraction, least
        self.seen, self.count = 0, 0
        self.first: list[str] = []

    def add(self, batch: dict[str, Any]) -> None:
        """Count what a batch says under "skipped". Raises TooManyBadSamples above the limit."""
        messages = batch.get("skipped", [])
        if messages and not self.count:
            print(f"{self.what}: a sample that cannot be used is replaced by another: {messages[0]}", flush=True)
        self.seen += len(batch["index"])
        self.count += len(messages)
        self.first = (self.first + messages)[:NAMED]
        if messages and self.count > self.fraction * max(self.seen, self.least):
            raise TooManyBadSamples(
                f"{self.what}: {self.count} of {self.seen} samples cannot be used, more than "
                f"data.max_bad_fraction={self.fraction} allows (of at least {self.least}). Repair the data, or raise "
                "the limit (+data.max_bad_fraction=... where the data set's file has no such field). "
                f"The first:\n{listed(self.first)}"
            )

    def report(self) -> None:
        """Say how many there were, if there were any."""
        if self.count:
            share = self.count / self.seen
            print(f"{self.what}: {self.count} of {self.seen} samples were replaced ({share:.2%})", flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "count": self.count, "first": list(self.first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.count, self.first = state["seen"], state["count"], list(state["first"])
