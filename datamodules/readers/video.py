"""Frames of videos as pictures, read by PyAV."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from datamodules.readers.base import BadSample, MissingData
from datamodules.readers.parts import INDEXED_FILES, FileParts, Version
from datamodules.readers.pictures import PictureForm


class Frames(FileParts):
    """Every n-th frame of every video in a folder and its subfolders; whole videos are held out.

    A frame is found by its time: a read begins at the key frame before it. The times of all frames are listed once,
    without decoding. Needs the extra `secateur[video]`.

    Args:
        path: see FileParts, as `classes`, `start`, `stop` (both count videos) and `get`.
        size: edge of the images in pixels.
        mode: RGB, or L for grey.
        every: every so many frames, one is a sample; the first frame is.
        fit: see PictureForm.
    """

    kind, group = "videos", "video"
    extensions = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m4v")

    def __init__(
        self,
        path: str,
        size: int,
        mode: str = "RGB",
        every: int = 10,
        classes: bool = True,
        fit: str = "crop",
        start: int = 0,
        stop: int | None = None,
        get: str | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"data.every={every} is out of range; choose 1 or more")
        import_av(path)
        self.every = every
        super().__init__(path, PictureForm(size, mode, fit), classes, start, stop, get)

    def index_file(self, file: Path, version: Version) -> tuple[str | None, Sequence[int]]:
        return None, list_times(file, version, self.every)

    def read_part(self, file: Path, part: int) -> Image.Image:
        with import_av(str(file)).open(str(file)) as container:
            stream = container.streams.video[0]
            container.seek(part, stream=stream)
            for frame in container.decode(stream):
                if frame.pts is not None and frame.pts >= part:
                    image: Image.Image = frame.to_image()
                    return image
        raise BadSample("the video ends before this frame")


@functools.lru_cache(INDEXED_FILES)
def list_times(file: Path, version: Version, every: int) -> tuple[int, ...]:
    """Return the time of every n-th frame of a video, in units of its stream."""
    with import_av(str(file)).open(str(file)) as container:
        times = sorted(p.pts for p in container.demux(container.streams.video[0]) if p.pts is not None)
    return tuple(times[::every])


def import_av(path: str) -> Any:
    """Return the package that reads videos, an optional extra."""
    try:
        import av  # noqa: PLC0415
    except ImportError as error:
        raise MissingData(f"{path} needs the reader of videos: pip install -e '.[video]'") from error
    return av
