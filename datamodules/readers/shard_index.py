"""The index of a tar file: where the members of each of its samples lie, found once and kept."""

import functools
import hashlib
import json
import logging
import os
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from datamodules.readers.base import data_root
from datamodules.readers.folder import is_hidden

log = logging.getLogger(__name__)

INDEX_VERSION = 2
"""Goes up when the same shard would be indexed another way."""
MISSING, TWICE = 0, 2**32 - 1
"""Instead of a member's offset: the sample has none. Instead of its size: it has more than one."""
GZIP = b"\x1f\x8b"
"""First bytes of a compressed file, of which no place can be read by itself."""
UNPACK = "unpack it (gunzip, or another program for its ending) and name the .tar file"
"""What to do with one."""


class Index(NamedTuple):
    """Where the members of a shard's samples are; the columns are those of IMAGE, TEXT and JSON."""

    offsets: np.ndarray
    """int64 (N,3); MISSING where a sample has no such member"""
    sizes: np.ndarray
    """uint32 (N,3), in bytes; TWICE where it has several"""
    whole: bool
    """the shard has its end"""
    passed_over: dict[str, int]
    """{suffix: number of members that belong to no sample}"""


def indexed(shard: Path, images: list[str], text: str) -> Index:
    """Return the index of a shard, with a warning where the shard ends early.

    Indices are in $SECATEUR_DATA/index, one per shard, and made where there is none for this file, size and time, or
    where it is damaged. Raises ValueError for a compressed shard.
    """
    with open(shard, "rb") as file:
        if file.read(len(GZIP)) == GZIP:
            raise ValueError(f"data.path: {shard} is compressed, so samples in it cannot be read by number; {UNPACK}")
    stat = shard.stat()
    key = [INDEX_VERSION, str(shard.resolve()), stat.st_size, stat.st_mtime_ns, images, text]
    place = data_root() / "index" / f"{digest(json.dumps(key))[:32]}.npz"
    write = functools.partial(write_index, shard, images, text)
    made(place, write)
    try:
        index = read_index(place)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        log.warning("%s, the index of %s, is damaged (%s) and is made again", place, shard, error)
        place.unlink(missing_ok=True)
        made(place, write)
        index = read_index(place)
    if not index.whole:
        count = len(index.offsets)
        warnings.warn(f"{shard} is damaged or ends early: {count} samples were found in it", stacklevel=2)
    return index


def read_index(place: Path) -> Index:
    """Read what `write_index` wrote; raises whatever numpy and zipfile raise for a damaged file."""
    with np.load(place, allow_pickle=False) as file:
        passed_over = json.loads(str(file["passed_over"]))
        return Index(file["offsets"], file["sizes"], bool(file["whole"]), passed_over)


def write_index(shard: Path, images: list[str], text: str, place: Path) -> None:
    """Read the headers of a shard, and store where the members of each of its samples are, in order of appearance."""
    columns = (images, [text], ["json"])
    wanted, total = {suffix for suffixes in columns for suffix in suffixes}, shard.stat().st_size
    members: list[tuple[str, int, int]] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isreg() and member.offset_data + member.size <= total:
                    members.append((member.name, member.offset_data, member.size))
            with open(shard, "rb") as file:
                file.seek(tar.offset)
                whole = not file.read(512).strip(b"\0")
    except tarfile.TarError:
        whole = False
    samples, passed = grouped(members, wanted)
    rows = [[first(sample, suffixes) for suffixes in columns] for sample in samples]
    if not whole and rows and (MISSING, 0) in rows[-1][:2]:
        rows.pop()  # the sample in which the shard ends
    table = np.array(rows, np.int64).reshape(-1, len(columns), 2)
    np.savez(
        place,
        offsets=table[..., 0],
        sizes=table[..., 1].astype(np.uint32),
        whole=whole,
        passed_over=json.dumps(passed),
    )


def grouped(
    members: Sequence[tuple[str, int, int]], wanted: Collection[str]
) -> tuple[list[dict[str, tuple[int, int]]], dict[str, int]]:
    """Put the members of a shard together to samples {suffix: (offset, size)}, in order of appearance.

    `members` are (name, offset, size) each. Also returns {suffix: number} of those that belong to no sample.
    """
    short = {key for key, suffix in (split(name) for name, _, _ in members) if suffix in wanted}
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    passed: Counter[str] = Counter()
    for name, offset, size in members:
        if any(map(is_hidden, PurePath(name).parts)):
            continue
        key, suffix = split(name)
        if suffix not in wanted:
            longer = None if key in short else split_at_suffix(name, wanted)
            if longer is None:
                passed[PurePath(name).suffix.lower() or "no ending"] += 1
                continue
            key, suffix = longer
        if key:
            sample = samples.setdefault(key, {})
            sample[suffix] = (offset, TWICE if suffix in sample else size)
    return list(samples.values()), dict(passed)


def first(sample: dict[str, tuple[int, int]], suffixes: list[str]) -> tuple[int, int]:
    """Offset and size of the first of some members that a sample has."""
    return next((sample[suffix] for suffix in suffixes if suffix in sample), (MISSING, 0))


def split(name: str) -> tuple[str, str]:
    """Key and suffix of a member as webdataset has them: the name is cut at the first dot after its folder."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}{slash}{stem}" if stem else ""), suffix.lower()


def split_at_suffix(name: str, suffixes: Collection[str]) -> tuple[str, str] | None:
    """Key and suffix of a member whose name ends with one of some suffixes, the longest; None where it has none."""
    for suffix in sorted(suffixes, key=len, reverse=True):
        key = name[: -len(suffix) - 1]
        if name.lower().endswith(f".{suffix}") and not key.endswith("/") and key:
            return key, suffix
    return None


def digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def made(place: Path, make: Callable[[Path], None]) -> None:
    """A file that is complete or absent, and made by one process while the others wait."""
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.parent / f".{place.name}.lock"):
        if place.exists():
            return
        handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.stem}.", suffix=place.suffix)
        os.close(handle)
        try:
            make(Path(name))
            os.chmod(name, 0o644)
            os.replace(name, place)
        finally:
            Path(name).unlink(missing_ok=True)
