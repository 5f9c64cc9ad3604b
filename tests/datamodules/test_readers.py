"""Readers of further formats, each named by a YAML file outside the repository: IDX, npz, LMDB, videos, scans."""

import gzip
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from support.config import composed
from support.images import pictures, write_idx, write_mnist
from support.parts import write_dicom, write_video, write_volume

from conf import checks
from conf.schema import build
from datamodules.images import image_folder
from datamodules.readers.arrays import Npz
from datamodules.readers.base import BadSample, MissingData
from datamodules.readers.folder import Folder
from datamodules.readers.idx import Idx, read_idx
from datamodules.readers.pictures import PictureForm
from experiments.engine.run import Run

# Files of each format


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


def test_a_folder_without_pictures_says_so(tmp_path):
    (tmp_path / "a.gif").touch()
    data = image_folder(str(tmp_path), size=8, holdout_images=1, batch_size=2)
    with pytest.raises(MissingData, match=r"has no pictures \(\.png.*it has other files: \.gif \(1\)"):
        data.sample_shape()
