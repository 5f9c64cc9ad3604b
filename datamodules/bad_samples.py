"""Samples that cannot be used: replaced by others, counted, and too many of them an error."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from datamodules.readers.base import BadSample, Record, Source, merge_records
from datamodules.seeding import derive

MIN_COUNTED = 500
"""The limit is a fraction of at least so many samples: with the usual 0.01, five may be bad before any run stops."""
ATTEMPTS = 20
"""Other samples that are tried in place of a bad one. Where half of all are bad, one search in a million fails."""
LISTED_MESSAGES = 5
"""Messages that an error lists."""

T = TypeVar("T")


class TooManyBadSamples(ValueError):
    """More samples are bad than `data.max_bad_fraction` allows; the message lists the first five."""


def read_or_replace(read: Callable[[int], T], index: int, length: int, *seed: int | str) -> tuple[T, int, list[str]]:
    """Read a sample or, where it is bad, another one: returns (what was read, its index, messages of the bad one).

    The replacement is a function of `seed` alone; the list of messages is empty where none was needed.

    Args:
        read: reads the sample with an index.
        index: of the wanted sample.
        length: number of samples.
        seed: what the replacement depends on.

    Raises:
        TooManyBadSamples: ATTEMPTS other samples are bad, too.
    """
    try:
        return read(index), index, []
    except BadSample as error:
        messages = [str(error)]
    for attempt in range(ATTEMPTS):
        other = derive(*seed, "replacement", attempt) % length
        try:
            return read(other), other, messages[:1]
        except BadSample as error:
            messages.append(str(error))
    raise TooManyBadSamples(
        f"a sample cannot be used, and none of {ATTEMPTS} others can in its place:\n{list_messages(messages)}"
    )


def take_or_replace(
    source: Source, indices: np.ndarray, positions: Sequence[int], seed: int
) -> tuple[Record, np.ndarray, list[str]]:
    """Take samples of a source, bad ones replaced: returns the record, the indices of its samples, and messages.

    There is one message for each bad sample. A replacement is a function of (seed, position), whatever else is in the
    batch. Raises TooManyBadSamples as `read_or_replace` does.
    """
    with contextlib.suppress(BadSample):
        return source.take(indices), indices, []

    def read(index: int) -> Record:
        return source.take(np.array([index]))

    samples = [
        read_or_replace(read, int(index), len(source), seed, position)
        for index, position in zip(indices, positions, strict=True)
    ]
    records, used, messages = zip(*samples, strict=True)
    return merge_records(records), np.array(used), [message for each in messages for message in each]


def list_messages(messages: Sequence[str]) -> str:
    """Return the first messages as indented lines."""
    return "\n".join(f"  {message}" for message in messages[:LISTED_MESSAGES])


class BadSampleCounter:
    """Counts replaced samples batch by batch, prints the first one, and stops the job where there are too many.

    Args:
        name: name of the data in messages, such as "data.train".
        fraction: share of the samples seen that may be bad; with 0 the first bad one stops the job.
        least: the limit is a fraction of at least so many samples.
    """

    def __init__(self, name: str, fraction: float, least: int = MIN_COUNTED) -> None:
        self.name, self.fraction, self.least = name, fraction, least
        self.seen, self.count = 0, 0
        self.first: list[str] = []

    def add(self, batch: dict[str, Any]) -> None:
        """Count the samples of a batch and the bad ones among them (the messages under "skipped").

        Raises TooManyBadSamples if their share exceeds the limit.
        """
        messages = batch.get("skipped", [])
        if messages and not self.count:
            print(f"{self.name}: a sample that cannot be used is replaced by another: {messages[0]}", flush=True)
        self.seen += len(batch["index"])
        self.count += len(messages)
        self.first = (self.first + messages)[:LISTED_MESSAGES]
        if messages and self.count > self.fraction * max(self.seen, self.least):
            raise TooManyBadSamples(
                f"{self.name}: {self.count} of {self.seen} samples cannot be used, more than "
                f"data.max_bad_fraction={self.fraction} allows (of at least {self.least}). Repair the data, or raise "
                "the limit (+data.max_bad_fraction=... where the data set's file has no such field). "
                f"The first:\n{list_messages(self.first)}"
            )

    def report(self) -> None:
        """Print how many samples were replaced, if any."""
        if self.count:
            share = self.count / self.seen
            print(f"{self.name}: {self.count} of {self.seen} samples were replaced ({share:.2%})", flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "count": self.count, "first": list(self.first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.count, self.first = state["seen"], state["count"], list(state["first"])
