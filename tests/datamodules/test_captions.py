"""Captions and the sizes of pictures: each stays with its picture, whatever the batch, the order or the source."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from datasets import config as datasets_config
from PIL import Image

from conf.schema import build
from datamodules.images import Images, image_folder
from datamodules.readers.base import BadSample, MissingData
from datamodules.readers.folder import Folder
from datamodules.readers.hub import HuggingFace

COUNT = 12


def write_pictures(root: Path, count: int = COUNT) -> None:
    """Pictures 0.png, 1.png, ... in two folders; each has its number in every pixel."""
    for number in range(count):
        (root / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (number, 0, 0)).save(root / "ab"[number % 2] / f"{number}.png")


def write_txt(root: Path, count: int = COUNT) -> str:
    for number in range(count):
        (root / "ab"[number % 2] / f"{number}.txt").write_text(f"picture {number}\n")
    return "txt"


def write_jsonl(root: Path, count: int = COUNT) -> str:
    lines = [{"file_name": f"{'ab'[n % 2]}/{n}.png", "text": f"picture {n}"} for n in reversed(range(count))]
    (root / "captions.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    return "captions.jsonl"


def write_csv(root: Path, count: int = COUNT) -> str:
    lines = [f"{n},{'ab'[n % 2]}/{n}.png,picture {n}" for n in reversed(range(count))]
    (root / "captions.csv").write_text("\n".join(["key,file_name,text", *lines]))
    return "captions.csv"


@pytest.fixture(params=[write_txt, write_jsonl, write_csv], ids=["txt", "jsonl", "csv"])
def captioned_pictures(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Arguments of a folder of pictures that say their number in the caption."""
    write_pictures(tmp_path)
    return {"path": str(tmp_path), "size": 4, "captions": request.param(tmp_path)}


def numbers(images: Any) -> list[int]:
    """What the pictures say: the first pixel's red, of uint8 (N,H,W,C) or of what training gets."""
    if isinstance(images, torch.Tensor):
        return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    return images[:, 0, 0, 0].tolist()


def says(batch: dict[str, Any]) -> list[int]:
    """The same, as the captions say."""
    return [int(text.removeprefix("picture ")) for text in batch["caption"]]


# Where they come from


def test_every_picture_of_a_folder_has_its_own_caption(captioned_pictures):
    source = Folder(**captioned_pictures)
    assert sorted(source.captions) == sorted(f"picture {number}" for number in range(COUNT))
    record = source.take(np.array([5, 0, 3]))
    assert says(record) == numbers(record["image"]) and len(set(says(record))) == 3
    assert record["label"].tolist() == [number % 2 for number in says(record)]


def test_a_folder_without_captions_gives_none(tmp_path):
    write_pictures(tmp_path)
    source = Folder(str(tmp_path), 4)
    assert source.captions is None
    assert source.take(np.array([0])).keys() == {"image", "label", "original_size", "crop"}


def test_captions_keep_quotes_and_unicode_line_breaks(tmp_path):
    write_pictures(tmp_path, 1)
    text = 'a "cat", ein Löwe,\u2028one\u0085two'  # some of which are line breaks to Python
    (tmp_path / "captions.jsonl").write_text(
        json.dumps({"file_name": "a/0.png", "text": text}, ensure_ascii=False), encoding="utf-8"
    )
    assert list(Folder(str(tmp_path), 4, captions="captions.jsonl").captions) == [text]


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (write_txt, "{root}/b/11.txt: the caption cannot be read: there is none"),
        (write_jsonl, "{root}/b/11.png has no caption in captions.jsonl"),
        (write_csv, "{root}/b/11.png has no caption in captions.csv"),
    ],
)
def test_a_picture_without_a_caption_is_a_bad_sample_and_named(tmp_path, write, said):
    write_pictures(tmp_path)
    source = Folder(str(tmp_path), 4, captions=write(tmp_path, COUNT - 1))
    (bad,) = [index for index in range(COUNT) if source.file(index).name == "11.png"]
    for read in (source.captions.__getitem__, lambda index: source.take(np.array([index]))):
        with pytest.raises(BadSample) as caught:
            read(bad)
        assert str(caught.value) == said.format(root=tmp_path)
    assert len(source.take(np.delete(np.arange(COUNT), bad))["caption"]) == COUNT - 1


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_a_caption_that_is_not_utf_8_is_a_bad_sample(tmp_path, kind):
    write_pictures(tmp_path, 2)
    latin, good = "größer".encode("latin-1"), "größer".encode()
    bytes_of = {
        "a/0.txt": latin,
        "b/1.txt": good,
        "captions.jsonl": b'{"file_name": "a/0.png", "text": "%b"}\n{"file_name": "b/1.png", "text": "%b"}'
        % (latin, good),
        "captions.csv": b"file_name,text\na/0.png,%b\nb/1.png,%b\n" % (latin, good),
    }
    for name, content in bytes_of.items():
        (tmp_path / name).write_bytes(content)
    source = Folder(str(tmp_path), 4, captions=kind if kind == "txt" else f"captions.{kind}")
    places = {source.file(index).name: index for index in range(2)}
    assert source.captions[places["1.png"]] == "größer"
    with pytest.raises(BadSample, match=r"/a/0\.(txt|png): .*'utf-8' codec can't decode byte"):
        source.captions[places["0.png"]]


@pytest.mark.parametrize("write", [write_jsonl, write_csv])
def test_columns_have_the_names_they_are_given(tmp_path, write):
    write_pictures(tmp_path)
    captions = write(tmp_path)
    table = tmp_path / captions
    table.write_text(table.read_text().replace("file_name", "image").replace("text", "TEXT"))
    named = {"captions": captions, "file_column": "image", "caption_column": "TEXT"}
    record = Folder(str(tmp_path), 4, **named).take(np.arange(COUNT))
    assert says(record) == numbers(record["image"])
    for column in ("file_column", "caption_column"):
        with pytest.raises(ValueError, match=r"has no column 'wrong'; it has: (key, )?image, TEXT"):
            Folder(str(tmp_path), 4, **named | {column: "wrong"})


def test_a_table_of_other_pictures_is_refused_with_names_of_both(tmp_path):
    write_pictures(tmp_path, 1)
    (tmp_path / "c.csv").write_text("file_name,text\nimages/0.png,one\n")
    with pytest.raises(ValueError, match=r"it names images/0\.png; the folder has a/0\.png"):
        Folder(str(tmp_path), 4, captions="c.csv")


def test_a_missing_table_of_captions_is_named_with_the_choices(tmp_path):
    write_pictures(tmp_path)
    with pytest.raises(MissingData) as caught:
        Folder(str(tmp_path), 4, captions="meta.jsonl")
    message = str(caught.value)
    assert f"data.captions='meta.jsonl': {tmp_path}/meta.jsonl does not exist" in message
    assert "choose txt, or a .jsonl or .csv file" in message
    with pytest.raises(ValueError, match=r"data.captions='json' is unknown; choose txt, or a .jsonl or .csv file"):
        Folder(str(tmp_path), 4, captions="json")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"file_name": "a/0.png"', 'is not a line of JSON with named values: {"file_name": "a/0.png"'),
        ('["a", "b"]', 'is not a line of JSON with named values: ["a", "b"]'),
        ('{"file": "a", "text": "b"}', "has no column 'file_name'; it has: file, text"),
        ('{"file_name": "a", "text": 3}', "column 'text' has a int where a text is needed"),
    ],
)
def test_a_line_that_is_no_caption_is_named_by_its_number(tmp_path, line, said):
    write_pictures(tmp_path)
    write_jsonl(tmp_path)
    with open(tmp_path / "captions.jsonl", "a") as file:
        file.write(line)
    with pytest.raises(ValueError) as caught:
        Folder(str(tmp_path), 4, captions="captions.jsonl")
    assert f"{tmp_path}/captions.jsonl, line {2 * COUNT}" in str(caught.value) and said in str(caught.value)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """table(captions) -> a local copy of a data set with a column of captions."""
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(captions: list[Any]) -> str:
        rows = {"image": [Image.new("RGB", (6, 4), (n, 0, 0)) for n in range(len(captions))], "text": captions}
        features = Features({"image": ImageColumn(), "text": Value("string")})
        (tmp_path / "copy").mkdir()
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "copy" / "train.parquet")
        return str(tmp_path / "copy")

    return make


def test_captions_are_a_column_of_a_hugging_face_data_set(table):
    source = HuggingFace(table([f"picture {n}" for n in range(4)]), "train", "image", None, 4, caption="text")
    assert list(source.captions) == [f"picture {n}" for n in range(4)]
    record = source.take(np.array([3, 1]))
    assert says(record) == numbers(record["image"]) == [3, 1]
    assert (record["original_size"].tolist(), record["crop"].tolist()) == ([[4, 6]] * 2, [[0, 1]] * 2)


def test_a_hugging_face_data_set_has_captions_on_request(table):
    source = HuggingFace(table(["one", "two"]), "train", "image", None, 4)
    assert source.captions is None and "caption" not in source.take(np.array([0]))


def test_a_missing_or_wrong_column_of_captions_is_named(table):
    path = table(["one", None])
    for column, said in (
        ("caption", "has no column 'caption'; it has: image, text"),
        ("image", "where a caption is text"),
    ):
        with pytest.raises(ValueError, match=said):
            HuggingFace(path, "train", "image", None, 4, caption=column)
    source = HuggingFace(path, "train", "image", None, 4, caption="text")
    assert source.captions[0] == "one" and source.take(np.array([0]))["caption"] == ["one"]
    for read in (source.captions.__getitem__, lambda index: source.take(np.array([index]))):
        with pytest.raises(BadSample, match=r"copy \(train\), row 1: the caption is missing"):
            read(1)


# Where they go


def data(arguments: dict[str, Any], **options: Any) -> Images:
    return image_folder(**arguments, **{"holdout_images": 4, "batch_size": 3, "seed": 0, "flip": False} | options)


@pytest.mark.parametrize("workers", [0, 2])
def test_captions_stay_with_their_pictures_in_the_stream(captioned_pictures, workers):
    batches = list(islice(data(captioned_pictures, num_workers=workers).train_dataloader(), 8))  # three passes of 8
    for batch in batches:
        assert says(batch) == numbers(batch["image"]) and len(says(batch)) == 3
    assert len({number for batch in batches for number in says(batch)}) == COUNT - 4


def test_captions_stay_with_their_pictures_in_a_subset(captioned_pictures):
    made = data(captioned_pictures)
    seen = {}
    for split, count in (("train", 8), ("holdout", 4)):
        batches = list(made.subset(split, count, seed=1, batch_size=3))
        assert all(says(batch) == numbers(batch["image"]) for batch in batches)
        seen[split] = {number for batch in batches for number in says(batch)}
        assert len(seen[split]) == count
    assert seen["train"] | seen["holdout"] == set(range(COUNT))
    held_out = made.source("holdout")
    assert list(held_out.captions) == [f"picture {n}" for n in numbers(held_out.take(np.arange(4))["image"])]
    assert made.captions("holdout", 3) == held_out.captions[:3] and len(made.captions("holdout", 9)) == 4


def test_captioned_folder_is_a_folder_of_captioned_pictures(configure, tmp_path):
    cfg = configure("data=captioned_folder", f"data.path={tmp_path}")
    assert (cfg.data.path, cfg.data.captions) == (str(tmp_path), "metadata.jsonl")
    assert (cfg.data.size, cfg.data.flip) == (512, False)
    write_pictures(tmp_path)
    captions = write_jsonl(tmp_path)
    given = [f"data.path={tmp_path}", "data.size=8", "data.holdout_images=4", "data.batch_size=3"]
    made = build(configure("data=captioned_folder", *given, f"data.captions={captions}").data)
    batch = next(iter(made.train_dataloader()))
    assert made.image_shape() == (3, 8, 8) and batch["image"].shape == (3, 3, 8, 8)
    assert says(batch) == numbers(batch["image"])


def test_the_column_of_captions_is_one_word_on_the_command_line(configure, table):
    path = table([f"picture {n}" for n in range(6)])
    given = [f"data.train.path={path}", "data.train.caption=text", "data.train.size=4", "data.train.start=2"]
    made = build(configure("data=hf_images", *given, "data.batch_size=2").data)
    train, holdout = (list(made.source(split).captions) for split in ("train", "holdout"))
    assert (len(train), len(holdout)) == (4, 2)
    assert sorted(train + holdout) == [f"picture {n}" for n in range(6)]


# Sizes


@pytest.mark.parametrize(
    ("width", "height", "size", "crop"),
    [
        (8, 8, 8, (0, 0)),
        (50, 30, 20, (0, 6)),  # 10 of the 30 pixels' edge, which becomes 20
        (30, 50, 60, (20, 0)),
        (24, 8, 4, (0, 4)),
        (11, 8, 8, (0, 1)),  # 1.5 pixels are cut off on either side: the left one is whole
        (4, 12, 16, (16, 0)),
    ],
)
def test_a_record_has_original_size_and_crop_in_resized_pixels(tmp_path, width, height, size, crop):
    Image.new("RGB", (width, height)).save(tmp_path / "a.png")
    record = Folder(str(tmp_path), size).take(np.array([0]))
    assert record["image"].shape == (1, size, size, 3)
    assert record["original_size"].tolist() == [[height, width]] and record["original_size"].dtype == np.int64
    assert record["crop"].tolist() == [list(crop)] and record["crop"].dtype == np.int64


def test_sizes_reach_training_as_tensors_one_row_a_picture(tmp_path):
    for number, size in enumerate([(6, 4), (4, 6), (8, 4), (4, 4)]):
        Image.new("RGB", size, (number, 0, 0)).save(tmp_path / f"{number}.png")
    (batch,) = image_folder(str(tmp_path), 4, holdout_images=0, batch_size=4).subset("train", 4, seed=0, batch_size=4)
    expected = {0: ([4, 6], [0, 1]), 1: ([6, 4], [1, 0]), 2: ([4, 8], [0, 2]), 3: ([4, 4], [0, 0])}
    for place, number in enumerate(numbers(batch["image"])):
        assert (batch["original_size"][place].tolist(), batch["crop"][place].tolist()) == expected[number]
    assert batch["original_size"].dtype == batch["crop"].dtype == torch.int64


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1.png,a cat, on a mat", "2.png,a dog"], r"captions\.csv, line 2: its number of values is not 2, as in"),
        (["1.png,a cat", "2.png"], r"captions\.csv, line 3: its number of values is not 2, as in"),
        (['1.png,"a cat', "2.png,a dog"], r"captions\.csv, line 2: the quotes in it, or after it, do not close"),
    ],
    ids=["comma", "missing", "quote"],
)
def test_a_row_of_another_length_is_an_error_that_names_its_line(tmp_path, lines, message):
    for name in ("1.png", "2.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "captions.csv").write_text("\n".join(["file_name,text", *lines]) + "\n")
    with pytest.raises(ValueError, match=message):
        Folder(str(tmp_path), 4, captions="captions.csv")


def test_quoted_commas_and_lines_stay_in_a_caption(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    (tmp_path / "captions.csv").write_text('file_name,text\n1.png,"a cat, on\na mat"\n')
    assert Folder(str(tmp_path), 4, captions="captions.csv").captions[0] == "a cat, on\na mat"
