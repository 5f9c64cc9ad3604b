"""The index of a shard: where in the tar file the members of each of its samples are, found once and stored."""

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
MISSING = 0
"""In path of an offset: the sample has no such member."""
TWICE = 2**32 - 1
"""In path of a size: the sample has several such members."""
GZIP = b"\x1f\x8b"
"""First bytes of a compressed file, in which no place can be read without reading all that is before it."""
UNPACK = "unpack it (gunzip, or another program for its ending) and name the .tar file"
"""Advice for a compressed shard."""


class Index(NamedTuple):
    """Where the members of a shard's samples are; the columns are those of IMAGE, TEXT and JSON."""

    offsets: np.ndarray
    """int64 (N,3); MISSING where a sample has no such member"""
    sizes: np.ndarray
    """uint32 (N,3), in bytes; TWICE where it has several"""
    whole: bool
    """whether the shard has its end"""
    passed_over: dict[str, int]
    """{suffix: number of members that belong to no sample}"""


def load_index(shard: Path, images: list[str], text: str) -> Index:
    """Return the index of a shard, with a warning where the shard ends early.

    Indices are in $SECATEUR_DATA/index, one per shard, and made where there is none for this file, size and time, or
    where it is damaged. Raises ValueError for a compressed shard.
    """
    with open(shard, "rb") as file:
        if file.read(len(GZIP)) == GZIP:
            raise ValueError(f"data.path: {shard} is compressed, so samples in it cannot be read by number; {UNPACK}")
    stat = shard.stat()
    key = [INDEX_VERSION, str(shard.resolve()), stat.st_size, stat.st_mtime_ns, images, text]
    path = data_root() / "index" / f"{hash_text(json.dumps(key))[:32]}.npz"
    write = functools.partial(write_index, shard, images, text)
    make_once(path, write)
    try:
        index = read_index(path)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        log.warning("%s, the index of %s, is damaged (%s) and is made again", path, shard, error)
        path.unlink(missing_ok=True)
        make_once(path, write)
        index = read_index(path)
    if not index.whole:
        count = len(index.offsets)
        warnings.warn(f"{shard} is damaged or ends early: {count} samples were found in it", stacklevel=2)
    return index


def read_index(path: Path) -> Index:
    """Read an index that `write_index` wrote; raises whatever numpy and zipfile raise for a damaged file."""
    with np.load(path, allow_pickle=False) as file:
        passed_over = json.loads(str(file["passed_over"]))
        return Index(file["offsets"], file["sizes"], bool(file["whole"]), passed_over)


def write_index(shard: Path, images: list[str], text: str, path: Path) -> None:
    """Read the headers of a shard, and write the index of its samples, in order of appearance.

    Args:
        shard: the tar file.
        images: suffixes of pictures.
        text: suffix of captions.
        path: file of the index.
    """
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
    samples, passed_over = group_members(members, wanted)
    rows = [[find_first(sample, suffixes) for suffixes in columns] for sample in samples]
    if not whole and rows and (MISSING, 0) in rows[-1][:2]:
        rows.pop()  # the sample in which the shard ends
    table = np.array(rows, np.int64).reshape(-1, len(columns), 2)
    np.savez(
        path,
        offsets=table[..., 0],
        sizes=table[..., 1].astype(np.uint32),
        whole=whole,
        passed_over=json.dumps(passed_over),
    )


def group_members(
    members: Sequence[tuple[str, int, int]], wanted: Collection[str]
) -> tuple[list[dict[str, tuple[int, int]]], dict[str, int]]:
    """Return the samples of a shard, {suffix: (offset, size)} each, and {suffix: number} of members of no sample.

    `members` are (name, offset, size) each; only suffixes in `wanted` make samples. Samples are in order of appearance.
    """
    short = {key for key, suffix in (split_name(name) for name, _, _ in members) if suffix in wanted}
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    passed_over: Counter[str] = Counter()
    for name, offset, size in members:
        if any(map(is_hidden, PurePath(name).parts)):
            continue
        key, suffix = split_name(name)
        if suffix not in wanted:
            longer = None if key in short else split_name_at_suffix(name, wanted)
            if longer is None:
                passed_over[PurePath(name).suffix.lower() or "no ending"] += 1
                continue
            key, suffix = longer
        if key:
            sample = samples.setdefault(key, {})
            sample[suffix] = (offset, TWICE if suffix in sample else size)
    return list(samples.values()), dict(passed_over)


def find_first(sample: dict[str, tuple[int, int]], suffixes: list[str]) -> tuple[int, int]:
    """Return offset and size of a sample's first member among some suffixes; (MISSING, 0) where it has none."""
    return next((sample[suffix] for suffix in suffixes if suffix in sample), (MISSING, 0))


def split_name(name: str) -> tuple[str, str]:
    """Return key and suffix of a member as webdataset does: the name is cut at the first dot after its folder."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}{slash}{stem}" if stem else ""), suffix.lower()


def split_name_at_suffix(name: str, suffixes: Collection[str]) -> tuple[str, str] | None:
    """Return key and suffix of a member whose name ends with one of `suffixes`, the longest; None where it does not."""
    for suffix in sorted(suffixes, key=len, reverse=True):
        key = name[: -len(suffix) - 1]
        if name.lower().endswith(f".{suffix}") and not key.endswith("/") and key:
            return key, suffix
    return None


def hash_text(content: str) -> str:
    """Return the sha256 of a text."""
    return hashlib.sha256(content.encode()).hexdigest()


def make_once(path: Path, make: Callable[[Path], None]) -> None:
    """Make a file unless it exists: complete or absent, by one process while others wait. `make` writes to a path."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / f".{path.name}.lock"):
        if path.exists():
            return
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
        try:
            make(Path(name))
            os.chmod(name, 0o644)
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
