"""Where images come from: each source is a sized collection that gives a batch of uint8 (N,H,W,C) arrays and labels.

A data set is one YAML file that names one of these as `_target_`; see conf/data/ for examples.
"""

import json
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from datamodules.seeding import numpy_rng

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class MissingData(FileNotFoundError):
    """Data or weights that are not on this machine; the message says what to get and how."""


Record = dict[str, Any]
"""uint8 "image" (N,H,W,C) and int64 "label" (N,), -1 where there is none; where known also "caption" (a list), and
"original_size" (height, width) and "crop" (top, left, in pixels of the resized picture), int64 (N,2)."""


class Source(Protocol):
    captions: list[str] | None
    """of all samples, where the source has captions"""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> Record:
        """Some samples, in this order."""
        ...


def data_root() -> Path:
    """$SECATEUR_DATA, by default ~/.cache/secateur: where local copies of public data and weights are looked for."""
    return Path(os.environ.get("SECATEUR_DATA", "~/.cache/secateur")).expanduser()


class Arrays:
    """Images held in memory: the common end of every source small enough for it."""

    captions = None

    def __init__(self, images: np.ndarray, labels: np.ndarray | None = None) -> None:
        self.images = images
        self.labels = np.full(len(images), -1, np.int64) if labels is None else labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray) -> Record:
        return {"image": self.images[indices], "label": self.labels[indices]}


class Npz(Arrays):
    """An .npz file with one uint8 array (N,H,W,C) of images and, optionally, one of labels.

    A relative `path` is looked up in $SECATEUR_DATA. Raises MissingData where the file is not, ValueError where a
    key is not in it.
    """

    def __init__(self, path: str, images: str, labels: str | None = None) -> None:
        file = Path(path).expanduser() if Path(path).expanduser().is_absolute() else data_root() / path
        if not file.exists():
            raise MissingData(
                f"{file} does not exist: put the file there, or set $SECATEUR_DATA to the folder it is in"
            )
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
            super().__init__(pixels, archive[labels] if labels else None)


class Tiles(Arrays):
    """One lossless picture cut into square tiles, row by row, with labels in a text file of digits beside it.

    The embedded sample of CIFAR-10 is kept like this: a few megabytes, and a person can open it.
    """

    def __init__(self, path: str, tile: int, start: int = 0, stop: int | None = None) -> None:
        if not Path(path).exists():
            raise MissingData(f"{path} does not exist; it comes with the repository (assets/)")
        sheet = np.asarray(Image.open(path).convert("RGB"))
        rows, columns = sheet.shape[0] // tile, sheet.shape[1] // tile
        tiles = sheet.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
        digits = Path(path).with_suffix(".labels.txt").read_text().strip()
        super().__init__(tiles[start:stop], np.array([int(digit) for digit in digits], np.int64)[start:stop])


class Folder:
    """Every picture below a folder, decoded when asked for, centre-cropped and resized to `size`.

    They are shuffled once, as a function of their number alone, so that [start, stop) holds of every subfolder its
    share. The label is the place of a picture's own folder among all such folders, in alphabetical order. `captions`
    is `txt` (a file of the same name beside each picture) or the name of a .jsonl file in the folder, with one
    {"file_name": ..., "text": ...} a line. Raises MissingData where the folder is not, and ValueError naming a picture
    without a caption.
    """

    def __init__(
        self,
        path: str,
        size: int,
        mode: str = "RGB",
        start: int = 0,
        stop: int | None = None,
        captions: str | None = None,
    ) -> None:
        root = Path(path).expanduser()
        if not root.is_dir():
            raise MissingData(f"{root} is not a folder: `path` names the folder that holds the pictures")
        files = sorted(file for file in root.rglob("*") if file.suffix.lower() in EXTENSIONS)
        parents = sorted({file.parent for file in files})
        order = numpy_rng("folder", len(files)).permutation(len(files))[start:stop]
        self.files = [files[i] for i in order]
        self.labels = np.array([parents.index(file.parent) for file in self.files], np.int64)
        self.size, self.mode = size, mode
        self.captions = None if captions is None else captions_of(root, self.files, captions)

    def __len__(self) -> int:
        return len(self.files)

    def take(self, indices: np.ndarray) -> Record:
        record = squares([Image.open(self.files[index]) for index in indices], self.size, self.mode)
        record["label"] = self.labels[indices]
        return record if self.captions is None else record | {"caption": [self.captions[i] for i in indices]}


def captions_of(root: Path, files: list[Path], captions: str) -> list[str]:
    """The caption of each picture; see Folder."""
    if captions == "txt":
        texts = {file: file.with_suffix(".txt") for file in files}
        found = {file: text.read_text().strip() for file, text in texts.items() if text.exists()}
    else:
        if not (root / captions).exists():
            raise MissingData(
                f"data.captions={captions!r}: {root / captions} does not exist; choose txt or a .jsonl file"
            )
        lines = (root / captions).read_text(encoding="utf-8").split("\n")  # splitlines would split captions, too
        found = dict(captioned(root / captions, number, line) for number, line in enumerate(lines, 1) if line.strip())
    for file in files:
        if file not in found:
            raise ValueError(f"{file} has no caption (data.captions={captions!r})")
    return [found[file] for file in files]


def captioned(file: Path, number: int, line: str) -> tuple[Path, str]:
    """The picture and the caption of one line of a .jsonl file."""
    try:
        entry = json.loads(line)
        return file.parent / entry["file_name"], entry["text"].strip()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{file}, line {number} is not {{"file_name": ..., "text": ...}}: {line[:80]}') from error


class HuggingFace:
    """A split of a data set on the Hugging Face hub (or of a local copy), decoded when asked for.

    Needs the extra `secateur[hf]`. Raises ValueError for an unknown column, listing those there are, and
    MissingData where neither a network nor a cached copy is at hand.
    """

    def __init__(
        self,
        path: str,
        split: str,
        image: str,
        label: str | None,
        size: int,
        mode: str = "RGB",
        caption: str | None = None,
    ) -> None:
        try:
            import datasets  # noqa: PLC0415  an optional extra
        except ImportError as error:
            raise MissingData(f"data set {path!r} needs the Hugging Face reader: pip install -e '.[hf]'") from error
        try:
            self.table = datasets.load_dataset(path, split=split)
        except Exception as error:
            if isinstance(error, ValueError) and "split" in str(error).lower():
                raise
            raise MissingData(
                f"data set {path!r} ({split}) could be read neither from the hub nor from a cache "
                f"({type(error).__name__}: {error}); download it where there is a network, or give a local copy"
            ) from error
        for column in filter(None, (image, label, caption)):
            if column not in self.table.column_names:
                raise ValueError(f"{path} has no column {column!r}; it has: {', '.join(self.table.column_names)}")
        self.image, self.label, self.size, self.mode = image, label, size, mode
        self.captions = None if caption is None else list(self.table[caption])
        for text in self.captions or []:
            if not isinstance(text, str):
                raise ValueError(f"{path}: column {caption!r} has a {type(text).__name__} where a caption is text")

    def __len__(self) -> int:
        return len(self.table)

    def take(self, indices: np.ndarray) -> Record:
        rows = self.table[[int(index) for index in indices]]
        record = squares(rows[self.image], self.size, self.mode)
        record["label"] = np.array(rows[self.label], np.int64) if self.label else np.full(len(indices), -1, np.int64)
        return record if self.captions is None else record | {"caption": [self.captions[int(i)] for i in indices]}


def squares(images: list[Image.Image], size: int, mode: str) -> Record:
    """Pictures as `square` makes them, with the sizes they had and where they were cut."""
    sizes = np.array([(image.height, image.width) for image in images], np.int64)
    corners = (sizes - sizes.min(1, keepdims=True)) // 2 * size // sizes.min(1, keepdims=True)
    return {
        "image": np.stack([square(image, size, mode) for image in images]),
        "original_size": sizes,
        "crop": corners,
    }


def square(image: Image.Image, size: int, mode: str) -> np.ndarray:
    """Centre crop to a square, resize with an antialiasing filter: uint8 (size,size,C)."""
    if image.mode.startswith("I;16"):  # PIL would clip 16 bits to 8 instead of scaling them
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    image = image.convert(mode)
    if image.size != (size, size):
        edge = min(image.size)
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        image = image.crop((left, top, left + edge, top + edge)).resize((size, size), Image.Resampling.LANCZOS)
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def first_available(**sources: object) -> Source:
    """The first of several places that has the data (`_partial_: true` on each); else one error naming them all."""
    tried = []
    for name, make in sources.items():
        try:
            return make()  # type: ignore[operator]
        except MissingData as error:
            tried.append(f"  {name}: {error}")
    raise MissingData("the data are in none of these places:\n" + "\n".join(tried))
