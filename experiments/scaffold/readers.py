"""Chooses the reader of a folder or file by the endings of the files that are there."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.audio.sounds import EXTENSIONS as SOUNDS
from datamodules.readers.base import located
from datamodules.readers.folder import EXTENSIONS as PICTURES
from datamodules.readers.folder import files_below, list_endings
from datamodules.readers.medical import DicomSlices, NiftiSlices
from datamodules.readers.video import Frames


@dataclass(frozen=True)
class Reader:
    """A file of conf/data to begin with.

    Args:
        choice: its name.
        endings: endings of the files that it reads, in lower case.
        is_nested: whether its `path` is a field of `train`, not of the data set itself.
    """

    choice: str
    endings: Sequence[str]
    is_nested: bool = True


READERS = (
    Reader("image_folder", PICTURES, is_nested=False),
    Reader("sound_folder", SOUNDS, is_nested=False),
    Reader("shards", (".tar",), is_nested=False),
    Reader("idx", ("-ubyte", "-ubyte.gz")),
    Reader("npz", (".npz",)),
    Reader("parquet", (".parquet",)),
    Reader("lmdb", (".mdb",)),
    Reader("video_folder", Frames.extensions),
    Reader("nifti", NiftiSlices.extensions),
    Reader("dicom", DicomSlices.extensions),
)


def find_reader(path: str) -> Reader:
    """Return the reader of most files at a path. Raises ValueError where there are none that one reads."""
    place = located(path)
    names = [name.lower() for name in files_below(place)] if place.is_dir() else [place.name.lower()]
    counts = Counter({reader: sum(name.endswith(tuple(reader.endings)) for name in names) for reader in READERS})
    reader, count = counts.most_common(1)[0]
    if not count:
        endings = list_endings(Counter(Path(name).suffix or "no ending" for name in names))
        choices = ", ".join(reader.choice for reader in READERS)
        raise ValueError(
            f"--path={path} has no files that a reader knows; it has: {endings or 'none'}. The readers are: {choices}; "
            "without --path a class of your own is written"
        )
    return reader
