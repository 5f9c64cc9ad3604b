"""Pictures in IDX files, the format of MNIST: a header with type and sizes, then the numbers."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from datamodules.readers.arrays import Arrays, check_images, select_part
from datamodules.readers.base import MissingData, check_whole_labels, located

GZIP = b"\x1f\x8b"
"""First bytes of a file that is compressed by gzip."""
TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
"""{third byte of an IDX file: the type of its numbers, as numpy names it}"""
LISTED_FILES = 6
"""Names of files that a message lists."""


class Idx(Arrays):
    """The images of one IDX file, with labels in another; either may be compressed by gzip.

    Args:
        path: the folder of the files; a relative one is looked up in $SECATEUR_DATA, too.
        images: name of the file of images, with or without the ending .gz.
        labels: name of the file of labels; None for none.
        names: see Arrays, as `caption`, `size`, `mode`, `fit` and `pixel_range`.
        start: see select_part, as `stop`.
        get: how to get the data, for the message where they are missing.

    Raises:
        MissingData: the folder or one of the files does not exist.
        ValueError: a file is no IDX file, is damaged, or holds no images or labels.
    """

    def __init__(
        self,
        path: str,
        images: str,
        labels: str | None = None,
        names: list[str] | None = None,
        caption: str = "a photo of a {}",
        size: int | None = None,
        mode: str | None = None,
        fit: str = "crop",
        pixel_range: list[float] | None = None,
        start: int = 0,
        stop: int | None = None,
        get: str | None = None,
    ) -> None:
        folder = located(path, get)
        file = find_file(folder, images)
        pixels = read_idx(file)
        check_images(pixels, str(file), pixel_range)
        classes = None
        if labels is not None:
            file = find_file(folder, labels)
            classes = check_whole_labels(read_idx(file), str(file))
            if classes.shape != (len(pixels),):
                raise ValueError(
                    f"{file} has labels of the shape {classes.shape}; of the {len(pixels)} images in {images} it is "
                    f"({len(pixels)},)"
                )
        pixels, classes = select_part(pixels, classes, start, stop)
        super().__init__(pixels, classes, names, caption, size, mode, fit, pixel_range)


def find_file(folder: Path, name: str) -> Path:
    """Return a file of a folder, under its name with or without .gz. Raises MissingData where it has neither."""
    plain = folder / name.removesuffix(".gz")
    for file in (folder / name, plain, plain.with_name(f"{plain.name}.gz")):
        if file.is_file():
            return file
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    listed = ", ".join(names[:LISTED_FILES]) + ", ..." * (len(names) > LISTED_FILES)
    raise MissingData(f"{folder} has no file {name}; it has: {listed or 'none, or is no folder'}")


def read_idx(file: Path) -> np.ndarray:
    """Return the array in an IDX file. Raises ValueError, naming the file, for another format and a damaged file."""
    content = file.read_bytes()
    if content.startswith(GZIP):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{file} is damaged ({error}); get the file again") from error
    dimensions = content[3] if len(content) > 3 else 0
    header = 4 + 4 * dimensions
    if content[:2] != b"\0\0" or content[2] not in TYPES or not dimensions or len(content) < header:
        raise ValueError(f"{file} is no IDX file, as MNIST comes: it does not begin with the header of one")
    shape = [int(size) for size in np.frombuffer(content, ">u4", dimensions, 4)]
    kind = np.dtype(TYPES[content[2]])
    if len(content) - header != math.prod(shape) * kind.itemsize:
        raise ValueError(
            f"{file} is damaged: its header promises numbers of the shape {tuple(shape)}, {math.prod(shape)} of "
            f"{kind.itemsize} bytes, and {len(content) - header} bytes follow; get the file again"
        )
    numbers = np.frombuffer(content, kind, offset=header).reshape(shape)
    return numbers.astype(kind.newbyteorder("="), copy=False)
