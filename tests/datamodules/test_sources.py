"""Where images come from: arrays, tiles, folders and Hugging Face data sets, decoded alike and refused alike."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from datasets import config as datasets_config
from PIL import Image
from support.images import pictures

from conf.schema import build
from datamodules.images import image_folder
from datamodules.readers.arrays import Arrays, Npz, Tiles
from datamodules.readers.base import BadSample, MissingData, data_root, first_available
from datamodules.readers.folder import Folder
from datamodules.readers.hub import HuggingFace

# Arrays in a file


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    np.savez(tmp_path / "set.npz", x=pictures(5), y=np.arange(5))
    return tmp_path / "set.npz"


def test_an_npz_gives_its_arrays(archive):
    found = Npz(str(archive), "x", "y").take(np.array([3, 1]))
    assert found.keys() == {"image", "label"}
    assert found["image"].dtype == np.uint8 and found["label"].dtype == np.int64
    assert (found["image"] == pictures(5)[[3, 1]]).all() and found["label"].tolist() == [3, 1]
    assert Npz(str(archive), "x").take(np.array([3]))["label"].tolist() == [-1]


@pytest.mark.parametrize("keys", [("images", "y"), ("x", "labels")])
def test_an_array_that_is_not_in_an_npz_lists_those_that_are(archive, keys):
    with pytest.raises(ValueError, match=r"set\.npz has no array '(images|labels)'; it has: x, y"):
        Npz(str(archive), *keys)


def test_a_relative_path_is_looked_for_in_the_data_folder(archive, monkeypatch):
    monkeypatch.setenv("SECATEUR_DATA", str(archive.parent))
    assert data_root() == archive.parent and len(Npz("set.npz", "x")) == 5
    with pytest.raises(MissingData) as caught:
        Npz("other.npz", "x")
    assert f"{archive.parent}/other.npz does not exist: put it there, or set $SECATEUR_DATA" in str(caught.value)


def test_the_default_data_folder_is_in_the_cache_of_the_user(monkeypatch):
    monkeypatch.delenv("SECATEUR_DATA", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert data_root() == Path("/home/somebody/.cache/secateur")


class Bomb:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def test_a_pickled_npz_is_refused_unopened(tmp_path):
    np.savez(tmp_path / "set.npz", x=np.array([Bomb(tmp_path / "trace")], object))
    with pytest.raises(ValueError, match=r"set\.npz: array 'x' cannot be read: .*pickled objects, .*never opened"):
        Npz(str(tmp_path / "set.npz"), "x")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("wrong", [pictures(4) / 255, pictures(4).astype(np.int64), pictures(4)[0]])
def test_an_array_that_is_not_of_uint8_images_is_refused_and_named(tmp_path, wrong):
    """Images in 0..1 would else be trained on as if they were all black."""
    np.savez(tmp_path / "set.npz", x=wrong)
    with pytest.raises(ValueError, match=r"set\.npz.*'x'.*uint8"):
        Npz(str(tmp_path / "set.npz"), "x")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\0\0\x08\x03" + b"\0" * 99, "an IDX file, as MNIST comes; read it by data=idx"),
        (b"\x93NUMPY\x01\0", r"a single array \(\.npy\); save it as \.npz"),
        (b"\x1f\x8b\x08\0", r"compressed by gzip; unpack it first"),
        (b"\x80\x04\x95", "pickled, which is never opened"),
        (b"", r"no known format \(or damaged\)"),
    ],
)
def test_a_file_that_is_no_npz_is_named_by_its_format(tmp_path, content, kind):
    (tmp_path / "set").write_bytes(content)
    with pytest.raises(ValueError, match=rf"set is no \.npz archive but {kind}"):
        Npz(str(tmp_path / "set"), "x")


@pytest.mark.parametrize("labels", [np.array([0.0, 1.7]), np.array([0.0, np.nan]), np.array(["cat", "dog"])])
def test_labels_that_are_not_whole_numbers_are_refused(tmp_path, labels):
    np.savez(tmp_path / "set.npz", x=pictures(2), y=labels)
    with pytest.raises(ValueError, match=r"set\.npz, array 'y': the labels are .*whole numbers from 0 on"):
        Npz(str(tmp_path / "set.npz"), "x", "y")


def test_labels_of_another_number_than_images_are_refused(archive, tmp_path):
    np.savez(tmp_path / "other.npz", x=pictures(5), y=np.arange(4))
    with pytest.raises(ValueError, match=r"array 'y' has the shape \(4,\); of 5 images it is \(5,\)"):
        Npz(str(tmp_path / "other.npz"), "x", "y")


# Tiles


def test_tiles_come_back_from_a_lossless_picture_bit_for_bit(tmp_path):
    tiles = pictures(12, size=8)
    sheet = tiles.reshape(3, 4, 8, 8, 3).swapaxes(1, 2).reshape(24, 32, 3)
    Image.fromarray(sheet).save(tmp_path / "sheet.webp", lossless=True)
    (tmp_path / "sheet.labels.txt").write_text("012345678901\n")
    path = str(tmp_path / "sheet.webp")
    found = Tiles(path, tile=8).take(np.arange(12))
    assert (found["image"] == tiles).all() and found["label"].tolist() == [*range(10), 0, 1]
    part = Tiles(path, tile=8, start=2, stop=5)
    assert (part.take(np.arange(3))["image"] == tiles[2:5]).all() and part.labels.tolist() == [2, 3, 4]


def test_tiles_may_be_grey_and_without_labels(tmp_path):
    tiles = pictures(6, size=8)[..., 0]
    Image.fromarray(tiles.reshape(2, 3, 8, 8).swapaxes(1, 2).reshape(16, 24)).save(tmp_path / "sheet.png")
    found = Tiles(str(tmp_path / "sheet.png"), tile=8, mode="L").take(np.arange(6))
    assert (found["image"] == tiles[..., None]).all() and found["label"].tolist() == [-1] * 6
    assert Tiles(str(tmp_path / "sheet.png"), tile=8).take(np.arange(6))["image"].shape == (6, 8, 8, 3)


def test_captions_of_classes_have_the_fitting_article():
    source = Arrays(pictures(3), np.array([1, 0, 1]), names=["airplane", "dog"], caption="a photo of a {}")
    assert list(source.captions) == ["a photo of a dog", "a photo of an airplane", "a photo of a dog"]
    assert source.take(np.array([2, 1]))["caption"] == ["a photo of a dog", "a photo of an airplane"]
    assert list(Arrays(pictures(1), np.array([0]), ["ox"], "A {} on grass").captions) == ["An ox on grass"]
    assert list(Arrays(pictures(1), np.array([0]), ["ox"], "data {}").captions) == ["data ox"]
    for labels in (np.array([0, 2, 0]), None):
        with pytest.raises(ValueError, match=r"label (2|-1) has no name; data\.names has 2"):
            Arrays(pictures(3), labels, names=["airplane", "dog"])


def test_the_embedded_sample_has_captions_of_its_labels(configure):
    made = build(configure("data=cifar10_captions").data)
    for split, count in (("train", 1792), ("holdout", 256)):
        source = made.source(split)
        record = source.take(np.arange(count))
        assert len(source.captions) == count and set(record["caption"]) == set(source.captions[:])
        names = ["an airplane", "an automobile", "a bird", "a cat", "a deer", "a dog", "a frog", "a horse", "a ship"]
        said = enumerate([*names, "a truck"])
        pairs = zip(record["label"].tolist(), record["caption"], strict=True)
        assert set(pairs) == {(label, f"a photo of {name}") for label, name in said}


def test_a_picture_of_tiles_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingData, match=r"sheet\.webp does not exist"):
        Tiles(str(tmp_path / "sheet.webp"), tile=8)


# Folders


def one_picture(
    tmp_path: Path, picture: Image.Image, name: str = "a.png", size: int = 8, mode: str = "RGB"
) -> np.ndarray:
    picture.save(tmp_path / name)
    record = Folder(str(tmp_path), size, mode).take(np.array([0]))
    (found,), (label,) = record["image"], record["label"]
    assert (found.dtype, found.shape, label) == (np.uint8, (size, size, len(mode)), 0)
    return found


def constant(found: np.ndarray) -> list[int]:
    """The one colour that an image has."""
    (colour,) = {tuple(pixel) for pixel in found.reshape(-1, found.shape[-1]).tolist()}
    return list(colour)


def test_labels_number_the_subfolders_in_alphabetical_order(tmp_path):
    for place, name in enumerate(["b/2.png", "a/9.PNG", "b/1.webp", "a/10.jpeg", "c/deep/x.bmp"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (place, 0, 0)).save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("not a picture")
    found = Folder(str(tmp_path), 4)
    names = [found.file(index).relative_to(tmp_path).as_posix() for index in range(len(found))]
    assert sorted(names) == ["a/10.jpeg", "a/9.PNG", "b/1.webp", "b/2.png", "c/deep/x.bmp"]
    assert found.take(np.arange(5))["label"].tolist() == ["abc".index(name[0]) for name in names]
    assert list(Folder(str(tmp_path), 4).names) == list(found.names)


def write_picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def labels_by_name(root: Path) -> dict[str, int]:
    folder = Folder(str(root), 4)
    return {folder.file(i).relative_to(root).as_posix(): int(label) for i, label in enumerate(folder.labels)}


def test_hidden_files_and_folders_are_no_samples(tmp_path):
    for name in ("b/1.png", "c/2.png"):
        write_picture(tmp_path / name)
    before = labels_by_name(tmp_path)
    assert before == {"b/1.png": 0, "c/2.png": 1}
    for name in (".ipynb_checkpoints/1.png", "__MACOSX/b/1.png", "b/.ipynb_checkpoints/1-copy.png", "c/._2.png"):
        write_picture(tmp_path / name)
    assert labels_by_name(tmp_path) == before


def test_a_picture_outside_the_classes_shifts_no_label(tmp_path):
    for name in ("b/1.png", "c/2.png", "0.png"):
        write_picture(tmp_path / name)
    assert labels_by_name(tmp_path) == {"b/1.png": 0, "c/2.png": 1, "0.png": 2}


def test_links_to_folders_are_followed_unless_they_are_circular(tmp_path):
    write_picture(tmp_path / "elsewhere" / "1.png")
    write_picture(tmp_path / "set" / "b" / "2.png")
    (tmp_path / "set" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "b" / "up").symlink_to(tmp_path / "set")
    assert labels_by_name(tmp_path / "set") == {"a/1.png": 0, "b/2.png": 1}


def test_a_folder_is_split_so_that_every_class_is_held_out_and_trained_on(tmp_path):
    for place in range(40):
        (tmp_path / "ab"[place // 20]).mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (place, 0, 0)).save(tmp_path / "ab"[place // 20] / f"{place:02}.png")
    data = image_folder(str(tmp_path), size=4, holdout_images=16, batch_size=2)
    seen = []
    for split, count in (("holdout", 16), ("train", 24)):
        record = data.source(split).take(np.arange(len(data.source(split))))
        images, labels = record["image"], record["label"]
        assert len(images) == count and set(labels.tolist()) == {0, 1}
        assert [constant(image)[0] // 20 for image in images] == labels.tolist()
        seen += [constant(image)[0] for image in images]
    assert sorted(seen) == list(range(40))


def test_a_picture_is_cropped_at_its_centre(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, :8, 0] = wide[:, 8:16, 1] = wide[:, 16:, 2] = 255
    assert constant(one_picture(tmp_path, Image.fromarray(wide))) == [0, 255, 0]
    assert constant(one_picture(tmp_path, Image.fromarray(wide.swapaxes(0, 1)))) == [0, 255, 0]


def test_a_picture_of_the_right_size_is_taken_as_it_is(tmp_path):
    picture = pictures(1, size=8)[0]
    assert (one_picture(tmp_path, Image.fromarray(picture)) == picture).all()


def clear_palette() -> Image.Image:
    picture = Image.new("P", (9, 9), 1)
    picture.putpalette([9, 9, 9, 1, 2, 3])
    picture.info["transparency"] = 1
    return picture


@pytest.mark.parametrize(
    ("picture", "name", "colour"),
    [
        pytest.param(Image.new("RGB", (4, 4), (1, 2, 3)), "a.png", [1, 2, 3], id="4x4"),
        pytest.param(Image.new("L", (20, 9), 100), "a.png", [100, 100, 100], id="grey"),
        pytest.param(Image.new("LA", (9, 9), (100, 255)), "a.png", [100, 100, 100], id="grey with alpha"),
        pytest.param(Image.new("1", (9, 9), 1), "a.png", [255, 255, 255], id="bit"),
        pytest.param(Image.new("RGB", (9, 9), (1, 2, 3)).quantize(), "a.png", [1, 2, 3], id="palette"),
        pytest.param(Image.new("RGBA", (9, 9), (1, 2, 3, 255)), "a.png", [1, 2, 3], id="alpha"),
        pytest.param(Image.new("RGBA", (9, 9), (1, 2, 3, 0)), "a.png", [255, 255, 255], id="transparent"),
        pytest.param(Image.new("RGBA", (9, 9), (55, 155, 255, 51)), "a.png", [215, 235, 255], id="a fifth of it"),
        pytest.param(Image.new("LA", (9, 9), (100, 0)), "a.png", [255, 255, 255], id="transparent grey"),
        pytest.param(clear_palette(), "a.png", [255, 255, 255], id="transparent colour of a palette"),
        pytest.param(Image.new("CMYK", (9, 9), (0, 0, 0, 0)), "a.jpg", [255, 255, 255], id="CMYK jpeg"),
        pytest.param(Image.new("CMYK", (9, 9), (0, 0, 0, 0)), "a.tif", [255, 255, 255], id="CMYK tiff"),
        pytest.param(Image.fromarray(np.full((9, 9), 257 * 128, np.uint16)), "a.png", [128] * 3, id="16 bit"),
        pytest.param(Image.fromarray(np.full((9, 9), 257 * 128, np.uint16)), "a.tiff", [128] * 3, id="16 bit tiff"),
        pytest.param(Image.fromarray(np.full((9, 9), 257, np.uint16)), "a.png", [1, 1, 1], id="16 bit, dark"),
    ],
)
def test_pictures_of_every_mode_become_uint8_rgb_of_the_size(tmp_path, picture, name, colour):
    assert constant(one_picture(tmp_path, picture, name)) == colour


def test_a_picture_that_lies_on_its_side_is_put_upright(tmp_path):
    """Orientation 6: what is stored as the left edge is the top."""
    stored = np.zeros((8, 24, 3), np.uint8)
    stored[:, :12] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    record = Folder(str(tmp_path), 8).take(np.array([0]))
    assert record["original_size"].tolist() == [[24, 8]] and record["crop"].tolist() == [[8, 0]]
    assert (record["image"][0, :4] == 255).all() and (record["image"][0, 4:] == 0).all()


def test_only_what_is_in_the_box_counts(tmp_path):
    picture = pictures(1, size=20)[0]
    Image.fromarray(picture).save(tmp_path / "a.png")
    record = Folder(str(tmp_path), 8, box=[3, 5, 11, 13]).take(np.array([0]))
    assert (record["image"][0] == picture[5:13, 3:11]).all()
    assert record["original_size"].tolist() == [[8, 8]] and record["crop"].tolist() == [[0, 0]]
    with pytest.raises(BadSample, match=r"its 20x20 pixels do not hold the box \(0, 0, 21, 8\)"):
        Folder(str(tmp_path), 8, box=[0, 0, 21, 8]).take(np.array([0]))


def test_classes_are_numbered_as_in_another_folder(tmp_path):
    for name in ("train/a", "train/b", "train/c", "val/c", "val/a"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    val = Folder(str(tmp_path / "val"), 4, classes=str(tmp_path / "train"))
    assert [(val.file(i).parent.name, label) for i, label in enumerate(val.labels)] in (
        [("a", 0), ("c", 2)],
        [("c", 2), ("a", 0)],
    )
    (tmp_path / "val" / "d").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "val" / "d" / "0.png")
    with pytest.raises(
        ValueError, match=r"d holds pictures, but is not a class: .*train has 3 folders, such as a, b, c"
    ):
        Folder(str(tmp_path / "val"), 4, classes=str(tmp_path / "train"))


def test_pictures_become_grey_in_mode_L(tmp_path):
    assert constant(one_picture(tmp_path, Image.new("RGB", (9, 9), (255, 255, 255)), mode="L")) == [255]


def test_a_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(MissingData, match="no such folder does not exist: ask for it, or set"):
        Folder(str(tmp_path / "no such folder"), 8, get="ask for it")
    with pytest.raises(MissingData, match=r"test_sources\.py is not a folder"):
        Folder(__file__, 8)
    for name in ("a.heic", "b.HEIC", "c.gif", ".d.png"):
        (tmp_path / name).touch()
    with pytest.raises(MissingData) as caught:
        Folder(str(tmp_path), 8)
    assert f"{tmp_path} has no pictures (.png, .jpg" in str(caught.value)
    assert str(caught.value).endswith("it has other files: .heic (2), .gif (1)")


def test_a_split_without_samples_names_its_folder(tmp_path):
    write_picture(tmp_path / "a.png")
    data = image_folder(str(tmp_path), size=4, holdout_images=3, batch_size=2)
    message = f"Folder of {tmp_path} has 1 samples, and 3 are held out; choose data.holdout_images below 1"
    with pytest.raises(ValueError, match=rf"data\.train is empty: {message}"):
        data.train_dataloader()


# Hugging Face


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's cache, away from the user's own."""
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "hub cache")
    return tmp_path


@pytest.fixture
def parquet(hub_cache: Path) -> str:
    """A local copy of a data set: four pictures of 8x8 in a parquet file."""
    rows = {"picture": [Image.fromarray(image) for image in pictures(4, size=8)], "kind": [3, 2, 1, 0]}
    path = hub_cache / "copy"
    path.mkdir()
    table = Dataset.from_dict(rows, features=Features({"picture": ImageColumn(), "kind": Value("int64")}))
    table.to_parquet(path / "train.parquet")
    return str(path)


def test_a_local_copy_of_a_hub_data_set_is_read(parquet):
    found = HuggingFace(parquet, "train", "picture", "kind", 8)
    taken = found.take(np.array([2, 0]))
    assert len(found) == 4 and taken["image"].dtype == np.uint8
    assert (taken["image"] == pictures(4, size=8)[[2, 0]]).all() and taken["label"].tolist() == [1, 3]
    part = HuggingFace(parquet, "train[1:3]", "picture", None, 8)
    assert len(part) == 2 and part.take(np.array([0]))["label"].tolist() == [-1]
    assert (part.take(np.array([0]))["image"] == pictures(4, size=8)[1]).all()


def test_a_folder_of_pictures_is_read_as_a_hub_data_set_with_labels(hub_cache):
    for place, kind in enumerate(["cat", "dog"]):
        (hub_cache / "set" / "train" / kind).mkdir(parents=True)
        Image.new("RGB", (12, 8), (place, 0, 0)).save(hub_cache / "set" / "train" / kind / "0.png")
    found = HuggingFace(str(hub_cache / "set"), "train", "image", "label", 8).take(np.array([1, 0]))
    assert [constant(image)[0] for image in found["image"]] == [1, 0] == found["label"].tolist()


@pytest.fixture
def sorted_set(hub_cache: Path) -> str:
    """A data set sorted by its label, with a column of scores, in which the last row has no label."""
    (hub_cache / "sorted").mkdir()
    rows = {"image": [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(20)]}
    rows |= {"label": [*(n // 10 for n in range(19)), None], "score": [n / 7 for n in range(20)]}
    features = Features({"image": ImageColumn(), "label": Value("int64"), "score": Value("float32")})
    Dataset.from_dict(rows, features=features).to_parquet(hub_cache / "sorted" / "train.parquet")
    return str(hub_cache / "sorted")


def test_held_out_rows_of_a_hub_data_set_come_from_everywhere(configure, sorted_set):
    given = [f"data.train.path={sorted_set}", "data.train.size=8", "data.train.start=8"]
    data = build(configure("data=hf_images", *given).data)
    seen = {}
    for split, count in (("holdout", 8), ("train", 12)):
        record = data.source(split).take(np.arange(count))
        seen[split] = [constant(image)[0] for image in record["image"]]
        assert len(data.source(split)) == count and {number // 10 for number in seen[split]} == {0, 1}
    assert sorted(seen["train"] + seen["holdout"]) == list(range(20))


def test_a_row_without_a_label_is_a_bad_sample(sorted_set):
    source = HuggingFace(sorted_set, "train", "image", "label", 8)
    assert source.take(np.array([18]))["label"].tolist() == [1]
    with pytest.raises(BadSample, match=r"\(train\), row 19: the label is missing \(null\)"):
        source.take(np.array([19]))


def test_a_column_of_labels_that_are_not_whole_numbers_is_refused(sorted_set):
    with pytest.raises(ValueError, match="column 'score' has float32 where labels are whole numbers"):
        HuggingFace(sorted_set, "train", "image", "score", 8)


def test_files_are_read_by_a_builder(parquet):
    found = HuggingFace("parquet", "train", "picture", "kind", 8, data_files=f"{parquet}/*.parquet")
    taken = found.take(np.array([2, 0]))
    assert (taken["image"] == pictures(4, size=8)[[2, 0]]).all() and taken["label"].tolist() == [1, 3]


@pytest.mark.parametrize(("image", "label", "wrong"), [("img", "kind", "img"), ("picture", "label", "label")])
def test_a_column_that_is_not_there_lists_those_that_are(parquet, image, label, wrong):
    with pytest.raises(ValueError, match=f"has no column '{wrong}'; it has: picture, kind"):
        HuggingFace(parquet, "train", image, label, 8)


def test_a_split_that_is_not_there_lists_those_that_are(parquet):
    with pytest.raises(ValueError, match=r"'?tset.*\['train'\]"):
        HuggingFace(parquet, "tset", "picture", "kind", 8)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What asked for a pause, as one who tries the network again and again does."""
    pauses: list[object] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    return pauses


@pytest.mark.parametrize("path", ["nobody/has-such-a-data-set", "/no/such/folder"])
def test_a_data_set_that_cannot_be_downloaded_fails_at_once(hub_cache, no_waiting, monkeypatch, path):
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingData) as caught:
        HuggingFace(path, "train", "image", None, 8)
    assert f"data set {path!r} (train) could be read neither from the hub nor from a cache" in str(caught.value)
    assert "download it where there is a network" in str(caught.value) and "local copy" in str(caught.value)
    assert no_waiting == []


# One of several places


def absent(text: str) -> Callable[[], Arrays]:
    def make() -> Arrays:
        raise MissingData(text)

    return make


def test_the_first_place_that_has_the_data_is_taken():
    here = Arrays(pictures(2))
    assert first_available(local=absent("not here"), copy=lambda: here, hub=absent("nor there")) is here


def test_data_missing_from_all_places_name_each_place():
    with pytest.raises(MissingData) as caught:
        first_available(local=absent("no file at /here"), hub=absent("no network"))
    lines = str(caught.value).splitlines()
    assert lines[1:] == ["  local: no file at /here", "  hub: no network"]


def test_a_place_whose_data_are_wrong_is_not_passed_over(archive):
    with pytest.raises(ValueError, match="has no array 'images'; it has: x, y"):
        first_available(local=lambda: Npz(str(archive), "images"), hub=lambda: Arrays(pictures(2)))


def test_missing_cifar10_names_its_file_and_the_hub(configure, hub_cache, monkeypatch):
    monkeypatch.setenv("SECATEUR_DATA", str(hub_cache))
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", True)
    data = build(configure("data=cifar10").data)
    with pytest.raises(MissingData) as caught:
        data.source("train")
    assert f"local: {hub_cache}/cifar10.npz does not exist" in str(caught.value)
    assert "hub: data set 'uoft-cs/cifar10' (train)" in str(caught.value)
