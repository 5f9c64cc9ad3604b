"""Pictures with captions in tar files, as webdataset and img2dataset write them, read by number.

A shard 00000.tar holds 000000000.jpg, 000000000.txt and 000000000.json, one sample after the other; what lies beside it
(00000.parquet, 00000_stats.json) is not needed. Shards are indexed once and then read at any place: the order of
samples is a function of (seed, epoch), a run is resumed at the exact sample, and neither ranks nor workers share any.
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

from datamodules.readers.base import BadSample, LazyTexts, ListedSource, MissingData, Record, data_root, decode_pictures
from datamodules.readers.folder import EXTENSIONS
from datamodules.readers.shard_index import MISSING, TWICE, UNPACK, digest, indexed, made, split, split_at_suffix
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
    """Samples of tar files, decoded when asked for, centre-cropped and resized to `size`.

    `path` is a folder, a pattern with * or with braces as in {00000..00021}.tar, a URL, also with braces, or a list of
    these. A URL is what webdataset can open: https://, hf://, gs://, or "pipe:" and a command that writes a shard. Each
    is stored once in $SECATEUR_DATA/shards, which becomes as large as all of them together. Braces and URLs need
    `pip install -e '.[shards]'`. Other relative paths are looked up in $SECATEUR_DATA, too.

    `images` are suffixes, of which a sample's first is its picture. `caption` is the suffix of the caption (txt), a
    field of the json member (json.caption), or null. "original_size" is original_height and original_width of the json
    where they are there, as img2dataset writes them, else the picture's own. Samples are shuffled once, as a function
    of their number alone, and [start, stop) of them are used.

    A member's name is cut at its first dot into key and suffix, as webdataset does; a key with dots in it
    (shot_1.0.jpg) is recognised where nothing else has the shorter key. Members of other suffixes are passed over.

    A sample that lacks picture or caption, has a member twice or cannot be read raises BadSample from `take`. Of a
    shard that ends early the whole samples are used, with a warning. A shard that does not exist is warned of; where
    more than `max_missing` of them do not, or all, MissingData lists them.
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
    ) -> None:
        self.size, self.mode = size, mode
        self.column, self.field = TEXT, ""
        if caption is not None and caption.startswith("json."):
            self.column, self.field, caption = JSON, caption.removeprefix("json."), "json"
        suffixes = images or [extension[1:] for extension in EXTENSIONS]
        self.suffixes = {*suffixes, caption or "txt", "json"}
        self.files = present([path] if isinstance(path, str) else path, max_missing)
        bar = tqdm(self.files, desc="index of shards", leave=False, disable=None)
        tables = [indexed(file, suffixes, caption or "txt") for file in bar]
        counts = [len(table.offsets) for table in tables]
        self.passed_over = sum((Counter(table.passed_over) for table in tables), Counter())
        order = numpy_rng("shards", sum(counts)).permutation(sum(counts))[start:stop]
        self.shard = np.repeat(np.arange(len(tables), dtype=np.int32), counts)[order]
        self.offset = np.concatenate([table.offsets for table in tables])[order]
        self.bytes = np.concatenate([table.sizes for table in tables])[order]
        self.opened: dict[int, io.FileIO] = {}
        self.captions: Sequence[str] | None = None
        if caption is not None:
            self.captions = LazyTexts(len(order), self.caption)

    def __len__(self) -> int:
        return len(self.shard)

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay with their process; forked ones may share them, as reading at a place moves nothing."""
        return self.__dict__ | {"opened": {}}

    def take(self, indices: np.ndarray) -> Record:
        places = [int(index) for index in indices]
        record = decode_pictures(((self.name(i), self.member(i, IMAGE)) for i in places), self.size, self.mode)
        for row, place in enumerate(places):
            if self.offset[place, JSON] != MISSING:
                meta = self.meta(place)
                edges = meta.get("original_height"), meta.get("original_width")
                if all(isinstance(edge, int) and edge > 0 for edge in edges):
                    record["original_size"][row] = edges
        record["label"] = np.full(len(places), -1, np.int64)
        return record if self.captions is None else record | {"caption": [self.caption(i) for i in places]}

    def caption(self, index: int) -> str:
        """The caption of a sample; BadSample where it has none that is text."""
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
        return self.bytes[indices, IMAGE].astype(np.int64)

    def listing(self) -> bytes:
        return self.shard.tobytes() + self.offset.tobytes() + self.bytes.tobytes()

    def meta(self, index: int) -> dict[str, Any]:
        """The json of a sample."""
        content = self.member(index, JSON)
        try:
            meta = json.loads(content)
        except ValueError as error:
            raise BadSample(f"{self.name(index)}: the json cannot be read ({error})") from error
        if not isinstance(meta, dict):
            raise BadSample(f"{self.name(index)}: the json is no object, but {meta!r:.40}")
        return meta

    def member(self, index: int, column: int) -> bytes:
        """What one member of a sample holds."""
        offset, size = int(self.offset[index, column]), int(self.bytes[index, column])
        if offset == MISSING or size == TWICE:
            what = ("picture", "caption", "json")[column]
            raise BadSample(f"{self.name(index)} has {'no' if offset == MISSING else 'more than one'} {what}")
        found = self.read(index, size, offset)
        if len(found) < size:
            raise BadSample(f"{self.name(index)}: the shard has become shorter since it was indexed")
        return found

    def read(self, index: int, size: int, offset: int) -> bytes:
        shard = int(self.shard[index])
        if shard not in self.opened:
            while len(self.opened) >= OPEN_FILES:
                self.opened.pop(next(iter(self.opened)))
            self.opened[shard] = io.FileIO(self.files[shard])
        return os.pread(self.opened[shard].fileno(), size, offset)

    def name(self, index: int) -> str:
        """Shard and key of a sample, from the header before one of its members (a long key is cut there)."""
        header = self.read(index, 512, int(self.offset[index].max()) - 512)
        try:
            key = self.key(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)
        except tarfile.HeaderError:
            key = f"sample {index}"
        return f"{self.files[self.shard[index]]}: {key}"

    def key(self, member: str) -> str:
        """Return the key of a member, whose name is cut at its first dot unless no suffix that is read follows it."""
        key, suffix = split(member)
        return key if suffix in self.suffixes else (split_at_suffix(member, self.suffixes) or (key, suffix))[0]


# Which shards there are


def present(patterns: list[str], max_missing: float) -> list[Path]:
    """The shards that patterns name, in their order, those of URLs fetched; see Shards."""
    if not 0 <= max_missing < 1:
        raise ValueError(f"data.max_missing={max_missing} is out of range; choose a fraction, 0 <= max_missing < 1")
    names = [name for pattern in patterns for name in expanded(pattern)]
    for name in names:
        if name.lower().endswith(COMPRESSED) and not name.startswith("pipe:"):
            raise ValueError(f"data.path: {name} is compressed, so samples in it cannot be read by number; {UNPACK}")
    files: list[Path] = []
    missing: list[str] = []
    for name in names:
        file = fetched(name) if URL.match(name) else Path(name)
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


def expanded(pattern: str) -> list[str]:
    """The shards that one pattern names, in alphabetical order where it does not say which."""
    if "{" in pattern:
        names = webdataset(pattern).shardlists.expand_urls(pattern)
        return [shard for name in names for shard in expanded(name)]
    if URL.match(pattern):
        return [pattern]
    given = Path(pattern).expanduser()
    for place in (given, data_root() / given):
        if place.is_dir():
            return sorted(str(file) for file in place.rglob("*.tar"))
        if place.is_file():
            return [str(place)]
        if shards := glob.glob(str(place), recursive=True):
            return sorted(shards)
    return [] if glob.has_magic(pattern) else [str(given)]


def webdataset(pattern: str) -> Any:
    """The package, an optional extra, which knows what braces and URLs mean."""
    try:
        import webdataset  # noqa: PLC0415
    except ImportError as error:
        raise MissingData(f"data.path={pattern} needs webdataset: pip install -e '.[shards]'") from error
    return webdataset


def fetched(url: str) -> Path:
    """Where the shard of a URL is stored, as a whole; it is not there if the server says that it has none.

    Raises MissingData where there is no network, or where the transfer fails; shards that have arrived are kept.
    """
    place = data_root() / "shards" / f"{digest(url)[:8]}-{re.sub(r'[^A-Za-z0-9.]+', '_', url)[-80:]}"
    with contextlib.suppress(NotThere):
        made(place, functools.partial(download, url))
    return place


class NotThere(Exception):
    """A server that has no such shard."""


def download(url: str, place: Path) -> None:
    """Write what webdataset reads from a URL into a file, with a progress bar."""
    opener = webdataset(url).gopen
    if url.startswith("http"):
        check_reachable(url)
    stream = None
    try:
        bar = functools.partial(tqdm.wrapattr, method="read", desc=url[-40:], unit="B", unit_scale=True)
        with open(place, "wb") as file, opener(url) as stream, bar(stream) as source:
            shutil.copyfileobj(source, file)
    except ValueError as error:
        raise ValueError(f"data.path={url}: {error}; choose https://, hf://, gs:// or pipe: and a command") from error
    except OSError as error:
        if getattr(stream, "status", None) == CURL_HTTP_ERROR:
            raise NotThere(url) from error
        raise MissingData(f"{url} could not be stored in {place.parent}: {error}; the same command goes on") from error


def check_reachable(url: str) -> None:
    """Raise MissingData at once where there is no network; curl would try for a minute, once a shard."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=30).close()
    except urllib.error.HTTPError:
        pass  # somebody answers
    except OSError as error:
        raise MissingData(f"{url} cannot be reached ({error}); fetch the shards where there is a network") from error
