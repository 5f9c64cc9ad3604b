"""Files that hold several samples each: the frames of a video, the slices of a volume."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from datamodules.readers.base import BadSample, ListedSource, MissingData, Record, located
from datamodules.readers.folder import count_endings, describe_no_samples, file_size, files_below, number_classes
from datamodules.readers.pictures import PictureForm
from datamodules.seeding import numpy_rng


class FileParts(ListedSource):
    """The parts of all files in a folder and its subfolders, read when they are taken.

    Parts of one file are almost alike, so that training and held-out samples must not share a file. Files are in
    groups (of one file each, unless a subclass knows better), groups are shuffled once, as a function of their number
    alone, and `start` and `stop` count groups. Subclasses define `kind`, `extensions`, `index_file` and `read_part`.

    Args:
        path: the folder; a relative one is looked up in $SECATEUR_DATA, too.
        form: the form that all parts are brought into.
        classes: whether the folder of a file is its class; else samples have no labels.
        start: number of the first group that is used, in the shuffled order.
        stop: number after the last group that is used; None for all.
        get: how to get the data, for the message where they are missing.

    Raises:
        MissingData: the folder does not exist, or has no such files.
        ValueError: no group is left.
        BadSample: (from `take`) a part cannot be used.
    """

    kind = "files"
    """What the files are, in the plural, for messages."""
    group = "file"
    """What must not be divided between training and held-out samples, for messages."""
    extensions: Sequence[str] = ()
    """Endings of the files, in lower case."""
    captions = None

    def __init__(
        self, path: str, form: PictureForm, classes: bool, start: int, stop: int | None, get: str | None
    ) -> None:
        self.root, self.form = located(path, get), form
        if not self.root.is_dir():
            raise MissingData(f"{self.root} is not a folder: `path` names the folder that holds the {self.kind}")
        names = list(files_below(self.root))
        self.files = sorted((name for name in names if self.is_sample(name)), key=lambda name: name.split("/"))
        self.passed_over = count_endings(set(names) - set(self.files))
        if not self.files:
            raise MissingData(describe_no_samples(self.root, self.kind, self.extensions, self.passed_over))
        groups: dict[str, list[tuple[int, int]]] = {}
        for number, name in enumerate(tqdm(self.files, desc=f"index of {self.kind}", leave=False, disable=None)):
            group, parts = self.try_to_index(name)
            groups.setdefault(group, []).extend((number, part) for part in parts)
        names = list(groups)
        chosen = [names[i] for i in numpy_rng("parts", len(names)).permutation(len(names))[start:stop]]
        self.parts = np.array([part for name in chosen for part in groups[name]], np.int64).reshape(-1, 2)
        if not len(self.parts):
            raise ValueError(
                f"{self.root} has {len(self.files)} {self.kind} of {len(groups)} {self.group}s, and no sample is left "
                f"from number {start}{'' if stop is None else f' to {stop}'} on; hold out fewer (data.train.start), at "
                f"least one {self.group} and not all"
            )
        self.labels = np.full(len(self.parts), -1, np.int64)
        if classes:
            folders = [name.rpartition("/")[0] for name in self.files]
            numbers = number_classes(set(folders), None)
            self.class_names = [name or "(no folder)" for name in numbers]
            self.labels = np.array([numbers[folders[file]] for file, _ in self.parts], np.int64)

    # What subclasses define

    def index_file(self, file: Path) -> tuple[str | None, Sequence[int]]:
        """Return the group of a file, None for one of its own, and numbers of its parts. May raise any error."""
        raise NotImplementedError

    def read_part(self, file: Path, part: int) -> Image.Image:
        """Return a part of a file as a picture. May raise any error."""
        raise NotImplementedError

    # The interface of all readers

    def is_sample(self, name: str) -> bool:
        """Return whether the file of this name, relative to the folder, is one of those that are read."""
        return name.lower().endswith(tuple(self.extensions))

    def try_to_index(self, name: str) -> tuple[str, Sequence[int]]:
        """Return the group and the parts of a file; one that cannot be opened is a single sample, a bad one."""
        try:
            group, parts = self.index_file(self.root / name)
        except Exception:  # libraries raise almost any type for damaged files; `take` names it
            group, parts = None, [0]
        return name if group is None else group, parts

    def __len__(self) -> int:
        return len(self.parts)

    def name(self, index: int) -> str:
        file, part = self.parts[index]
        return f"{self.files[file]}, number {part}"

    def read(self, index: int) -> Image.Image:
        """Return a sample as a picture."""
        file, part = self.parts[index]
        return self.read_part(self.root / self.files[file], int(part))

    def raw(self, index: int) -> bytes:
        try:
            return self.read(index).tobytes()
        except Exception as error:
            raise BadSample(f"{self.name(index)} cannot be used: {type(error).__name__}: {error}") from error

    def describe_sample(self, index: int) -> str:
        try:
            image = self.read(index)
        except Exception as error:
            raise BadSample(f"{self.name(index)} cannot be used: {type(error).__name__}: {error}") from error
        return f"{Path(self.files[self.parts[index, 0]]).suffix[1:]}, {image.mode}, {image.width}x{image.height}"

    def find_stored_range(self, index: int) -> tuple[float, float] | None:
        return None  # `read_part` has scaled the values already

    def listing(self) -> bytes:
        sizes = np.array([file_size(self.root / name) for name in self.files], np.int64)
        names = "\n".join(self.files).encode("utf-8", "surrogateescape")
        return names + sizes.tobytes() + self.parts.tobytes() + self.labels.tobytes()

    def take(self, indices: np.ndarray) -> Record:
        pictures = ((str(self.root / self.name(int(i))), functools.partial(self.read, int(i))) for i in indices)
        return self.form.decode(pictures) | {"label": self.labels[indices]}
