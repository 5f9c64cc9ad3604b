"""Pictures in arrays: npz archives and tiles of one large picture."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.readers.base import Lazily, MissingData, Record, located


class Arrays:
    """Images held in memory: the common end of every source small enough for it.

    With `names` of the classes each image has the caption that its class makes of `caption`, in which {} stands for
    the name; "a {}" becomes "an {}" before a vowel. Raises ValueError for a label without a name.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        names: list[str] | None = None,
        caption: str = "a photo of a {}",
    ) -> None:
        self.images = images
        self.labels = np.full(len(images), -1, np.int64) if labels is None else labels.astype(np.int64)
        self.captions: Sequence[str] | None = None
        if names is not None:
            for label in np.unique(self.labels):
                if not 0 <= label < len(names):
                    raise ValueError(f"label {label} has no name; data.names has {len(names)}, for labels from 0 on")
            self.phrases = [worded(caption, name) for name in names]
            self.captions = Lazily(len(images), self.phrase)

    def __len__(self) -> int:
        return len(self.images)

    def phrase(self, index: int) -> str:
        return self.phrases[self.labels[index]]

    def take(self, indices: np.ndarray) -> Record:
        record = {"image": self.images[indices], "label": self.labels[indices]}
        return record if self.captions is None else record | {"caption": [self.captions[int(i)] for i in indices]}


def worded(caption: str, name: str) -> str:
    """A caption with a name in it, after the fitting article."""
    if name[:1].lower() in "aeiou":
        caption = re.sub(r"\b([Aa]) \{\}", r"\1n {}", caption)
    return caption.replace("{}", name)


class Npz(Arrays):
    """An .npz file with one uint8 array (N,H,W,C) of images and, optionally, one of labels.

    A relative `path` is looked up in $SECATEUR_DATA, too. `names` and `caption` are those of Arrays. Raises
    MissingData where the file is not, ValueError where a key is not in it.
    """

    def __init__(
        self,
        path: str,
        images: str,
        labels: str | None = None,
        names: list[str] | None = None,
        caption: str = "a photo of a {}",
        get: str | None = None,
    ) -> None:
        file = located(path, get)
        with np.load(file, allow_pickle=False) as archive:
            for key in filter(None, (images, labels)):
                if key not in archive:
                    raise ValueError(f"{file} has no array {key!r}; it has: {', '.join(archive.files)}")
            pixels = archive[images]
            if pixels.dtype != np.uint8 or pixels.ndim != 4:
                raise ValueError(
                    f"{file}: array {images!r} is {pixels.dtype} of shape {pixels.shape}; "
                    "images are uint8 of (N, H, W, C)"
                )
            super().__init__(pixels, archive[labels] if labels else None, names, caption)


class Tiles(Arrays):
    """One lossless picture cut into square tiles, row by row; where there are labels, in a text file of digits beside.

    The embedded sample of CIFAR-10 is kept like this: a few megabytes, and a person can open it. `mode` is RGB or L
    (mel pictures are grey); `names` and `caption` are those of Arrays.
    """

    def __init__(
        self,
        path: str,
        tile: int,
        start: int = 0,
        stop: int | None = None,
        mode: str = "RGB",
        names: list[str] | None = None,
        caption: str = "a photo of a {}",
    ) -> None:
        if not Path(path).exists():
            raise MissingData(f"{path} does not exist; it comes with the repository (assets/)")
        sheet = np.asarray(Image.open(path).convert(mode))
        rows, columns = sheet.shape[0] // tile, sheet.shape[1] // tile
        tiles = sheet.reshape(rows, tile, columns, tile, -1).swapaxes(1, 2).reshape(rows * columns, tile, tile, -1)
        beside, labels = Path(path).with_suffix(".labels.txt"), None
        if beside.exists():
            labels = np.array([int(digit) for digit in beside.read_text().strip()], np.int64)[start:stop]
        super().__init__(tiles[start:stop], labels, names, caption)
