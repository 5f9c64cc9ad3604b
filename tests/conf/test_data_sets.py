"""Data sets in the formats they are published in: LSUN's LMDB, Parquet, CelebA's and ImageNet's folders."""

import gc
import hashlib
import io
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from support.config import composed
from support.images import pictures

from conf.schema import ROOT, build
from datamodules.images import Images
from datamodules.readers.base import BadSample, MissingData
from datamodules.readers.folder import Folder
from datamodules.readers.lsun import Lmdb
from datamodules.readers.parquet import Parquet
from experiments.engine.pipeline import run_pipeline


def encoded(picture: np.ndarray, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **({"lossless": True} if kind == "webp" else {}))
    return buffer.getvalue()


def numbered(count: int, size: int = 8) -> np.ndarray:
    """Pictures that have their number in every pixel."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, size, size, 3))


def numbers(record: dict[str, Any]) -> list[int]:
    return record["image"][:, 0, 0, 0].tolist()


# LMDB


def write_lmdb(folder: Path, images: np.ndarray) -> Path:
    """Lossless webp under the sha1 of the content, as LSUN has them; the keys are in no order of the pictures."""
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for image in images:
            content = encoded(image, "webp")
            transaction.put(hashlib.sha1(content).hexdigest().encode(), content)
    return folder


def test_an_lmdb_gives_all_its_pictures_in_the_order_of_its_keys(tmp_path):
    images = pictures(9, size=8)
    source = Lmdb(str(write_lmdb(tmp_path / "church", images)), size=8)
    keys = [hashlib.sha1(encoded(image, "webp")).hexdigest() for image in images]
    record = source.take(np.arange(9))
    assert (record["image"] == images[np.argsort(keys)]).all() and record["label"].tolist() == [-1] * 9
    assert (source.take(np.array([4, 0]))["image"] == record["image"][[4, 0]]).all()


def test_two_parts_of_an_lmdb_share_no_picture(tmp_path):
    folder = str(write_lmdb(tmp_path / "church", numbered(40)))
    held_out, train = Lmdb(folder, 8, stop=10), Lmdb(folder, 8, start=10)
    found = [numbers(part.take(np.arange(len(part)))) for part in (held_out, train)]
    assert (len(found[0]), len(found[1])) == (10, 30) and sorted(found[0] + found[1]) == list(range(40))


def test_an_lmdb_is_read_by_forked_workers_as_by_one_process(tmp_path):
    folder = str(write_lmdb(tmp_path / "church", numbered(8)))

    def batches(workers: int) -> list[torch.Tensor]:
        data = Images(lambda: Lmdb(folder, 8), lambda: Lmdb(folder, 8), batch_size=2, num_workers=workers)
        data.image_shape()  # opened here, too
        loader = iter(data.train_dataloader())
        return [next(loader)["image"] for _ in range(6)]

    assert all(torch.equal(*pair) for pair in zip(batches(0), batches(2), strict=True))


def test_a_bad_value_of_an_lmdb_is_named_by_its_key(tmp_path):
    folder = write_lmdb(tmp_path / "church", numbered(3))
    with lmdb.open(str(folder)) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"0123", b"no picture")
    source = Lmdb(str(folder), 8)
    with pytest.raises(BadSample, match=r"church, key 0123 cannot be used: no known format"):
        source.take(np.arange(4))
    with pytest.raises(MissingData, match=r"has no data\.mdb"):
        Lmdb(str(tmp_path), 8)
    (tmp_path / "data.mdb").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="cannot be opened as an LMDB"):
        Lmdb(str(tmp_path), 8)


# Parquet


def write_parquet(folder: Path, count: int = 20, files: int = 2, **changed: Any) -> Path:
    """Files of row groups of 3: numbered pictures as binary, captions and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {
        "image": [encoded(image) for image in numbered(count)],
        "text": [f"picture {n}" for n in range(count)],
        "kind": [n % 3 for n in range(count)],
    } | changed
    for number, part in enumerate(np.array_split(np.arange(count), files)):
        table = pa.table({name: [column[i] for i in part] for name, column in columns.items()})
        pq.write_table(table, folder / f"train-{number}.parquet", row_group_size=3)
    return folder


@pytest.mark.parametrize("path", ["", "train-*.parquet"])
def test_rows_of_parquet_files_come_whole_and_in_any_order(tmp_path, path):
    source = Parquet(str(write_parquet(tmp_path / "set") / path), "image", 8, label="kind", caption="text")
    indices = np.random.default_rng(0).permutation(20)
    record = source.take(indices)
    assert numbers(record) == indices.tolist() and record["label"].tolist() == (indices % 3).tolist()
    assert record["caption"] == [f"picture {n}" for n in indices] and source.captions[7] == "picture 7"
    plain = Parquet(str(tmp_path / "set" / "train-1.parquet"), "image", 8).take(np.array([0]))
    assert numbers(plain) == [10] and plain["label"].tolist() == [-1] and "caption" not in plain


def test_each_row_group_is_read_once_a_batch_and_one_is_held(tmp_path, monkeypatch):
    source = Parquet(str(write_parquet(tmp_path, 12, files=1)), "image", 8)
    read, whole = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, i, **k: read.append(i) or whole(self, i, **k))
    source.take(np.array([11, 0, 9, 1, 10, 2]))
    assert sorted(read) == [0, 3] and source.held[1].num_rows == 3


def test_two_parts_of_parquet_files_share_nothing(tmp_path):
    path = str(write_parquet(tmp_path))
    parts = [Parquet(path, "image", 8, stop=6), Parquet(path, "image", 8, start=6)]
    found = [numbers(part.take(np.arange(len(part)))) for part in parts]
    assert len(found[0]) == 6 and sorted(found[0] + found[1]) == list(range(20)) and found[0] != list(range(6))


def test_parquet_as_hugging_face_writes_it_is_read(tmp_path):
    features = Features({"image": ImageColumn(), "label": Value("int64")})
    rows = {"image": [Image.fromarray(image) for image in numbered(4)], "label": [3, 2, 1, 0]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    record = Parquet(str(tmp_path), "image", 8, label="label").take(np.array([2, 0]))
    assert numbers(record) == [2, 0] and record["label"].tolist() == [1, 3]


def test_errors_in_a_parquet_file_are_named(tmp_path):
    path = str(write_parquet(tmp_path, 20, text=[None, *["a text"] * 19]))
    for column in ({"image": "img"}, {"label": "img"}, {"caption": "img"}):
        with pytest.raises(ValueError, match=r"train-0\.parquet has no column 'img'; it has: image, text, kind"):
            Parquet(**{"path": path, "image": "image", "size": 8} | column)
    for column, said in (
        ({"image": "kind"}, "'kind' has int64 where encoded pictures are needed"),
        ({"label": "text"}, "'text' has string where whole numbers are needed"),
        ({"caption": "kind"}, "'kind' has int64 where texts are needed"),
    ):
        with pytest.raises(ValueError, match=said):
            Parquet(**{"path": path, "image": "image", "size": 8} | column)
    source = Parquet(path, "image", 8, caption="text")
    for read in (source.captions.__getitem__, lambda index: source.take(np.array([index]))):
        with pytest.raises(BadSample, match=r"train-0\.parquet, row 0: the caption is missing"):
            read(0)
    write_parquet(tmp_path, 20, image=[*[encoded(image) for image in numbered(11)], b"", None, *[b"x"] * 7])
    source = Parquet(path, "image", 8)
    for row, said in ((11, "it has no content"), (12, "it has no content"), (13, "no known format")):
        with pytest.raises(BadSample, match=rf"train-1\.parquet, row {row - 10} cannot be used: {said}"):
            source.take(np.array([row]))
    (tmp_path / "train-1.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"train-1\.parquet cannot be read as Parquet"):
        Parquet(path, "image", 8)
    with pytest.raises(MissingData, match=r"no Parquet files at .*none\*: ask for them, or set"):
        Parquet(str(tmp_path / "none*"), "image", 8, get="ask for them")


# Memory


@pytest.mark.parametrize("kind", ["folder", "parquet", "lmdb"])
@pytest.mark.slow
def test_memory_does_not_grow_while_samples_are_taken(tmp_path, kind):
    count = 60
    if kind == "folder":
        for number, image in enumerate(numbered(count)):
            Image.fromarray(image).save(tmp_path / f"{number}.png")
            (tmp_path / f"{number}.txt").write_text(f"picture {number}")
    make: dict[str, Callable[[], Any]] = {
        "folder": lambda: Folder(str(tmp_path), 8, captions="txt"),
        "parquet": lambda: Parquet(str(write_parquet(tmp_path, count)), "image", 8, caption="text"),
        "lmdb": lambda: Lmdb(str(write_lmdb(tmp_path / "db", pictures(count, size=8))), 8),
    }
    source, rng = make[kind](), np.random.default_rng(0)

    def take(times: int) -> int:
        for _ in range(times):
            source.take(rng.integers(0, count, 8))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        take(150)  # fills the caches of libraries
        before, after = take(1), take(150)
    finally:
        tracemalloc.stop()
    # 1,200 pictures with 192 bytes each and their names were taken. Pillow before 13 keeps 100 bytes per WebP picture.
    assert after - before < 180_000


# The data sets of conf/data


@pytest.fixture
def data_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def lsun(root: Path) -> list[str]:
    write_lmdb(root / "lsun" / "church_outdoor_train_lmdb", pictures(20, size=12))
    write_lmdb(root / "lsun" / "church_outdoor_val_lmdb", pictures(8, size=12, seed=1))
    return ["data=lsun_church", "data.train.size=8"]


def celeba(root: Path) -> list[str]:
    folder = root / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for number in range(1, 29):
        Image.new("RGB", (178, 218), (number, 0, 0)).save(folder / f"{number:06}.jpg")
    return ["data=celeba", "data.size=8", "data.holdout_images=8"]


def imagenet(root: Path) -> list[str]:
    for number in range(28):
        split, wnid = ("train", "val")[number >= 20], ("n01440764", "n01443537")[number % 2]
        folder = root / "imagenet" / split / wnid
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + number, 16), (number, 0, 0)).save(folder / f"{wnid}_{number}.JPEG")
    return ["data=imagenet", "data.train.size=8"]


def parquet(root: Path) -> list[str]:
    write_parquet(root / "set", 28)
    given = ["path=set", "caption=text", "label=kind", "start=8", "size=8"]
    return ["data=parquet", *(f"data.train.{field}" for field in given)]


@pytest.mark.parametrize("write", [lsun, celeba, imagenet, parquet])
def test_a_data_set_of_the_published_format_runs(configure, overrides, data_here, tmp_path, quick_end, write):
    kept = [override for override in overrides if not override.startswith("data=")]
    cfg = configure(*kept, *write(data_here), "data.num_workers=0")
    data = build(cfg.data)
    assert (len(data.source("train")), len(data.source("holdout"))) == (20, 8)
    assert data.image_shape() == (3, 8, 8)
    run_pipeline(cfg)
    assert list((tmp_path / "runs").rglob("finished.json"))


def test_the_faces_of_celeba_are_cropped_as_ddim_does(configure, data_here):
    given = celeba(data_here)
    picture = pictures(1, size=218)[0, :, :178]
    Image.fromarray(picture).save(data_here / "celeba" / "img_align_celeba" / "000001.png")
    os.remove(data_here / "celeba" / "img_align_celeba" / "000001.jpg")
    cfg = configure(*given[:1], "data.size=128", "data.holdout_images=0")
    source = build(cfg.data).source("train")
    (place,) = [index for index in range(len(source)) if source.file(index).suffix == ".png"]
    assert (source.take(np.array([place]))["image"][0] == picture[121 - 64 : 121 + 64, 89 - 64 : 89 + 64]).all()


def test_imagenet_numbers_its_classes_in_alphabetical_order(configure, data_here):
    data = build(configure(*imagenet(data_here)).data)
    for split in ("train", "holdout"):
        source = data.source(split)
        classes = [source.file(index).parent.name for index in range(len(source))]
        assert [("n01440764", "n01443537")[label] for label in source.labels] == classes


@pytest.mark.parametrize("choice", ["lsun_church", "lsun_bedroom", "celeba", "imagenet"])
def test_missing_data_name_their_source_and_folder(configure, data_here, choice):
    with pytest.raises(MissingData) as caught:
        build(configure(f"data={choice}").data).image_shape()
    message = str(caught.value)
    assert message.startswith(str(data_here)) and "http" in message and "$SECATEUR_DATA" in message


@pytest.mark.parametrize("choice", ["mri", "hubble", "pokemon"])
def test_a_data_set_of_the_hub_is_looked_for_there(configure, choice, monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda path, *_, split, **__: asked.append((path, split)) or 1 / 0)
    cfg = configure(f"data={choice}")
    made = ("train", "holdout")
    for split in made:
        with pytest.raises(MissingData, match=cfg.data.train.path):
            build(cfg.data).source(split)
    assert [path for path, _ in asked] == [cfg.data.train.path] * 2
    shares = [(cfg.data[split].split, cfg.data[split].get("start"), cfg.data[split].get("stop")) for split in made]
    assert shares[0] != shares[1]


PICTURES = [
    path.stem for path in (ROOT / "conf" / "data").glob("*.yaml") if "datamodules.texts" not in path.read_text()
]


@pytest.mark.parametrize("choice", sorted(PICTURES))
def test_the_limit_of_bad_samples_can_be_set_without_a_plus(choice):
    given = [] if choice in ("bookcorpus", "stories") else ["data.max_bad_fraction=0.5"]
    assert composed(f"data={choice}", *given).data.get("max_bad_fraction", 0.5) == 0.5
