"""Slices of medical scans as pictures: volumes in NIfTI files, and DICOM files."""

import functools
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from datamodules.readers.base import BadSample, MissingData
from datamodules.readers.parts import INDEXED_FILES, FileParts, Version
from datamodules.readers.pictures import PictureForm, check_pixel_range, scale_values

PLANES = ("sagittal", "coronal", "axial")
"""Planes of slices, in the order of the axes of a volume whose axes point right, to the front and up."""
PERCENTILES = (0.5, 99.5)
"""Percentiles of a volume's values that become black and white: a few very bright voxels do not darken the rest."""
KEPT_BYTES = 2**28
"""Bytes of volumes that a process keeps in memory, as each slice would else cost the reading of a volume."""
DICOM_MARK = b"DICM"
"""What a DICOM file has after its first 128 bytes."""
GREY = ("MONOCHROME1", "MONOCHROME2")
"""Photometric interpretations of DICOM's grey pictures."""
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
"""Photometric interpretations that pydicom decodes to RGB."""


class NiftiSlices(FileParts):
    """Slices of the volumes in a folder and its subfolders (.nii, .nii.gz, .mgz); whole volumes are held out.

    Volumes are turned so that their axes point right, to the front and up; slices are shown with the front, or the
    head, at the top. Voxels are taken as squares. Of a series of volumes in one file the first is used. Needs the extra
    `secateur[medical]`.

    Args:
        path: see FileParts, as `classes`, `start`, `stop` (both count volumes) and `get`.
        size: edge of the images in pixels.
        mode: L for grey, or RGB with three equal channels.
        plane: axial, coronal or sagittal.
        part: (first, last) of the slices of each volume, as fractions of their number; slices near 0 and 1 are often
            empty.
        pixel_range: values that become black and white; None takes the PERCENTILES of each volume.
        fit: see PictureForm.
    """

    kind, group = "volumes", "volume"
    extensions = (".nii", ".nii.gz", ".mgz", ".mgh")

    def __init__(
        self,
        path: str,
        size: int,
        mode: str = "L",
        plane: str = "axial",
        part: list[float] | None = None,
        pixel_range: list[float] | None = None,
        classes: bool = False,
        fit: str = "crop",
        start: int = 0,
        stop: int | None = None,
        get: str | None = None,
    ) -> None:
        if plane not in PLANES:
            raise ValueError(f"data.plane={plane!r} is unknown; choose one of: {', '.join(PLANES)}")
        first, last = part or (0.0, 1.0)
        if not 0 <= first < last <= 1:
            raise ValueError(f"data.part={part} is out of range; choose two fractions in ascending order, 0 to 1")
        check_pixel_range(pixel_range)
        import_reader("nibabel", path)
        self.axis, self.first, self.last, self.pixel_range = PLANES.index(plane), first, last, pixel_range
        self.volumes: dict[Path, np.ndarray] = {}
        super().__init__(path, PictureForm(size, mode, fit), classes, start, stop, get)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"volumes": {}}

    def index_file(self, file: Path, version: Version) -> tuple[str | None, Sequence[int]]:
        count = count_slices(file, version)[self.axis]
        return None, range(int(self.first * count), max(int(self.first * count) + 1, int(self.last * count)))

    def read_part(self, file: Path, part: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(np.rot90(self.volume(file).take(part, self.axis))))

    def volume(self, file: Path) -> np.ndarray:
        """Return a volume, turned and in 8 bits, from memory where it is kept."""
        if file not in self.volumes:
            nibabel = import_reader("nibabel", str(file))
            image = nibabel.load(file)
            image = image.slicer[(..., *[0] * (image.ndim - 3))] if image.ndim > 3 else image
            values = np.asarray(nibabel.as_closest_canonical(image).dataobj, np.float32)
            if not np.isfinite(values).all():
                raise BadSample("the volume has values that are not finite numbers")
            low, high = self.pixel_range or np.percentile(values, PERCENTILES)
            volume = scale_values(values, float(low), max(float(high), float(low) + 1e-6))
            while self.volumes and sum(kept.nbytes for kept in self.volumes.values()) + volume.nbytes > KEPT_BYTES:
                self.volumes.pop(next(iter(self.volumes)))
            self.volumes[file] = volume
        return self.volumes[file]


class DicomSlices(FileParts):
    """The pictures of all DICOM files in a folder and its subfolders; whole patients are held out.

    A file belongs to the patient whose id it has, or without one to its folder. Its values are those of its modality
    (such as Hounsfield units), or its colours as RGB, also those of a palette. Compressed files may need a decoder of
    pydicom's: `pip install pylibjpeg[all]`. Needs the extra `secateur[medical]`.

    Args:
        path: see FileParts, as `classes`, `start`, `stop` (both count patients) and `get`.
        size: edge of the images in pixels.
        mode: L for grey, or RGB with three equal channels.
        pixel_range: values that become black and white; None takes the window that a file names, or else the range of
            its own values.
        fit: see PictureForm.
    """

    kind, group = "DICOM files", "patient"
    extensions = (".dcm", ".dicom", ".ima")

    def __init__(
        self,
        path: str,
        size: int,
        mode: str = "L",
        pixel_range: list[float] | None = None,
        classes: bool = False,
        fit: str = "crop",
        start: int = 0,
        stop: int | None = None,
        get: str | None = None,
    ) -> None:
        check_pixel_range(pixel_range)
        import_reader("pydicom", path)
        self.pixel_range = pixel_range
        super().__init__(path, PictureForm(size, mode, fit), classes, start, stop, get)

    def is_sample(self, name: str) -> bool:
        return super().is_sample(name) or (not PurePath(name).suffix and has_dicom_mark(self.root / name))

    def index_file(self, file: Path, version: Version) -> tuple[str | None, Sequence[int]]:
        patient, count = read_header(file, version)
        return patient or str(file.parent), range(count)

    def read_part(self, file: Path, part: int) -> Image.Image:
        pydicom = import_reader("pydicom", str(file))
        content = pydicom.dcmread(file)
        colours = content.PhotometricInterpretation
        if colours not in (*GREY, *COLOURS, "PALETTE COLOR"):
            raise BadSample(f"its PhotometricInterpretation {colours} is not read; convert it to RGB")
        values = pydicom.pixels.pixel_array(content, index=part)
        if colours in COLOURS:
            return Image.fromarray(values)
        if colours == "PALETTE COLOR":
            bits = content.RedPaletteColorLookupTableDescriptor[2]
            rgb = pydicom.pixels.apply_color_lut(values, content)[..., :3]
            return Image.fromarray(scale_values(rgb, 0, 2**bits - 1))
        values = np.asarray(pydicom.pixels.apply_modality_lut(values, content), np.float64)
        low, high = self.pixel_range or find_window(content) or (values.min(), values.max())
        picture = scale_values(values, low, max(high, low + 1e-6))
        return Image.fromarray(255 - picture if colours == "MONOCHROME1" else picture)


@functools.lru_cache(INDEXED_FILES)
def count_slices(file: Path, version: Version) -> list[int]:
    """Return the number of slices of a volume in each of PLANES."""
    nibabel = import_reader("nibabel", str(file))
    image = nibabel.load(file)
    axes = nibabel.io_orientation(image.affine)[:, 0].tolist()
    return [image.shape[axes.index(axis)] for axis in range(len(PLANES))]


@functools.lru_cache(INDEXED_FILES)
def read_header(file: Path, version: Version) -> tuple[str, int]:
    """Return the id of a DICOM file's patient, empty where it has none, and the number of its frames."""
    header = import_reader("pydicom", str(file)).dcmread(file, stop_before_pixels=True)
    return str(header.get("PatientID") or ""), int(header.get("NumberOfFrames") or 1)


def has_dicom_mark(file: Path) -> bool:
    """Return whether a file is a DICOM file by its content."""
    with open(file, "rb") as content:
        return content.read(132)[128:] == DICOM_MARK


def find_window(content: Any) -> tuple[float, float] | None:
    """Return the lowest and highest value of the first window that a DICOM file names (PS3.3 C.11.2); None without."""
    if content.get("WindowCenter") is None or content.get("WindowWidth") is None:
        return None
    centre, width = (float(np.atleast_1d(content[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    return centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2


def import_reader(package: str, path: str) -> Any:
    """Return a package that reads medical scans, an optional extra. Raises MissingData where it is not installed."""
    try:
        if package == "nibabel":
            import nibabel  # noqa: PLC0415

            return nibabel
        import pydicom.pixels  # noqa: PLC0415
    except ImportError as error:
        raise MissingData(f"{path} needs the reader {package}: pip install -e '.[medical]'") from error
    return pydicom
