"""Readers of further formats, each named by a YAML file outside the repository: IDX, npz, LMDB, videos, scans."""

import gzip
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import lmdb
import nibabel
import numpy as np
import pydicom
import pytest
from omegaconf import OmegaConf
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian
from support.config import composed
from support.images import pictures, write_idx, write_mnist

from conf import checks
from conf.schema import build
from datamodules.images import image_folder
from datamodules.readers.arrays import Npz
from datamodules.readers.base import BadSample, MissingData
from datamodules.readers.folder import Folder
from datamodules.readers.idx import Idx, read_idx
from datamodules.readers.medical import DicomSlices, NiftiSlices
from datamodules.readers.pictures import PictureForm
from datamodules.readers.video import Frames
from experiments.engine.run import Run

# Files of each format


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


def write_lmdb(folder: Path) -> None:
    with lmdb.open(str(folder), map_size=2**22) as environment, environment.begin(write=True) as transaction:
        for number, picture in enumerate(pictures(6, 8)):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "png")
            transaction.put(str(number).encode(), buffer.getvalue())


def write_videos(folder: Path) -> None:
    for name in ("a/1.mkv", "b/2.mkv"):
        write_video(folder / name)


def write_volumes(folder: Path) -> None:
    for number in range(3):
        write_volume(folder / f"{number}.nii.gz", number)


def write_patients(folder: Path) -> None:
    for number in range(6):
        write_dicom(folder / f"{number}", np.full((6, 8), number), patient=str(number // 2))


def write_slices(folder: Path) -> None:
    for number in range(6):
        Image.fromarray(np.full((6, 8), 257 * number, np.uint16)).save(folder / f"{number}.png")


def write_npz(folder: Path) -> None:
    np.savez(folder / "set.npz", x=np.linspace(0, 1, 6 * 48).reshape(6, 8, 6), y=np.arange(6) % 2)


FORMATS: dict[str, tuple[Callable[[Path], None], str, tuple[int, int]]] = {
    "idx": (write_mnist, "train: {path: PATH, names: [a, b, c], size: 8}", (6, 4)),
    "npz": (write_npz, "train: {path: PATH/set.npz, labels: y, size: 8, start: 2, pixel_range: [0, 1]}", (4, 2)),
    "lmdb": (write_lmdb, "train: {path: PATH, size: 8, start: 2}", (4, 2)),
    "video_folder": (write_videos, "train: {path: PATH, size: 8, every: 4}", (3, 3)),
    "nifti": (write_volumes, "train: {path: PATH, size: 8, part: [0, 1]}", (20, 10)),
    "dicom": (write_patients, "train: {path: PATH, size: 8}", (4, 2)),
    "image_folder": (write_slices, "path: PATH\nsize: 8\nholdout_images: 2\nfit: pad", (4, 2)),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_outside_the_repository_names_the_reader(kind, tmp_path):
    """Such a file begins with the one of conf/data that has all fields."""
    write, text, counts = FORMATS[kind]
    (tmp_path / "set").mkdir()
    (tmp_path / "conf" / "data").mkdir(parents=True)
    write(tmp_path / "set")
    text = f"defaults: [{kind}]\nname: mine\nbatch_size: 2\n{text.replace('PATH', str(tmp_path / 'set'))}\n"
    (tmp_path / "conf" / "data" / "mine.yaml").write_text(text)
    cfg = composed("data=mine", folder=tmp_path / "conf")
    checks.check_config(cfg)
    data = build(cfg.data)
    assert (len(data.source("train")), len(data.source("holdout"))) == counts
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 8, 8) and "skipped" not in batch
    assert data.fingerprint() == build(cfg.data).fingerprint() and data.describe() is not None


# Any size, mode and bit depth


def decoded(picture: np.ndarray | Image.Image, **form: Any) -> np.ndarray:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    return PictureForm(**{"size": None, "mode": "L"} | form).decode([("it", lambda: image)])["image"][0, ..., 0]


def test_pictures_of_16_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 257, 32896, 65535]] * 4, np.uint16)
    assert decoded(values).tolist() == [[0, 1, 128, 255]] * 4
    assert decoded(values, pixel_range=[0, 514]).tolist() == [[0, 128, 255, 255]] * 4
    Image.fromarray(values).save(tmp_path / "a.png")
    assert Folder(str(tmp_path), 4, "L").take(np.array([0]))["image"][0, 0, :, 0].tolist() == [0, 1, 128, 255]


def test_floating_point_pictures_need_a_range(tmp_path):
    values = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    assert decoded(values, pixel_range=[0, 1]).ravel().tolist() == list(range(0, 256, 17))
    with pytest.raises(
        BadSample, match=r"its floating-point pixels, here from 0 to 1, have .*choose data\.pixel_range"
    ):
        decoded(values)
    with pytest.raises(BadSample, match="values that are not finite"):
        decoded(values * np.nan, pixel_range=[0, 1])


def test_values_beyond_16_bits_need_a_range():
    values = np.array([[-1000, 0, 1000, 3000]] * 4, np.int32)
    assert decoded(values, pixel_range=[-1000, 1000]).tolist() == [[0, 128, 255, 255]] * 4
    with pytest.raises(BadSample, match="its pixels beyond 16 bits, here from -1000 to 3000"):
        decoded(values)


def test_a_range_applies_to_pictures_of_8_bits_too(tmp_path):
    values = np.array([[10, 20, 30, 40]] * 4, np.uint8)
    assert decoded(values, pixel_range=[10, 30]).tolist() == [[0, 128, 255, 255]] * 4


def test_a_range_for_16_bit_colours_is_refused(tmp_path):
    """PIL reads them in 8 bits."""
    rows = b"".join(b"\0" + bytes(range(48)) for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    content = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert Folder(str(tmp_path), 8).take(np.array([0]))["image"][0, 0, :2].tolist() == [[0, 2, 4], [6, 8, 10]]
    with pytest.raises(BadSample, match="its 16-bit colours are read in 8 bits"):
        Folder(str(tmp_path), 8, pixel_range=[0, 255]).take(np.array([0]))


@pytest.mark.parametrize(
    ("fit", "rows"),
    [
        ("crop", [[9] * 4] * 4),
        ("pad", [[0] * 4, [9] * 4, [9] * 4, [0] * 4]),
        ("stretch", [[9] * 4] * 4),
    ],
)
def test_a_picture_becomes_a_square_as_fit_says(fit, rows):
    assert decoded(np.full((8, 16), 9, np.uint8), size=4, fit=fit).tolist() == rows


def test_crop_cuts_what_stretch_squeezes():
    picture = np.zeros((8, 16), np.uint8)
    picture[:, :4] = 255  # the outer quarter
    assert decoded(picture, size=8, fit="crop").max() == 0
    assert decoded(picture, size=8, fit="stretch")[:, 0].tolist() == [255] * 8
    record = PictureForm(8, "L", "stretch").decode([("it", lambda: Image.fromarray(picture))])
    assert record["original_size"].tolist() == [[8, 16]] and record["crop"].tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("fit", "squash", r"data\.fit='squash' is unknown; choose one of: crop, pad, stretch"),
        ("mode", "grey", r"data\.mode='grey' is unknown; choose one of: RGB, L"),
        ("size", 0, r"data\.size=0 is out of range"),
        ("pixel_range", [1, 1], r"data\.pixel_range=\[1, 1\] is no range; choose two numbers in ascending order"),
        ("pixel_range", [0], r"data\.pixel_range=\[0\] is no range"),
    ],
)
def test_a_form_that_cannot_be_is_named_before_a_picture_is_read(tmp_path, field, value, message):
    with pytest.raises(ValueError, match=message):
        Folder(str(tmp_path), **{"size": 8, field: value})


@pytest.mark.parametrize("choice", ["image_folder", "captioned_folder", "hf_images", "parquet", "shards"])
def test_runs_from_before_fit_and_range_keep_their_ids(choice):
    path = "data.train.path=/x" if choice in ("hf_images", "parquet") else "data.path=/x"
    cfg, before = composed(f"data={choice}", path), composed(f"data={choice}", path)
    OmegaConf.set_struct(before, False)
    nodes = [n for n in (before.data.get("holdout"), before.data.get("train"), before.data) if n is not None]
    for node in nodes:
        for field, default in {"fit": "crop", "pixel_range": None, "box": None, "captions": None}.items():
            if field in node and node[field] == default:
                del node[field]
    assert "fit" not in before.data and Run(cfg, "teacher").id == Run(before, "teacher").id
    node = "data.train.fit" if choice in ("hf_images", "parquet") else "data.fit"
    assert Run(composed(f"data={choice}", path, f"{node}=pad"), "teacher").id != Run(cfg, "teacher").id


# Arrays


def test_an_npz_of_other_sizes_and_numbers_becomes_images(tmp_path):
    values = np.linspace(0, 1, 5 * 8 * 6).reshape(5, 8, 6)
    np.savez(tmp_path / "set.npz", x=values, y=np.arange(5))
    with pytest.raises(ValueError, match=r"array 'x' is float64 of shape \(5, 8, 6\).*set data\.train\.pixel_range"):
        Npz(str(tmp_path / "set.npz"), "x")
    record = Npz(str(tmp_path / "set.npz"), "x", "y", size=4, mode="RGB", pixel_range=[0, 1]).take(np.array([4, 1]))
    assert record["image"].shape == (2, 4, 4, 3) and record["label"].tolist() == [4, 1]
    assert record["image"][0].min() > 180 > 100 > record["image"][1].max()


def test_parts_of_an_array_share_no_image(tmp_path):
    np.savez(tmp_path / "set.npz", x=np.broadcast_to(np.arange(9, dtype=np.uint8)[:, None, None, None], (9, 8, 8, 3)))
    parts = [Npz(str(tmp_path / "set.npz"), "x", start=start, stop=stop) for start, stop in ((3, None), (0, 3))]
    numbers = [part.images[:, 0, 0, 0].tolist() for part in parts]
    assert len(numbers[1]) == 3 and sorted(numbers[0] + numbers[1]) == list(range(9))
    assert numbers[0] == sorted(numbers[0])


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_of_every_type_come_back(tmp_path, dtype, compress):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    write_idx(tmp_path / "file", array, compress)
    assert read_idx(tmp_path / "file").dtype == dtype and (read_idx(tmp_path / "file") == array).all()


def test_idx_files_give_images_labels_and_captions(tmp_path):
    write_mnist(tmp_path)
    source = Idx(str(tmp_path), "train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz", names=["boot", "coat", "bag"])
    record = source.take(np.array([4, 0]))
    assert (record["image"][..., 0] == pictures(6, 28)[[4, 0]][..., 0]).all() and record["label"].tolist() == [1, 0]
    assert record["caption"] == ["a photo of a coat", "a photo of a boot"] and source.class_names[2] == "bag"
    assert source.describe_sample(0) == "array of uint8, L, 28x28"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"x" + content[1:], "is no IDX file, as MNIST comes"),
        (lambda content: content[:-1], r"is damaged: its header promises numbers of the shape \(6, 28, 28\), 4704 of"),
        (lambda content: b"", "is no IDX file"),
        (lambda content: gzip.compress(content)[:-9], "is damaged"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, change, message):
    write_idx(tmp_path / "images", pictures(6, 28)[..., 0])
    (tmp_path / "images").write_bytes(change((tmp_path / "images").read_bytes()))
    with pytest.raises(ValueError, match=f"images {message}"):
        Idx(str(tmp_path), "images")


def test_idx_files_that_do_not_belong_together_are_named(tmp_path):
    write_mnist(tmp_path)
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte has labels of the shape \(4,\); of the 6 images"):
        Idx(str(tmp_path), "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    with pytest.raises(MissingData, match=r"has no file images; it has: t10k-images-idx3-ubyte\.gz, t10k-labels"):
        Idx(str(tmp_path), "images")
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte is uint8 of shape \(6,\); images are"):
        Idx(str(tmp_path), "train-labels-idx1-ubyte")


@pytest.mark.skipif(not Path("/usr/share/datasets/fashion-mnist").exists(), reason="dataset-fashion-mnist is a package")
def test_fashion_mnist_is_read_as_debian_ships_it():
    data = build(composed("data=fashion_mnist").data)
    assert (len(data.source("train")), len(data.source("holdout"))) == (60000, 10000)
    assert np.bincount(data.source("train").labels).tolist() == [6000] * 10
    assert data.image_shape() == (3, 32, 32)
    assert data.captions("train", 1) == ["a photo of an ankle boot"]


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
    with pytest.raises(BadSample, match=r"2\.mp4, number 0 cannot be used: InvalidDataError"):
        source.take(np.array([bad]))


def test_a_single_video_cannot_be_held_out_from(tmp_path):
    write_video(tmp_path / "1.mkv")
    with pytest.raises(ValueError, match=r"has 1 videos of 1 videos, and no sample is left from number 1 on"):
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


def test_a_folder_without_pictures_says_so(tmp_path):
    (tmp_path / "a.gif").touch()
    data = image_folder(str(tmp_path), size=8, holdout_images=1, batch_size=2)
    with pytest.raises(MissingData, match=r"has no pictures \(\.png.*it has other files: \.gif \(1\)"):
        data.sample_shape()
