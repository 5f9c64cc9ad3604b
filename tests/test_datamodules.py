"""Sources, streams and subsets: the same data in the same order, whatever the batches, ranks, workers and resumes."""

import hashlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from datasets import config as datasets_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conf.schema import build
from datamodules.images import Images, ImageSet, Stream, folder
from datamodules.seeding import derive, numpy_rng, torch_rng
from datamodules.sources import Arrays, Folder, HuggingFace, MissingData, Npz, Tiles, data_root, first_available
from experiments.pipeline import prune

quickly = settings(derandomize=True, database=None, deadline=None, max_examples=60)


def pictures(count: int, size: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def images(train: int = 10, holdout: int = 4, **options: object) -> Images:
    given = {"batch_size": 4, "seed": 0} | options
    return Images(train=lambda: Arrays(pictures(train)), holdout=lambda: Arrays(pictures(holdout, seed=1)), **given)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


# Seeds


def test_a_seed_is_the_same_on_every_machine_and_another_for_other_parts():
    assert derive(0, "order", 1) == int.from_bytes(hashlib.sha256(b"0/order/1").digest()[:8], "little") >> 1
    assert len({derive(0), derive(1), derive(0, 0), derive(0, "a"), derive("a", 0), derive(0, 1), derive(1, 0)}) == 7
    assert torch.equal(torch.rand(3, generator=torch_rng(0, "a")), torch.rand(3, generator=torch_rng(0, "a")))
    assert numpy_rng(0, "a").random() == numpy_rng(0, "a").random() != numpy_rng(0, "b").random()


# The stream


@quickly
@given(st.integers(1, 30), st.integers(0, 5), st.integers(1, 4))
def test_every_pass_of_the_stream_is_a_permutation(length, seed, passes):
    positions = list(islice(Stream(length, seed, 0, 1), passes * length))
    for number in range(passes):
        part = positions[number * length : (number + 1) * length]
        assert sorted(part) == list(range(number * length, (number + 1) * length))


def test_the_order_is_a_function_of_the_seed_and_is_another_in_every_pass():
    def order(seed: int) -> list[int]:
        return list(islice(Stream(50, seed, 0, 1), 100))

    assert order(0) == order(0) != order(1)
    assert [position - 50 for position in order(0)[50:]] != order(0)[:50]


@quickly
@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 3))
def test_ranks_together_see_exactly_what_one_process_sees(length, world, seed):
    rounds = 3 * length
    ranks = [list(islice(Stream(length, seed, rank, world), rounds)) for rank in range(world)]
    alone = list(islice(Stream(length, seed, 0, 1), rounds * world))
    assert [ranks[place % world][place // world] for place in range(rounds * world)] == alone


def on_rank(rank: int, world: int, **options: object) -> Images:
    data = images(**options)
    data.trainer = SimpleNamespace(world_size=world, global_rank=rank)
    return data


def test_the_batches_of_two_ranks_together_are_those_of_one_process():
    alone = islice(images(train=9, crop=1).train_dataloader(), 8)
    loaders = [iter(on_rank(rank, 2, train=9, crop=1).train_dataloader()) for rank in range(2)]
    for batch in alone:
        first, second = (next(loader) for loader in loaders)
        assert len(first["index"]) == len(second["index"]) == 2
        together = {key: torch.stack([first[key], second[key]], 1).flatten(0, 1) for key in batch}
        assert same(together, batch)


# Augmentation


def test_pixels_are_mapped_from_0_and_255_to_minus_1_and_1():
    source = Arrays(np.array([0, 255], np.uint8).reshape(2, 1, 1, 1).repeat(3, 3), np.array([7, 8]))
    batch = ImageSet(source).__getitems__([1, 0])
    assert batch["image"].dtype == torch.float32 and batch["image"].shape == (2, 3, 1, 1)
    assert batch["image"].flatten(1).tolist() == [[1.0] * 3, [-1.0] * 3]
    assert (batch["label"].tolist(), batch["index"].tolist()) == ([8, 7], [1, 0])


@quickly
@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(0, 3))
def test_an_image_depends_on_seed_and_position_and_not_on_its_batch(positions, seed):
    data = ImageSet(Arrays(pictures(7)), seed, flip=True, crop=2)
    together = data.__getitems__(positions)
    for place, position in enumerate(positions):
        alone = ImageSet(Arrays(pictures(7)), seed, flip=True, crop=2).__getitems__([position])
        assert same(alone, {key: value[place : place + 1] for key, value in together.items()})


def test_augmentation_changes_with_the_pass_and_the_seed():
    def pixels(seed: int, number: int) -> torch.Tensor:
        data = ImageSet(Arrays(pictures(8)), seed, flip=True, crop=2)
        return data.__getitems__(list(range(8 * number, 8 * number + 8)))["image"]

    assert torch.equal(pixels(0, 0), pixels(0, 0))
    assert not torch.equal(pixels(0, 0), pixels(0, 1)) and not torch.equal(pixels(0, 0), pixels(1, 0))


def test_a_flip_is_a_mirror_image_and_happens_about_every_other_time():
    plain = ImageSet(Arrays(pictures(1))).__getitems__([0])["image"][0]
    flipped = ImageSet(Arrays(pictures(1)), flip=True).__getitems__(list(range(200)))["image"]
    mirrored = [torch.equal(image, plain.flip(2)) for image in flipped]
    assert all(was or torch.equal(image, plain) for was, image in zip(mirrored, flipped, strict=True))
    assert 70 < sum(mirrored) < 130


def test_a_crop_is_a_window_of_the_padded_image_and_every_window_occurs():
    image = pictures(1)[0]
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    windows = {padded[top : top + 6, left : left + 6].tobytes() for top in range(3) for left in range(3)}
    data = ImageSet(Arrays(image[None]), crop=1)
    assert {data.augment(image, position).tobytes() for position in range(200)} == windows


# Loading and resuming


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumed_in_the_middle_of_a_pass_gives_the_batches_that_were_to_come(workers):
    options = {"train": 11, "batch_size": 4, "crop": 2, "num_workers": workers}
    undisturbed = list(islice(images(**options).train_dataloader(), 9))
    for taken in (1, 4):  # within the first pass of 2.75 batches, and within the second
        loader = images(**options).train_dataloader()
        before = list(islice(iter(loader), taken))
        state = loader.state_dict()
        resumed = images(**options).train_dataloader()
        resumed.load_state_dict(state)
        after = list(islice(iter(resumed), 9 - taken))
        assert all(same(*pair) for pair in zip(before + after, undisturbed, strict=True))


def test_workers_do_not_change_the_batches():
    alone, shared = (islice(images(crop=2, num_workers=workers).train_dataloader(), 6) for workers in (0, 2))
    assert all(same(*pair) for pair in zip(alone, shared, strict=True))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_a_subset_is_fixed_without_replacement_and_not_augmented(batch_size):
    data = images(train=30, crop=2)
    loaded = list(data.subset("train", 20, seed=3, batch_size=batch_size))
    assert [len(batch["index"]) for batch in loaded[:-1]] == [batch_size] * (len(loaded) - 1)
    batch = {key: torch.cat([part[key] for part in loaded]) for key in loaded[0]}
    (whole,) = images(train=30).subset("train", 20, seed=3, batch_size=20)
    assert same(batch, whole)
    assert len(set(batch["index"].tolist())) == 20
    assert (batch["number"].tolist(), set(batch["of"].tolist())) == (list(range(20)), {20})
    assert torch.equal(batch["image"], ImageSet(Arrays(pictures(30))).__getitems__(batch["index"].tolist())["image"])


def test_a_subset_is_another_for_another_seed_and_the_whole_split_is_a_permutation():
    def chosen(seed: int, count: int) -> list[int]:
        return next(iter(images(train=30).subset("train", count, seed, 30)))["index"].tolist()

    assert chosen(0, 10) == chosen(0, 10) != chosen(1, 10)
    assert sorted(chosen(0, 30)) == list(range(30)) != chosen(0, 30)


def test_the_holdout_is_not_what_is_trained_on():
    (batch,) = images(holdout=4).subset("holdout", 4, seed=0, batch_size=4)
    expected = ImageSet(Arrays(pictures(4, seed=1))).__getitems__(batch["index"].tolist())["image"]
    assert torch.equal(batch["image"], expected)


def test_the_embedded_sample_is_split_without_overlap(configure):
    data = build(configure().data)
    assert (len(data.source("train")), len(data.source("holdout")), data.image_shape()) == (1792, 256, (3, 32, 32))
    train, holdout = ({image.tobytes() for image in data.source(split).images} for split in ("train", "holdout"))
    assert len(train) == 1792 and len(holdout) == 256 and train.isdisjoint(holdout)
    assert set(data.source("train").labels.tolist()) == set(range(10))


# Data that cannot be used


def test_more_samples_than_there_are_names_both_numbers():
    with pytest.raises(ValueError, match=r"5 samples of data\.holdout were asked for; it has 4"):
        images().subset("holdout", 5, 0, 4)


def test_a_split_without_images_is_named():
    with pytest.raises(ValueError, match=r"data\.train is empty"):
        images(train=0).train_dataloader()
    with pytest.raises(ValueError, match=r"data\.holdout is empty"):
        images(holdout=0).subset("holdout", 1, 0, 1)


def test_fewer_images_than_a_batch_names_both_numbers():
    with pytest.raises(ValueError, match=r"data\.batch_size=11 is more than the 10 training samples"):
        images(train=10, batch_size=11).train_dataloader()
    assert len(next(iter(images(train=10, batch_size=10).train_dataloader()))["index"]) == 10


def test_a_batch_that_the_ranks_cannot_share_names_both_numbers():
    with pytest.raises(ValueError, match=r"data\.batch_size=4 cannot be shared by 3 ranks"):
        on_rank(0, 3).train_dataloader()


@pytest.mark.parametrize(("size", "channels"), [(16, 3), (8, 1)])
def test_images_that_the_teacher_does_not_take_are_refused_with_both_shapes(
    configure, overrides, tmp_path, size, channels
):
    path = tmp_path / "other.npz"
    other = np.zeros((64, size, size, channels), np.uint8)
    np.savez(path, x_train=other, x_test=other, y_train=np.zeros(64), y_test=np.zeros(64))
    cfg = configure(*overrides, f"data.train.path={path}", f"data.holdout.path={path}")
    with pytest.raises(ValueError) as caught:
        prune(cfg)
    message = str(caught.value)
    assert "data=tiny" in message and str((channels, size, size)) in message and str((3, 8, 8)) in message
    assert not list(tmp_path.rglob("scores.json"))


# npz


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
    assert f"{archive.parent}/other.npz does not exist: put the file there, or set $SECATEUR_DATA" in str(caught.value)


def test_without_a_setting_the_data_folder_is_in_the_cache_of_the_user(monkeypatch):
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
    with pytest.raises(ValueError, match="allow_pickle=False"):
        Npz(str(tmp_path / "set.npz"), "x")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("wrong", [pictures(4) / 255, pictures(4).astype(np.int64), pictures(4)[0]])
def test_an_array_that_is_not_of_uint8_images_is_refused_and_named(tmp_path, wrong):
    """Images in 0..1 would else be trained on as if they were all black."""
    np.savez(tmp_path / "set.npz", x=wrong)
    with pytest.raises(ValueError, match=r"set\.npz.*'x'.*uint8"):
        Npz(str(tmp_path / "set.npz"), "x")


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


def test_a_folder_is_labelled_by_the_folders_inside_in_an_order_of_its_own(tmp_path):
    for place, name in enumerate(["b/2.png", "a/9.PNG", "b/1.webp", "a/10.jpeg", "c/deep/x.bmp"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (place, 0, 0)).save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("not a picture")
    found = Folder(str(tmp_path), 4)
    names = [file.relative_to(tmp_path).as_posix() for file in found.files]
    assert sorted(names) == ["a/10.jpeg", "a/9.PNG", "b/1.webp", "b/2.png", "c/deep/x.bmp"]
    assert found.take(np.arange(5))["label"].tolist() == ["abc".index(name[0]) for name in names]
    assert Folder(str(tmp_path), 4).files == found.files


def test_a_folder_is_split_so_that_every_class_is_held_out_and_trained_on(tmp_path):
    for place in range(40):
        (tmp_path / "ab"[place // 20]).mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (place, 0, 0)).save(tmp_path / "ab"[place // 20] / f"{place:02}.png")
    data = folder(str(tmp_path), size=4, holdout_images=16, batch_size=2)
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


@pytest.mark.parametrize(
    ("picture", "name", "colour"),
    [
        pytest.param(Image.new("RGB", (1, 1), (1, 2, 3)), "a.png", [1, 2, 3], id="1x1"),
        pytest.param(Image.new("L", (20, 9), 100), "a.png", [100, 100, 100], id="grey"),
        pytest.param(Image.new("LA", (9, 9), (100, 255)), "a.png", [100, 100, 100], id="grey with alpha"),
        pytest.param(Image.new("1", (9, 9), 1), "a.png", [255, 255, 255], id="bit"),
        pytest.param(Image.new("RGB", (9, 9), (1, 2, 3)).quantize(), "a.png", [1, 2, 3], id="palette"),
        pytest.param(Image.new("RGBA", (9, 9), (1, 2, 3, 255)), "a.png", [1, 2, 3], id="alpha"),
        pytest.param(Image.new("CMYK", (9, 9), (0, 0, 0, 0)), "a.jpg", [255, 255, 255], id="CMYK jpeg"),
        pytest.param(Image.new("CMYK", (9, 9), (0, 0, 0, 0)), "a.tif", [255, 255, 255], id="CMYK tiff"),
        pytest.param(Image.fromarray(np.full((9, 9), 257 * 128, np.uint16)), "a.png", [128] * 3, id="16 bit"),
        pytest.param(Image.fromarray(np.full((9, 9), 257 * 128, np.uint16)), "a.tiff", [128] * 3, id="16 bit tiff"),
        pytest.param(Image.fromarray(np.full((9, 9), 257, np.uint16)), "a.png", [1, 1, 1], id="16 bit, dark"),
    ],
)
def test_pictures_of_every_mode_become_uint8_rgb_of_the_size(tmp_path, picture, name, colour):
    assert constant(one_picture(tmp_path, picture, name)) == colour


def test_pictures_become_grey_where_one_channel_is_asked_for(tmp_path):
    assert constant(one_picture(tmp_path, Image.new("RGB", (9, 9), (255, 255, 255)), mode="L")) == [255]


def test_a_folder_that_is_not_there_or_has_no_pictures_is_named(tmp_path):
    with pytest.raises(MissingData, match="no such folder is not a folder"):
        Folder(str(tmp_path / "no such folder"), 8)
    data = folder(str(tmp_path), size=8, holdout_images=1, batch_size=2)
    with pytest.raises(ValueError, match=r"data\.train is empty") as caught:
        data.train_dataloader()
    assert str(tmp_path) in str(caught.value)


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
def test_a_data_set_that_is_neither_here_nor_to_be_had_fails_at_once_and_says_what_to_do(
    hub_cache, no_waiting, monkeypatch, path
):
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


def test_data_that_are_in_none_of_the_places_name_every_place():
    with pytest.raises(MissingData) as caught:
        first_available(local=absent("no file at /here"), hub=absent("no network"))
    lines = str(caught.value).splitlines()
    assert lines[1:] == ["  local: no file at /here", "  hub: no network"]


def test_a_place_whose_data_are_wrong_is_not_passed_over(archive):
    with pytest.raises(ValueError, match="has no array 'images'; it has: x, y"):
        first_available(local=lambda: Npz(str(archive), "images"), hub=lambda: Arrays(pictures(2)))


def test_cifar10_names_the_file_and_the_hub_where_it_has_neither(configure, hub_cache, monkeypatch):
    monkeypatch.setenv("SECATEUR_DATA", str(hub_cache))
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", True)
    data = build(configure("data=cifar10").data)
    with pytest.raises(MissingData) as caught:
        data.source("train")
    assert f"local: {hub_cache}/cifar10.npz does not exist" in str(caught.value)
    assert "hub: data set 'uoft-cs/cifar10' (train)" in str(caught.value)
