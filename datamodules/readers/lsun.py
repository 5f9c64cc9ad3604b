"""Pictures in an LMDB, as LSUN (arXiv 1506.03365) publishes them: its values are encoded pictures."""

from pathlib import Path
from typing import Any

import numpy as np

from datamodules.readers.base import ListedSource, MissingData, Record, decoded, located
from datamodules.readers.folder import Packed
from datamodules.seeding import numpy_rng


class Lmdb(ListedSource):
    """The values of an LMDB, decoded when asked for, centre-cropped and resized to `size`; there are no labels.

    `path` is the folder that holds data.mdb; a relative one is looked up in $SECATEUR_DATA, too. [start, stop) is a
    share of the keys drawn as a function of their number alone, in the order of the database. The keys are listed once
    (three million of LSUN's take some seconds and 150 MB), the database is opened for each batch, by whatever process.

    Needs the extra `secateur[lsun]`. Raises MissingData, with what `get` says, where it is not.
    """

    captions = None

    def __init__(
        self,
        path: str,
        size: int,
        mode: str = "RGB",
        start: int = 0,
        stop: int | None = None,
        get: str | None = None,
    ) -> None:
        folder = located(path, get)
        if folder.is_dir() and not (folder / "data.mdb").exists():
            raise MissingData(f"{folder} has no data.mdb: `path` names the folder of an LMDB, unpacked")
        self.path, self.size, self.mode = folder, size, mode
        with opened(folder) as environment, environment.begin() as transaction:
            keys = Packed(bytes(key) for key in transaction.cursor().iternext(values=False))
        self.keys, total = keys, len(keys)
        self.places = np.sort(numpy_rng("lmdb", total).permutation(total)[start:stop])

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        return f"{self.path}, key {self.key(index).decode(errors='replace')}"

    def key(self, index: int) -> bytes:
        return bytes(self.keys[int(self.places[index])])

    def raw(self, index: int) -> bytes:
        with opened(self.path) as environment, environment.begin() as transaction:
            return bytes(transaction.get(self.key(index)))

    def listing(self) -> bytes:
        return self.keys.content + self.places.tobytes()

    def take(self, indices: np.ndarray) -> Record:
        with opened(self.path) as environment, environment.begin() as transaction:
            pictures = [(self.name(int(i)), transaction.get(self.key(int(i)))) for i in indices]
        return decoded(pictures, self.size, self.mode) | {"label": np.full(len(indices), -1, np.int64)}


def opened(path: Path) -> Any:
    """An LMDB, for a `with` block: one that is left open could not be opened again, nor in a forked worker."""
    try:
        import lmdb  # noqa: PLC0415  an optional extra
    except ImportError as error:
        raise MissingData(f"{path} needs the reader of LMDB: pip install -e '.[lsun]'") from error
    try:
        return lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise ValueError(f"{path} cannot be opened as an LMDB: {error}") from error
