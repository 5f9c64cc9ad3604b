"""Pictures in arrays: npz archives and tiles of one large picture."""

import functools
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.readers.base import LazyTexts, ListedSource, MissingData, Record, check_whole_labels, located
from datamodules.readers.pictures import PictureForm
from datamodules.seeding import numpy_rng

FORMATS = (
    (b"\x93NUMPY", "a single array (.npy)", "save it as .npz, by its name: numpy.savez(file, x=array)"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it first (gunzip); MNIST's IDX files are read by data=idx as they are"),
    (b"\x00\x00", "an IDX file, as MNIST comes", "read it by data=idx (datamodules.readers.idx.Idx)"),
    (b"\x80", "pickled, which is never opened", "convert it where you trust it: numpy.savez(file, x=images)"),
)
"""First bytes of files that are no .npz, what they are, and what to do."""


class Arrays(ListedSource):
    """Images held in memory.

    Args:
        images: (N,H,W,C) or grey (N,H,W); uint8, or other numbers, which are scaled as in PictureForm.
        labels: whole numbers (N,); None for images without labels.
        names: name of each class, from label 0 on; with names each image has a caption.
        caption: the caption, in which {} stands for the name of the class; "a {}" becomes "an {}" before a vowel.
        size: edge of the square images in pixels; None leaves them as they are.
        mode: RGB, or L for grey; None leaves the channels as they are.
        fit: see PictureForm, as `pixel_range`.

    Raises:
        ValueError: labels are not whole numbers, or one of them has no name.
        BadSample: (from `take`) numbers of an image have no known range.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        names: list[str] | None = None,
        caption: str = "a photo of a {}",
        size: int | None = None,
        mode: str | None = None,
        fit: str = "crop",
        pixel_range: list[float] | None = None,
    ) -> None:
        self.images = images[..., None] if images.ndim == 3 else images
        self.form = PictureForm(size, mode or ("L" if self.images.shape[-1] == 1 else "RGB"), fit)
        self.scaling = PictureForm(None, pixel_range=pixel_range)
        self.is_scaled = images.dtype != np.uint8 or pixel_range is not None
        self.is_final = size is None and mode is None and not self.is_scaled
        self.labels = np.full(len(images), -1, np.int64) if labels is None else check_whole_labels(labels, "the array")
        self.class_names = names
        self.captions: Sequence[str] | None = None
        if names is not None:
            for label in np.unique(self.labels):
                if not 0 <= label < len(names):
                    raise ValueError(f"label {label} has no name; data.names has {len(names)}, for labels from 0 on")
            self.phrases = [fill_caption(caption, name) for name in names]
            self.captions = LazyTexts(len(images), self.phrase)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"image {index}"

    def raw(self, index: int) -> bytes:
        return self.images[index].tobytes()

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        return np.full(len(indices), self.images[:1].nbytes)

    def listing(self) -> bytes:
        return self.labels.tobytes()

    def describe_sample(self, index: int) -> str:
        height, width, channels = self.images.shape[1:]
        return f"array of {self.images.dtype}, {'RGB' if channels == 3 else 'L'}, {width}x{height}"

    def find_stored_range(self, index: int) -> tuple[float, float] | None:
        values = self.images[index]
        return None if values.dtype == np.uint8 else (float(values.min()), float(values.max()))

    def picture(self, index: int) -> Image.Image:
        """Return an image of the array as a picture of 8 bits."""
        values = self.images[index]
        values = self.scaling.scale(values) if self.is_scaled else values
        return Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)

    def phrase(self, index: int) -> str:
        """Return the caption of an image."""
        return self.phrases[self.labels[index]]

    def take(self, indices: np.ndarray) -> Record:
        if self.is_final:
            record: Record = {"image": self.images[indices]}
        else:
            record = self.form.decode((self.name(int(i)), functools.partial(self.picture, int(i))) for i in indices)
        record["label"] = self.labels[indices]
        return record if self.captions is None else record | {"caption": [self.captions[int(i)] for i in indices]}


def fill_caption(caption: str, name: str) -> str:
    """Return a caption with a name in place of {}, after the fitting article."""
    if name[:1].lower() in "aeiou":
        caption = re.sub(r"\b([Aa]) \{\}", r"\1n {}", caption)
    return caption.replace("{}", name)


class Npz(Arrays):
    """The images in one array of an .npz file, with labels in another.

    Args:
        path: the file; a relative one is looked up in $SECATEUR_DATA, too.
        images: name of the array of images, (N,H,W,C) or grey (N,H,W): uint8, uint16, or others with `pixel_range`.
        labels: name of the array of labels, whole numbers (N,); None for none.
        names: see Arrays, as `caption`, `size`, `mode`, `fit` and `pixel_range`.
        get: how to get the file, for the message where it is missing.
        start: see select_part, as `stop`.

    Raises:
        MissingData: the file does not exist.
        ValueError: it is no .npz, or lacks an array, or has one of another kind.
    """

    def __init__(
        self,
        path: str,
        images: str,
        labels: str | None = None,
        names: list[str] | None = None,
        caption: str = "a photo of a {}",
        get: str | None = None,
        size: int | None = None,
        mode: str | None = None,
        fit: str = "crop",
        pixel_range: list[float] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        file = located(path, get)
        check_npz(file)
        with np.load(file, allow_pickle=False) as archive:
            for key in filter(None, (images, labels)):
                if key not in archive:
                    raise ValueError(f"{file} has no array {key!r}; it has: {', '.join(archive.files)}")
            pixels = read_array(archive, images, file)
            check_images(pixels, f"{file}: array {images!r}", pixel_range)
            classes = (
                check_whole_labels(read_array(archive, labels, file), f"{file}, array {labels!r}") if labels else None
            )
            if classes is not None and classes.shape != (len(pixels),):
                raise ValueError(
                    f"{file}: array {labels!r} has the shape {classes.shape}; of {len(pixels)} images it is "
                    f"({len(pixels)},)"
                )
        pixels, classes = select_part(pixels, classes, start, stop)
        super().__init__(pixels, classes, names, caption, size, mode, fit, pixel_range)


def check_images(images: np.ndarray, name: str, pixel_range: list[float] | None) -> None:
    """Raise ValueError, with the `name` of the array, unless an array holds images of a known range of values."""
    is_known = images.dtype in (np.uint8, np.uint16) or (pixel_range is not None and images.dtype.kind in "uif")
    is_grey = images.ndim == 3 and images.shape[-1] > 4  # else it is a single picture with its channels
    if not is_known or not (is_grey or images.ndim == 4):
        raise ValueError(
            f"{name} is {images.dtype} of shape {images.shape}; images are uint8 or uint16 of (N, H, W, C), or of "
            "(N, H, W) where they are grey; for numbers of another type set data.train.pixel_range and "
            "data.holdout.pixel_range, the values that become black and white, such as [0, 1]"
        )


def select_part(
    images: np.ndarray, labels: np.ndarray | None, start: int, stop: int | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the images and labels from `start` to `stop` of a random order that depends on their number alone.

    The selected ones stay in the order of the array.
    """
    if start == 0 and stop is None:
        return images, labels
    numbers = np.sort(numpy_rng("arrays", len(images)).permutation(len(images))[start:stop])
    return images[numbers], None if labels is None else labels[numbers]


def check_npz(file: Path) -> None:
    """Raise ValueError, naming the format, for a file that is no .npz archive."""
    if file.is_dir():
        raise ValueError(f"{file} is a folder where an .npz archive is needed; of pictures in a folder: image_folder")
    if zipfile.is_zipfile(file):
        return
    with open(file, "rb") as stream:
        start = stream.read(8)
    kind, advice = "no known format (or damaged)", "an .npz is what numpy.savez writes; get the file again"
    for first, name, remedy in FORMATS:
        if start.startswith(first):
            kind, advice = name, remedy
            break
    raise ValueError(f"{file} is no .npz archive but {kind}; {advice}")


def read_array(archive: Any, name: str, file: Path) -> np.ndarray:
    """Return an array of an open .npz. Raises ValueError, naming both, where it cannot be read."""
    try:
        array: np.ndarray = archive[name]
        return array
    except ValueError as error:  # an array of objects
        raise ValueError(
            f"{file}: array {name!r} cannot be read: it is damaged, or holds pickled objects, which are never opened; "
            "save it as an array of numbers: images as uint8 of (N, H, W, C)"
        ) from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file}: array {name!r} is damaged ({error}); get the file again") from error


class Tiles(Arrays):
    """The square tiles of one lossless picture, row by row; their labels are digits in the text file <name>.labels.txt.

    The embedded samples are kept like this: a few megabytes, and a person can look at them.

    Args:
        path: the picture.
        tile: edge of a tile in pixels.
        start: number of the first tile that is used.
        stop: number after the last tile that is used; None for all.
        mode: RGB, or L for grey (pictures of sounds).
        names: see Arrays, as `caption`.
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
