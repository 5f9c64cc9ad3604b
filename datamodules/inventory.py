"""Tells what a source holds without decoding it: fingerprints, classes, and samples that occur twice."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from datamodules.readers.base import BadSample, ListedSource, Source
from datamodules.readers.folder import describe_others

READ = 32
"""Samples, evenly spaced, whose whole content is part of a fingerprint."""
SIZED = 4096
"""Samples, evenly spaced, whose sizes are."""
COMPARED_BYTES = 2**28
"""Bytes of training samples that are compared with held-out ones: a few seconds from a disk."""
SIZED_FILES = 100_000
"""Training samples whose sizes are looked up to find those that may be held out as well."""
LISTED_CLASSES = 20
"""Classes in a line of the log."""


def space_evenly(count: int, wanted: int) -> np.ndarray:
    """Return at most `wanted` of `count` indices, evenly spaced."""
    return np.linspace(0, count - 1, min(count, wanted)).astype(int)


def fingerprint_source(source: Source) -> str:
    """Return a sha256 of what a source holds, which does not depend on where it lies.

    It covers the number of samples; of the readers of this project the names, labels and sizes of all (sizes of files:
    of SIZED); and of READ samples the whole content with its caption. A change of a few samples among many that moves
    neither a name nor a size can be missed.
    """
    total = hashlib.sha256(f"{len(source)}\n".encode())
    if isinstance(source, ListedSource):
        total.update(source.listing())
        sizes = source.sizes(space_evenly(len(source), SIZED))
        total.update(b"" if sizes is None else sizes.tobytes())
    for index in space_evenly(len(source), READ):
        total.update(hashlib.sha256(read_content(source, int(index))).digest())
    return total.hexdigest()


def fingerprint_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a sha256 of the number of rows of a table, and of the content of READ of them."""
    chosen = [rows[int(index)] for index in space_evenly(len(rows), READ)]
    return hashlib.sha256(json.dumps([len(rows), chosen], sort_keys=True, default=str).encode()).hexdigest()


def read_content(source: Source, index: int) -> bytes:
    """Return the image of a sample, as it is stored where the source tells, with its caption; b"" for a bad sample."""
    try:
        if isinstance(source, ListedSource):
            image = source.raw(index)
        else:
            record = source.take(np.array([index]))
            image = record["image"].tobytes() + record["label"].tobytes()
        caption = "" if source.captions is None else source.captions[index]
    except BadSample:
        return b""
    return image + b"\n" + caption.encode("utf-8", "surrogatepass")


def find_duplicates(train: Source, holdout: Source) -> list[tuple[str, str]] | None:
    """Return (held-out sample, training sample) for every held-out sample that is also a training sample.

    The two are the same byte for byte. None where they were not compared: a source does not know the sizes of its
    samples, or there are too many of the same sizes to read them all.
    """
    if not isinstance(train, ListedSource) or not isinstance(holdout, ListedSource) or len(train) > SIZED_FILES:
        return None
    sizes, wanted = train.sizes(np.arange(len(train))), holdout.sizes(np.arange(len(holdout)))
    if sizes is None or wanted is None:
        return None
    candidates = np.flatnonzero(np.isin(sizes, wanted) & (sizes > 0))
    held = np.flatnonzero(np.isin(wanted, sizes) & (wanted > 0))
    if sizes[candidates].sum() + wanted[held].sum() > COMPARED_BYTES:
        return None
    twins = {hash_sample(train, index): index for index in candidates[::-1].tolist()}
    twins.pop(None, None)
    pairs = [(index, twins.get(hash_sample(holdout, index))) for index in held.tolist()]
    return [(holdout.name(index), train.name(twin)) for index, twin in pairs if twin is not None]


def hash_sample(source: ListedSource, index: int) -> bytes | None:
    """Return the sha256 of a sample's stored content, None where it cannot be read."""
    try:
        return hashlib.sha256(source.raw(index)).digest()
    except BadSample:
        return None


def describe_data(train: Source, holdout: Source) -> list[str]:
    """Return lines for the log: the classes, files that are passed over, and held-out samples that are trained on."""
    lines = []
    if len(names := getattr(train, "class_names", None) or ()) > 1:
        numbered = list_names(f"{label} {name}" for label, name in enumerate(names))
        lines.append(f"data has {len(names)} classes: {numbered}")
    if others := describe_others(train):
        lines.append(f"data has {others}; none of them is read")
    if duplicates := find_duplicates(train, holdout):
        first = " = ".join(duplicates[0])
        lines.append(
            f"data: held-out samples that are also training samples, byte for byte, so that figures on them are too "
            f"good: {len(duplicates)} of {len(holdout)}; the first: {first}"
        )
    return lines


def match_labels(split: str, names: Sequence[str] | None, known: Mapping[str, int], count: int) -> np.ndarray | None:
    """Return the label in a network of each class of a data set; None where they are the same.

    Names are compared without regard to case, and "_" counts as a space. If none of the names is known to the network,
    the classes are taken in their order.

    Args:
        split: "train" or "holdout", for messages.
        names: the name of each class of the data set, None where classes have no names.
        known: {name: label} of the network, empty where its classes have no names.
        count: number of classes of the network.

    Raises:
        ValueError: there are more classes than the network has, or it knows some of the names and not the others.
    """
    if names is None:
        return None
    labels = {normalise_name(name): label for name, label in known.items()}
    unknown = [name for name in names if normalise_name(name) not in labels]
    if labels and unknown and len(unknown) < len(names):
        raise ValueError(
            f"data.{split} has classes that the teacher does not have: {list_names(unknown)}; it has "
            f"{list_names(known)}. Remove or rename them"
        )
    if labels and not unknown:
        matched = np.array([labels[normalise_name(name)] for name in names], np.int64)
        return None if (matched == np.arange(len(names))).all() else matched
    if len(names) > count:
        raise ValueError(
            f"data.{split} has {len(names)} classes ({list_names(names)}), the teacher has {count}; "
            "remove folders that are no classes, or choose the data that the teacher was trained on"
        )
    return None


def list_names(names: Iterable[str]) -> str:
    """Return the first LISTED_CLASSES of some names as text."""
    names = list(names)
    return f"{', '.join(names[:LISTED_CLASSES])}{', ...' * (len(names) > LISTED_CLASSES)}"


def normalise_name(name: str) -> str:
    """Return the name of a class in the form in which names are compared."""
    return name.casefold().replace("_", " ").strip()
