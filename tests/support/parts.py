"""Files that hold several samples each: videos, volumes and DICOM files."""

from pathlib import Path
from typing import Any

import av
import nibabel
import numpy as np
import pydicom
from pydicom.uid import ExplicitVRLittleEndian


def write_video(file: Path, frames: int = 12, first: int = 0) -> None:
    """A lossless video of 16x12 pixels with the number of the frame, times 10, in every pixel."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16, 12, "bgr0"
        for number in range(first, first + frames):
            picture = np.full((12, 16, 3), 10 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_volume(file: Path, seed: int = 0) -> np.ndarray:
    """A volume of 8x6x10 voxels with values from 0 to 4000, whose axes point right, to the front and up."""
    values = np.random.default_rng(seed).integers(0, 4001, (8, 6, 10)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), file)
    return values


def write_dicom(file: Path, values: np.ndarray, patient: str = "1", **fields: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = pydicom.Dataset()
    content.file_meta = pydicom.dataset.FileMetaDataset()
    content.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    content.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    content.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    content.PatientID, content.PhotometricInterpretation, content.SamplesPerPixel = patient, "MONOCHROME2", 1
    content.Rows, content.Columns = values.shape[-2:]
    if values.ndim == 3:
        content.NumberOfFrames = len(values)
    content.BitsAllocated = content.BitsStored = 16
    content.HighBit, content.PixelRepresentation = 15, 0
    content.PixelData = values.astype("<u2").tobytes()
    for name, value in fields.items():
        setattr(content, name, value)
    content.save_as(file, enforce_file_format=True)
