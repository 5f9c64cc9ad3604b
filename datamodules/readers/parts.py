"""Files that hold several samples each: the frames of a video, the slices of a volume."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from datamodules.readers.base import BadSample, ListedSource, MissingData, Record, located, name_bad_sample
from datamodules.readers.folder import describe_no_samples, file_size, files_below, number_classes, sort_others
from datamodules.readers.pictures import PictureForm
from datamodules.seeding import numpy_rng

INDEXED_FILES = 2**18
"""Files whose index a process keeps for the next reader of the same folder: a few hundred MB of memory at most."""

Version = tuple[int, int]
"""Size in bytes and time of the last change in ns of a file."""


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
        self.passed_over, self.dangling_links = sort_others(self.root, set(names) - set(self.files))
        if not self.files:
            raise MissingData(describe_no_samples(self, self.root, self.kind, self.extensions))
        self.unreadable: dict[int, str] = {}
        groups: dict[str, list[tuple[int, int]]] = {}
        for number in tqdm(range(len(self.files)), desc=f"index of {self.kind}", leave=False, disable=None):
            group, parts = self.try_to_index(number)
            groups.setdefault(group, []).extend((number, part) for part in parts)
        names = list(groups)
        chosen = [names[i] for i in numpy_rng("parts", len(names)).permutation(len(names))[start:stop]]
        self.parts = np.array([part for name in chosen for part in groups[name]], np.int64).reshape(-1, 2)
        if not len(self.parts):
            chosen_range = f"from number {start} on{'' if stop is None else f' and before number {stop}'}"
            raise ValueError(
                f"{self.root} has {len(groups)} {self.group}{'s' * (len(groups) != 1)}, and none is left "
                f"{chosen_range}; hold out at least one {self.group}, and fewer than all (data.train.start)"
            )
        self.labels = np.full(len(self.parts), -1, np.int64)
        if classes:
            folders = [name.rpartition("/")[0] for name in self.files]
            numbers = number_classes(set(folders), None)
            self.class_names = [name or "(no folder)" for name in numbers]
            self.labels = np.array([numbers[folders[file]] for file, _ in self.parts], np.int64)

    # What subclasses define

    def index_file(self, file: Path, version: Version) -> tuple[str | None, Sequence[int]]:
        """Return the group of a file, None for one of its own, and numbers of its parts. May raise any error.

        What is read of the file is kept by (file, version): a job makes several readers of the same folder.
        """
        raise NotImplementedError

    def read_part(self, file: Path, part: int) -> Image.Image:
        """Return a part of a file as a picture. May raise any error."""
        raise NotImplementedError

    # The interface of all readers

    def is_sample(self, name: str) -> bool:
        """Return whether the file of this name, relative to the folder, is one of those that are read."""
        return name.lower().endswith(tuple(self.extensions))

    def try_to_index(self, number: int) -> tuple[str, Sequence[int]]:
        """Return the group and the parts of a file; one that cannot be indexed is a single sample, a bad one."""
        file = self.root / self.files[number]
        try:
            status = file.stat()
            group, parts = self.index_file(file, (status.st_size, status.st_mtime_ns))
        except Exception as error:  # libraries raise almost any type for damaged files
            self.unreadable[number] = f"{type(error).__name__}: {error}"
            group, parts = None, [0]
        return self.files[number] if group is None else group, parts

    def __len__(self) -> int:
        return len(self.parts)

    def name(self, index: int) -> str:
        file, part = self.parts[index]
        return f"{self.files[file]}, number {part}"

    def read(self, index: int) -> Image.Image:
        """Return a sample as a picture. May raise any error; BadSample for a file that could not be indexed."""
        file, part = self.parts[index]
        if int(file) in self.unreadable:
            raise BadSample(f"the file is damaged: {self.unreadable[int(file)]}")
        return self.read_part(self.root / self.files[file], int(part))

    def read_or_name(self, index: int) -> Image.Image:
        """Return a sample as a picture. Raises BadSample, with its name and the reason."""
        try:
            return self.read(index)
        except Exception as error:
            raise name_bad_sample(self.name(index), error) from error

    def raw(self, index: int) -> bytes:
        return self.read_or_name(index).tobytes()

    def describe_sample(self, index: int) -> str:
        image = self.read_or_name(index)
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
