"""Pictures in an LMDB, as LSUN (arXiv 1506.03365) publishes them: its values are encoded pictures."""

from pathlib import Path
from typing import Any

import numpy as np

from datamodules.readers.base import ListedSource, MissingData, Record, located
from datamodules.readers.folder import PackedBytes
from datamodules.readers.pictures import PictureForm
from datamodules.seeding import numpy_rng


class Lmdb(ListedSource):
    """The values of an LMDB, decoded when they are taken; there are no labels.

    The keys are listed once (three million of LSUN's take some seconds and 150 MB). The database is opened for each
    batch, by whatever process reads it. Needs the extra `secateur[lsun]`.

    Args:
        path: the folder that holds data.mdb; a relative one is looked up in $SECATEUR_DATA, too.
        size: edge of the images in pixels.
        mode: RGB, or L for grey.
        start: number of the first key that is used, of the keys in a random order that depends on their number alone.
        stop: number after the last key that is used. The used keys stay in the order of the database.
        get: how to get the data, for the message where they are missing.
        fit: see PictureForm, as `pixel_range`.

    Raises:
        MissingData: the folder has no data.mdb.
        ValueError: it cannot be opened as an LMDB.
        BadSample: (from `take`) a value is no picture that can be used.
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
        fit: str = "crop",
        pixel_range: list[float] | None = None,
    ) -> None:
        self.form = PictureForm(size, mode, fit, pixel_range)
        folder = located(path, get)
        if folder.is_dir() and not (folder / "data.mdb").exists():
            raise MissingData(f"{folder} has no data.mdb: `path` names the folder of an LMDB, unpacked")
        self.path = folder
        with open_lmdb(folder) as environment, environment.begin() as transaction:
            keys = PackedBytes(bytes(key) for key in transaction.cursor().iternext(values=False))
        self.keys, total = keys, len(keys)
        self.numbers = np.sort(numpy_rng("lmdb", total).permutation(total)[start:stop])

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        return f"{self.path}, key {self.key(index).decode(errors='replace')}"

    def key(self, index: int) -> bytes:
        return bytes(self.keys[int(self.numbers[index])])

    def raw(self, index: int) -> bytes:
        with open_lmdb(self.path) as environment, environment.begin() as transaction:
            return bytes(transaction.get(self.key(index)))

    def listing(self) -> bytes:
        return self.keys.content + self.numbers.tobytes()

    def take(self, indices: np.ndarray) -> Record:
        with open_lmdb(self.path) as environment, environment.begin() as transaction:
            pictures = [(self.name(int(i)), transaction.get(self.key(int(i)))) for i in indices]
        return self.form.decode(pictures) | {"label": np.full(len(indices), -1, np.int64)}


def open_lmdb(path: Path) -> Any:
    """Open an LMDB for a `with` block: left open, it could not be opened again, nor used in a forked worker."""
    try:
        import lmdb  # noqa: PLC0415  an optional extra
    except ImportError as error:
        raise MissingData(f"{path} needs the reader of LMDB: pip install -e '.[lsun]'") from error
    try:
        return lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise ValueError(f"{path} cannot be opened as an LMDB: {error}") from error
