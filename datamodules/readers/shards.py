"""Pictures with captions in tar files, as webdataset and img2dataset write them, read by number.

A shard 00000.tar holds 000000000.jpg, 000000000.txt and 000000000.json, one sample after the other; what lies beside it
(00000.parquet, 00000_stats.json) is not needed. Shards are indexed once and then read at any place: the order of
samples is a function of (seed, epoch), a run is resumed at the exact sample, and no sample is read by two ranks or
workers.
"""

import contextlib
import functools
import glob
import io
import json
import os
import re
import shutil
import tarfile
import urllib.error
import urllib.request
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from datamodules.readers.base import BadSample, LazyTexts, ListedSource, MissingData, Record, data_root
from datamodules.readers.folder import EXTENSIONS
from datamodules.readers.pictures import PictureForm
from datamodules.readers.shard_index import (
    MISSING,
    TWICE,
    UNPACK,
    hash_text,
    load_index,
    make_once,
    split_name,
    split_name_at_suffix,
)
from datamodules.seeding import numpy_rng

IMAGE, TEXT, JSON = 0, 1, 2
"""Columns of an index: the members of a sample."""
OPEN_FILES = 64
"""Shards that a process holds open; data sets have thousands, systems often allow a thousand."""
CURL_HTTP_ERROR = 22
"""How curl, which webdataset calls, ends where a server says that it does not have (or give) a file."""
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Endings of compressed shards, which are refused."""
URL = re.compile(r"pipe:|[a-z0-9]+://")


class Shards(ListedSource):
    """The samples of tar files, decoded when they are taken.

    The name of a member is cut at its first dot into key and suffix, as webdataset does; members of one key are a
    sample. A key with dots in it (shot_1.0.jpg) is recognised where no other member has the shorter key. Members with
    other suffixes than those below are passed over, and so are hidden ones. Samples are shuffled once, as a function of
    their number alone. The "original_size" of a record is original_height and original_width of the json member where
    it has them, as img2dataset writes them.

    Args:
        path: a folder, a pattern with * or with braces as in {00000..00021}.tar, a URL, also with braces, or a list of
            these. A URL is one that webdataset can open: https://, hf://, gs://, or "pipe:" and a command that writes a
            shard; each is stored once in $SECATEUR_DATA/shards, which becomes as large as all of them together. Braces
            and URLs need `pip install -e '.[shards]'`. Other relative paths are looked up in $SECATEUR_DATA, too.
        size: edge of the images in pixels.
        mode: RGB, or L for grey.
        start: number of the first sample that is used, in the shuffled order.
        stop: number after the last sample that is used; None for all.
        images: suffixes of pictures; the first of these that a sample has is its picture. None for the usual ones.
        caption: suffix of the member that is the caption, or json.FIELD for a field of the json member; None for none.
        max_missing: share of the shards that may be missing, with a warning.
        fit: see PictureForm, as `pixel_range`.

    Raises:
        MissingData: no shard exists, or more than `max_missing` of them do not; the message lists them.
        ValueError: a shard is compressed.
        BadSample: (from `take`) a sample lacks its picture or caption, has one twice, or cannot be read.
    """

    def __init__(
        self,
        path: str | list[str],
        size: int,
        mode: str = "RGB",
        start: int = 0,
        stop: int | None = None,
        images: list[str] | None = None,
        caption: str | None = "txt",
        max_missing: float = 0.05,
        fit: str = "crop",
        pixel_range: list[float] | None = None,
    ) -> None:
        self.form = PictureForm(size, mode, fit, pixel_range)
        self.column, self.field = TEXT, ""
        if caption is not None and caption.startswith("json."):
            self.column, self.field, caption = JSON, caption.removeprefix("json."), "json"
        suffixes = images or [extension[1:] for extension in EXTENSIONS]
        self.suffixes = {*suffixes, caption or "txt", "json"}
        self.files = find_shards([path] if isinstance(path, str) else path, max_missing)
        bar = tqdm(self.files, desc="index of shards", leave=False, disable=None)
        indices = [load_index(file, suffixes, caption or "txt") for file in bar]
        counts = [len(index.offsets) for index in indices]
        self.passed_over = sum((Counter(index.passed_over) for index in indices), Counter())
        order = numpy_rng("shards", sum(counts)).permutation(sum(counts))[start:stop]
        self.shard = np.repeat(np.arange(len(indices), dtype=np.int32), counts)[order]
        self.offset = np.concatenate([index.offsets for index in indices])[order]
        self.bytes = np.concatenate([index.sizes for index in indices])[order]
        self.open_files: dict[int, io.FileIO] = {}
        self.captions: Sequence[str] | None = None
        if caption is not None:
            self.captions = LazyTexts(len(order), self.caption)

    def __len__(self) -> int:
        return len(self.shard)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out open files. Forked processes may share them, as `os.pread` moves no position in a file."""
        return self.__dict__ | {"open_files": {}}

    def take(self, indices: np.ndarray) -> Record:
        numbers = [int(index) for index in indices]
        record = self.form.decode((self.name(i), self.member(i, IMAGE)) for i in numbers)
        for row, number in enumerate(numbers):
            if self.offset[number, JSON] != MISSING:
                meta = self.meta(number)
                edges = meta.get("original_height"), meta.get("original_width")
                if all(isinstance(edge, int) and edge > 0 for edge in edges):
                    record["original_size"][row] = edges
        record["label"] = np.full(len(numbers), -1, np.int64)
        return record if self.captions is None else record | {"caption": [self.caption(i) for i in numbers]}

    def caption(self, index: int) -> str:
        """Return the caption of a sample. Raises BadSample where it has none, or one that is no text."""
        if self.column == JSON:
            text = self.meta(index).get(self.field)
            if not isinstance(text, str):
                raise BadSample(f"{self.name(index)}: {self.field!r} in the json is {text!r:.40}, no text")
            if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise BadSample(f"{self.name(index)}: {self.field!r} in the json has half a character")
            return text.strip()
        try:
            return self.member(index, TEXT).decode().strip()
        except UnicodeDecodeError as error:
            raise BadSample(f"{self.name(index)}: the caption is not UTF-8 ({error})") from error

    def raw(self, index: int) -> bytes:
        return self.member(index, IMAGE)

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        sizes = self.bytes[indices, IMAGE].astype(np.int64)
        return np.where(sizes == TWICE, 0, sizes)

    def listing(self) -> bytes:
        return self.shard.tobytes() + self.offset.tobytes() + self.bytes.tobytes()

    def meta(self, index: int) -> dict[str, Any]:
        """Return the json member of a sample. Raises BadSample where it is no JSON object."""
        content = self.member(index, JSON)
        try:
            meta = json.loads(content)
        except ValueError as error:
            raise BadSample(f"{self.name(index)}: the json cannot be read ({error})") from error
        if not isinstance(meta, dict):
            raise BadSample(f"{self.name(index)}: the json is no object, but {meta!r:.40}")
        return meta

    def member(self, index: int, column: int) -> bytes:
        """Return the content of a member of a sample: of its IMAGE, TEXT or JSON. Raises BadSample without one."""
        offset, size = int(self.offset[index, column]), int(self.bytes[index, column])
        if offset == MISSING or size == TWICE:
            what = ("picture", "caption", "json")[column]
            raise BadSample(f"{self.name(index)} has {'no' if offset == MISSING else 'more than one'} {what}")
        content = self.read(index, size, offset)
        if len(content) < size:
            raise BadSample(f"{self.name(index)}: the shard has become shorter since it was indexed")
        return content

    def read(self, index: int, size: int, offset: int) -> bytes:
        """Return `size` bytes at `offset` of the shard of a sample."""
        shard = int(self.shard[index])
        if shard not in self.open_files:
            while len(self.open_files) >= OPEN_FILES:
                self.open_files.pop(next(iter(self.open_files)))
            self.open_files[shard] = io.FileIO(self.files[shard])
        return os.pread(self.open_files[shard].fileno(), size, offset)

    def name(self, index: int) -> str:
        """Return shard and key of a sample, from the header before one of its members (a long key is cut there)."""
        header = self.read(index, 512, int(self.offset[index].max()) - 512)
        try:
            key = self.key(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)
        except tarfile.HeaderError:
            key = f"sample {index}"
        return f"{self.files[self.shard[index]]}: {key}"

    def key(self, member: str) -> str:
        """Return the key of a member, whose name is cut at its first dot unless no suffix that is read follows it."""
        key, suffix = split_name(member)
        return key if suffix in self.suffixes else (split_name_at_suffix(member, self.suffixes) or (key, suffix))[0]


# Finding and fetching shards


def find_shards(patterns: list[str], max_missing: float) -> list[Path]:
    """Return the shards of some patterns, in their order; those of URLs are fetched. Raises what Shards raises."""
    if not 0 <= max_missing < 1:
        raise ValueError(f"data.max_missing={max_missing} is out of range; choose a fraction, 0 <= max_missing < 1")
    names = [name for pattern in patterns for name in expand_pattern(pattern)]
    for name in names:
        if name.lower().endswith(COMPRESSED) and not name.startswith("pipe:"):
            raise ValueError(f"data.path: {name} is compressed, so samples in it cannot be read by number; {UNPACK}")
    files: list[Path] = []
    missing: list[str] = []
    for name in names:
        file = fetch_shard(name) if URL.match(name) else Path(name)
        if file.is_file():
            files.append(file)
        else:
            missing.append(name)
        if len(missing) > max_missing * len(names):  # nothing more is fetched in vain
            break
    asked, absent = ", ".join(patterns), f"{', '.join(missing[:5])}{', ...' * (len(missing) > 5)}"
    if not names:
        packed = sum(1 for pattern in patterns if Path(pattern).is_dir() for _ in compressed_below(Path(pattern)))
        rest = f" ({packed} compressed ones are: {UNPACK})" if packed else ""
        raise MissingData(
            f"data.path={asked}: no .tar file is there{rest}; name a folder, a pattern or a URL of shards"
        )
    if len(missing) > max_missing * len(names):
        there = sorted(file.name for file in Path(missing[0]).parent.glob("*.tar"))
        beside = "" if URL.match(missing[0]) else f"; beside it there are: {', '.join(there[:5]) or 'no shards'}"
        raise MissingData(
            f"data.path={asked} names {len(names)} shards; missing: {absent}{beside}; "
            f"data.max_missing={max_missing} of them may be"
        )
    if missing:
        warnings.warn(f"data.path={asked}: {len(missing)} of {len(names)} shards are missing: {absent}", stacklevel=2)
    return files


def compressed_below(folder: Path) -> Iterator[Path]:
    """Yield the compressed tar files below a folder."""
    yield from (file for file in folder.rglob("*") if file.name.lower().endswith(COMPRESSED))


def expand_pattern(pattern: str) -> list[str]:
    """Return the names of the shards of one pattern; those of a folder or of * are in alphabetical order."""
    if "{" in pattern:
        names = import_webdataset(pattern).shardlists.expand_urls(pattern)
        return [shard for name in names for shard in expand_pattern(name)]
    if URL.match(pattern):
        return [pattern]
    given = Path(pattern).expanduser()
    for candidate in (given, data_root() / given):
        if candidate.is_dir():
            return sorted(str(file) for file in candidate.rglob("*.tar"))
        if candidate.is_file():
            return [str(candidate)]
        if shards := glob.glob(str(candidate), recursive=True):
            return sorted(shards)
    return [] if glob.has_magic(pattern) else [str(given)]


def import_webdataset(pattern: str) -> Any:
    """Return the package webdataset, an optional extra that expands braces and opens URLs."""
    try:
        import webdataset  # noqa: PLC0415
    except ImportError as error:
        raise MissingData(f"data.path={pattern} needs webdataset: pip install -e '.[shards]'") from error
    return webdataset


def fetch_shard(url: str) -> Path:
    """Return where the shard of a URL is stored, after fetching it; the file does not exist if the server has none.

    Raises MissingData where there is no network, or where the transfer fails; shards that have arrived are kept.
    """
    path = data_root() / "shards" / f"{hash_text(url)[:8]}-{re.sub(r'[^A-Za-z0-9.]+', '_', url)[-80:]}"
    with contextlib.suppress(NotOnServer):
        make_once(path, functools.partial(download, url))
    return path


class NotOnServer(Exception):
    """The server has no such shard."""


def download(url: str, path: Path) -> None:
    """Write the content of a URL into a file, with a progress bar. Raises NotOnServer, ValueError or MissingData."""
    opener = import_webdataset(url).gopen
    if url.startswith("http"):
        check_reachable(url)
    stream = None
    try:
        bar = functools.partial(tqdm.wrapattr, method="read", desc=url[-40:], unit="B", unit_scale=True)
        with open(path, "wb") as file, opener(url) as stream, bar(stream) as source:
            shutil.copyfileobj(source, file)
    except ValueError as error:
        raise ValueError(f"data.path={url}: {error}; choose https://, hf://, gs:// or pipe: and a command") from error
    except OSError as error:
        if getattr(stream, "status", None) == CURL_HTTP_ERROR:
            raise NotOnServer(url) from error
        raise MissingData(f"{url} could not be stored in {path.parent}: {error}; the same command goes on") from error


def check_reachable(url: str) -> None:
    """Raise MissingData at once where there is no network; curl would try for a minute, once a shard."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=30).close()
    except urllib.error.HTTPError:
        pass  # somebody answers
    except OSError as error:
        raise MissingData(f"{url} cannot be reached ({error}); fetch the shards where there is a network") from error
