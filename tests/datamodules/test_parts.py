"""Readers of files that hold several samples each: frames of videos, slices of scans."""

import os
from pathlib import Path

import av
import nibabel
import numpy as np
import pydicom
import pytest
from support.parts import write_dicom, write_video, write_volume

from datamodules.inventory import read_content
from datamodules.readers import video
from datamodules.readers.base import BadSample, MissingData
from datamodules.readers.medical import DicomSlices, NiftiSlices
from datamodules.readers.video import Frames

# Videos


def test_frames_of_a_video_are_found_by_their_number(tmp_path):
    write_video(tmp_path / "a" / "1.mkv")
    source = Frames(str(tmp_path), 8, every=3)
    assert len(source) == 4
    record = source.take(np.array([3, 1, 0, 2]))
    assert record["image"][:, 0, 0, 0].tolist() == [90, 30, 0, 60] and record["original_size"][0].tolist() == [12, 16]


def test_whole_videos_are_held_out_and_folders_are_classes(tmp_path):
    for number in range(4):
        write_video(tmp_path / "ab"[number % 2] / f"{number}.mkv", frames=5, first=5 * number)
    parts = [Frames(str(tmp_path), 8, every=1, start=start, stop=stop) for start, stop in ((1, None), (0, 1))]
    numbers = [set((part.take(np.arange(len(part)))["image"][:, 0, 0, 0] // 50).tolist()) for part in parts]
    assert len(numbers[1]) == 1 and numbers[0] | numbers[1] == {0, 1, 2, 3} and not numbers[0] & numbers[1]
    assert list(parts[0].class_names) == ["a", "b"] and set(parts[0].labels.tolist()) == {0, 1}


def test_a_damaged_video_is_a_bad_sample_with_its_name(tmp_path):
    write_video(tmp_path / "1.mkv", frames=2)
    (tmp_path / "2.mp4").write_bytes(b"no video")
    source = Frames(str(tmp_path), 8, every=1)
    (bad,) = [index for index in range(len(source)) if source.name(index).startswith("2.mp4")]
    with pytest.raises(BadSample, match=r"2\.mp4, number 0 cannot be used: the file is damaged: InvalidDataError"):
        source.take(np.array([bad]))


def test_a_video_whose_frames_cannot_be_listed_is_bad_as_a_whole(tmp_path, monkeypatch):
    """Else its first frame would stand for all of them, and nothing would tell."""

    def fail(*arguments: object) -> None:
        raise OSError("cut off")

    write_video(tmp_path / "1.mkv")
    monkeypatch.setattr(video, "list_times", fail)
    source = Frames(str(tmp_path), 8)
    assert len(source) == 1 and source.read_part(tmp_path / "1.mkv", 0).size == (16, 12)
    for read in (source.raw, source.describe_sample, lambda index: source.take(np.array([index]))):
        with pytest.raises(BadSample, match=r"1\.mkv, number 0 cannot be used: the file is damaged: OSError: cut off$"):
            read(0)
    assert read_content(source, 0) == b""


def write_scan(file: Path) -> None:
    write_dicom(file, np.full((4, 4), 1), patient=file.stem)


@pytest.mark.parametrize(
    ("reader", "write", "ending", "package", "function"),
    [
        (Frames, write_video, "mkv", av, "open"),
        (NiftiSlices, write_volume, "nii", nibabel, "load"),
        (DicomSlices, write_scan, "dcm", pydicom, "dcmread"),
    ],
)
def test_a_file_is_indexed_once_per_process(tmp_path, monkeypatch, reader, write, ending, package, function):
    """Training samples, held-out ones and later jobs share the index, until the file changes."""
    files = [tmp_path / name / f"{name}.{ending}" for name in "abc"]
    for file in files:
        file.parent.mkdir()
        write(file)
    calls, call = [], getattr(package, function)
    monkeypatch.setattr(package, function, lambda file, **options: calls.append(str(file)) or call(file, **options))
    listings = [reader(str(tmp_path), 4, start=start, stop=stop).listing() for start, stop in ((1, None), (0, 1))]
    assert calls == list(map(str, files))
    assert reader(str(tmp_path), 4, start=1).listing() == listings[0] and len(calls) == 3
    os.utime(files[1], ns=(1, 1))
    reader(str(tmp_path), 4)
    assert calls[3:] == [str(files[1])]


def test_a_single_video_cannot_be_held_out_from(tmp_path):
    write_video(tmp_path / "1.mkv")
    with pytest.raises(ValueError, match=r"has 1 video, and none is left from number 1 on; hold out at least one"):
        Frames(str(tmp_path), 8, start=1)


# Scans


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_slices_of_a_volume_have_the_front_or_the_head_at_the_top(tmp_path, plane):
    values = write_volume(tmp_path / "a.nii.gz")
    source = NiftiSlices(str(tmp_path), 8, plane=plane, pixel_range=[0, 4000], fit="stretch")
    axis = ("sagittal", "coronal", "axial").index(plane)
    assert len(source) == values.shape[axis]
    shown = np.asarray(source.read(2))
    expected = np.flip(values.take(2, axis).T, 0)
    assert (shown == np.round(expected / (4000 / 255)).astype(np.uint8)).all()


def test_a_volume_of_another_orientation_gives_the_same_slices(tmp_path):
    values = write_volume(tmp_path / "a.nii")
    turned = nibabel.Nifti1Image(values.transpose(2, 0, 1)[:, ::-1], np.eye(4)[[1, 2, 0, 3]] * [[-1], [1], [1], [1]])
    nibabel.save(turned, tmp_path / "b.nii")
    source = NiftiSlices(str(tmp_path), 8, part=[0.2, 0.8])
    assert len(source) == 12
    slices = {source.name(index): np.asarray(source.read(index)) for index in range(12)}
    for number in range(2, 8):
        assert (slices[f"a.nii, number {number}"] == slices[f"b.nii, number {number}"]).all()


def test_percentiles_of_a_volume_become_black_and_white(tmp_path):
    values = np.zeros((10, 10, 10), np.float32)
    values[5:] = 1
    values[9, 9, 9] = 1000  # one voxel does not darken the rest
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii")
    assert set(np.asarray(NiftiSlices(str(tmp_path), 10).read(0)).ravel().tolist()) == {0, 255}


def test_dicom_files_use_their_window_and_whole_patients_are_held_out(tmp_path):
    for number in range(6):
        write_dicom(
            tmp_path / f"{number}.dcm",
            np.full((4, 4), 1000 + number),
            patient=str(number // 2),
            RescaleSlope=1,
            RescaleIntercept=-1000,
            WindowCenter=3,
            WindowWidth=6,
        )
    source = DicomSlices(str(tmp_path), 4)
    values = {source.name(index)[0]: int(source.take(np.array([index]))["image"].max()) for index in range(6)}
    assert values == {str(number): round(number * 255 / 5) for number in range(6)}
    held, rest = (DicomSlices(str(tmp_path), 4, start=start, stop=stop) for start, stop in ((0, 1), (1, None)))
    patients = [{int(part.name(index)[0]) // 2 for index in range(len(part))} for part in (held, rest)]
    assert len(patients[0]) == 1 and patients[0] | patients[1] == {0, 1, 2} and not patients[0] & patients[1]


def test_dicom_frames_inversion_and_range(tmp_path):
    frames = np.arange(3)[:, None, None] * np.full((1, 4, 4), 100)
    write_dicom(tmp_path / "no ending", frames, PhotometricInterpretation="MONOCHROME1")
    source = DicomSlices(str(tmp_path), 4, pixel_range=[0, 200])
    assert [int(source.take(np.array([index]))["image"].max()) for index in range(3)] == [255, 127, 0]


def write_colours(file: Path, values: np.ndarray, colours: str, **fields: object) -> None:
    """A DICOM file of 8 bits per channel."""
    bits = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": values.astype(np.uint8).tobytes()}
    if values.ndim == 3:
        bits |= {"SamplesPerPixel": 3, "PlanarConfiguration": 0}
    write_dicom(
        file, values[:, :, 0] if values.ndim == 3 else values, PhotometricInterpretation=colours, **bits, **fields
    )


@pytest.mark.parametrize(
    ("bits", "table"), [(8, bytes([0, 200, 255, 7])), (16, np.uint16([0, 51400, 65535, 1799]).tobytes())]
)
def test_dicom_colours_of_a_palette_are_shown(tmp_path, bits, table):
    fields: dict[str, object] = {}
    for number, name in enumerate(("Red", "Green", "Blue")):
        fields[f"{name}PaletteColorLookupTableDescriptor"] = [4, 0, bits]
        fields[f"{name}PaletteColorLookupTableData"] = table[number * bits // 8 :] + table[: number * bits // 8]
    write_colours(tmp_path / "a.dcm", np.arange(16).reshape(4, 4) % 4, "PALETTE COLOR", **fields)
    image = DicomSlices(str(tmp_path), 4, mode="RGB").take(np.array([0]))["image"]
    assert image[0, 0].tolist() == [[0, 200, 255], [200, 255, 7], [255, 7, 0], [7, 0, 200]]


@pytest.mark.parametrize(("colours", "stored"), [("RGB", (255, 0, 0)), ("YBR_FULL", (76, 85, 255))])
def test_dicom_colours_are_shown_as_rgb(tmp_path, colours, stored):
    write_colours(tmp_path / "a.dcm", np.tile(np.uint8(stored), (4, 4, 1)), colours)
    image = DicomSlices(str(tmp_path), 4, mode="RGB").take(np.array([0]))["image"]
    assert np.abs(image.astype(int) - [255, 0, 0]).max() <= 1


@pytest.mark.parametrize("colours", ["YBR_PARTIAL_420", "HSV"])
def test_dicom_colours_that_are_not_read_are_named(tmp_path, colours):
    write_colours(tmp_path / "a.dcm", np.zeros((4, 4, 3)), colours)
    with pytest.raises(
        BadSample, match=f"a.dcm, number 0 cannot be used: its PhotometricInterpretation {colours} is not"
    ):
        DicomSlices(str(tmp_path), 4).take(np.array([0]))


@pytest.mark.parametrize(("reader", "name"), [(NiftiSlices, "a.nii"), (DicomSlices, "a.dcm")])
def test_a_damaged_scan_is_a_bad_sample_with_its_name(tmp_path, reader, name):
    (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(BadSample, match=rf"{name}, number 0 cannot be used: "):
        reader(str(tmp_path), 8).take(np.array([0]))


@pytest.mark.parametrize(
    ("reader", "options", "message"),
    [
        (NiftiSlices, {"plane": "oblique"}, r"data\.plane='oblique' is unknown; choose one of: sagittal, coronal, ax"),
        (NiftiSlices, {"part": [0.5, 0.5]}, r"data\.part=\[0\.5, 0\.5\] is out of range"),
        (Frames, {"every": 0}, r"data\.every=0 is out of range"),
    ],
)
def test_impossible_fields_of_a_reader_are_named(tmp_path, reader, options, message):
    with pytest.raises(ValueError, match=message):
        reader(str(tmp_path), 8, **options)


@pytest.mark.parametrize("reader", [NiftiSlices, DicomSlices, Frames])
def test_a_folder_without_such_files_lists_what_it_has(tmp_path, reader):
    (tmp_path / "a.heic").touch()
    with pytest.raises(MissingData, match=r"has no (volumes|DICOM files|videos) \(.*\) in it.*: \.heic \(1\)"):
        reader(str(tmp_path), 8)
