"""Shards of pictures with captions: the samples that webdataset sees, read by number; what is damaged is named."""

import io
import multiprocessing
import pickle
import tarfile
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from support.shards import PER_SHARD, everything, numbers, png, sample, says, write

from conf.schema import build
from datamodules.images import image_shards
from datamodules.readers import shard_index
from datamodules.readers import shards as module
from datamodules.readers.base import BadSample, MissingData
from datamodules.readers.shards import Shards

pytestmark = pytest.mark.usefixtures("data_folder_of_its_own")


def members(path: Path, contents: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    """A tar file of just these members, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items() if isinstance(contents, dict) else contents:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


# What a shard holds


def by_webdataset(files: list[str]) -> dict[str, tuple[bytes, str]]:
    """{caption: (picture, key)} as webdataset reads the shards."""
    found = webdataset.WebDataset(files, shardshuffle=False)
    return {one["txt"].decode(): (one["png"], one["__key__"]) for one in found}


def test_samples_are_those_that_webdataset_reads(laion):
    odd = [sample(90) | {"__key__": key} for key in ("a/b/000", "a.b/000", "x" * 120)]
    for number, one in enumerate(odd):
        one |= {"txt": f"picture {90 + number}", "png": png(90 + number), "seg.png": b"no picture"}
    write(laion / "odd.tar", odd)
    expected = by_webdataset([str(file) for file in sorted(laion.glob("*.tar"))])
    source = Shards(str(laion), 6)
    record = everything(source)
    assert sorted(record["caption"]) == sorted(expected) and len(expected) == 3 * PER_SHARD + 3
    for index, caption in enumerate(record["caption"]):
        content, key = expected[caption]
        assert source.member(index, module.IMAGE) == content
        assert source.name(index).endswith(f": {key[:100]}")
    assert says(record) == numbers(record)


def test_a_record_has_picture_caption_size_and_crop(laion):
    record = Shards(str(laion), 3).take(np.array([4, 0, 4]))
    assert record.keys() == {"image", "label", "caption", "original_size", "crop"}
    assert record["image"].shape == (3, 3, 3, 3) and record["image"].dtype == np.uint8
    assert record["label"].tolist() == [-1] * 3 and record["label"].dtype == np.int64
    assert record["original_size"].tolist() == [[60, 80]] * 3 and record["original_size"].dtype == np.int64
    assert record["crop"].tolist() == [[0, 0]] * 3
    assert says(record)[0] == says(record)[2] != says(record)[1]


@pytest.mark.parametrize("meta", [None, {}, {"original_width": None, "original_height": 3}, {"original_width": "9"}])
def test_a_json_without_an_original_size_leaves_the_picture_its_own(tmp_path, meta):
    write(tmp_path / "0.tar", [{"__key__": "0", "png": png(0), "txt": "a"} | ({} if meta is None else {"json": meta})])
    assert everything(Shards(str(tmp_path), 3))["original_size"].tolist() == [[6, 8]]


def test_a_caption_is_a_member_or_a_field_of_the_json(laion):
    assert set(Shards(str(laion), 3, caption="json.caption").captions) == {f"json {n}" for n in range(3 * PER_SHARD)}
    write(laion / "more" / "0.tar", [{"__key__": "0", "png": png(0), "cap.txt": " é\n"}])
    assert everything(Shards(str(laion / "more"), 3, caption="cap.txt"))["caption"] == ["é"]
    plain = Shards(str(laion), 3, caption=None)
    assert plain.captions is None and "caption" not in everything(plain)


def test_the_picture_is_the_member_with_the_first_matching_suffix(tmp_path):
    members(tmp_path / "0.tar", {"0.PNG": png(1), "0.txt": b"a", "1.b.png": png(2), "1.jpg": png(3), "1.txt": b"b"})
    for images, expected in ((None, {"a": 1, "b": 3}), (["b.png", "png"], {"a": 1, "b": 2})):
        record = everything(Shards(str(tmp_path), 3, images=images))
        assert dict(zip(record["caption"], numbers(record), strict=True)) == expected


# Which shards


def test_folders_patterns_braces_and_lists_name_the_same_shards(laion, monkeypatch, data_folder_of_its_own):
    data_folder_of_its_own.symlink_to(laion.parent)
    every = [str(laion / f"0000{n}.tar") for n in range(3)]
    ways = [str(laion), f"{laion}/*.tar", f"{laion}/0000?.tar", str(laion) + "/{00000..00002}.tar", every, "laion"]
    expected = everything(Shards(every, 6))["caption"]
    for path in ways:
        source = Shards(path, 6)
        assert [file.resolve() for file in source.files] == [Path(file) for file in every]
        assert everything(source)["caption"] == expected
    assert [file.name for file in Shards([every[2], every[0]], 6).files] == ["00002.tar", "00000.tar"]


def test_a_missing_shard_is_warned_of_and_too_many_are_an_error(laion):
    braces = str(laion) + "/{00000..00003}.tar"
    with pytest.warns(UserWarning, match=r"1 of 4 shards are missing: .*/00003\.tar"):
        assert len(Shards(braces, 6, max_missing=0.25)) == 3 * PER_SHARD
    with pytest.raises(MissingData) as caught:
        Shards(braces, 6)
    assert "names 4 shards; missing: " in str(caught.value) and f"{laion}/00003.tar" in str(caught.value)
    assert "beside it there are: 00000.tar, 00001.tar, 00002.tar" in str(caught.value)


@pytest.mark.parametrize("path", ["{}/none", "{}/none/*.tar", "{}/*.zip", "{}/empty", "{}/{{00007..00009}}.tar"])
def test_without_any_shard_the_pattern_is_named(laion, path):
    (laion / "empty").mkdir()
    with pytest.raises(MissingData) as caught:
        Shards(path.format(laion), 6, max_missing=0.99)
    assert f"data.path={path.format(laion)}" in str(caught.value)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_fraction_of_missing_shards_that_is_none_is_refused(laion, value):
    with pytest.raises(ValueError, match=f"data.max_missing={value} is out of range"):
        Shards(str(laion), 6, max_missing=value)


# Damaged shards and samples


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def test_of_a_shard_that_ends_early_the_whole_samples_are_used(laion):
    """Cut anywhere: in a header, in a picture, in a caption, between two."""
    content = (laion / "00001.tar").read_bytes()
    with tarfile.open(laion / "00001.tar") as tar:
        every = tar.getmembers()
    needed = [member for member in every if not member.name.endswith(".json")]
    ends = [max(one.offset_data + one.size for one in needed[at : at + 2]) for at in range(0, len(needed), 2)]
    for size in range(100, every[-1].offset_data + every[-1].size, 397):
        (laion / "00001.tar").write_bytes(content[:size])
        whole = sum(end <= size for end in ends)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            record = everything(Shards(f"{laion}/0000[01].tar", 6))
        assert sorted(says(record)) == list(range(PER_SHARD + whole)) and says(record) == numbers(record)
        told = [str(one.message) for one in caught if one.category is UserWarning]
        expected = [f"{laion}/00001.tar is damaged or ends early: {whole} samples were found in it"]
        assert told == ([] if size in [member.offset for member in every] else expected)


@pytest.mark.parametrize("content", [b"", b"no tar" * 1000], ids=["empty", "text"])
def test_a_file_that_is_no_tar_has_no_samples_and_is_named(laion, content):
    (laion / "00001.tar").write_bytes(content)
    with pytest.warns(UserWarning, match=r"00001\.tar is damaged or ends early: 0 samples"):
        assert len(Shards(str(laion), 6)) == 2 * PER_SHARD


@pytest.mark.parametrize("name", ["00001.tar", "00003.tar.gz", "00004.TGZ"])
def test_a_compressed_shard_is_refused_by_name(laion, name):
    (laion / name).write_bytes(b"\x1f\x8b" + b"x" * 2000)
    with pytest.raises(ValueError, match=rf"{name} is compressed.*unpack it \(gunzip"):
        Shards(str(laion / name), 6)


def test_a_folder_of_compressed_shards_alone_says_so(tmp_path):
    (tmp_path / "0.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(MissingData, match=r"no \.tar file is there \(1 compressed ones are: unpack"):
        Shards(str(tmp_path), 6)


def test_members_with_dots_in_their_names_are_read(tmp_path):
    names = [*(f"img_{n}" for n in range(3)), *(f"shot_1.{n}" for n in range(3)), "a/v1.2/x.y"]
    contents = {
        f"{name}.{end}": png(n) if end == "png" else b"a" for n, name in enumerate(names) for end in ("png", "txt")
    }
    contents |= {
        "img_0.seg.png": b"no picture",
        "img_0.cls": b"3",
        "img_1.cls": b"3",
        "._img_9.png": b"",
        ".c/q.png": b"",
    }
    source = Shards(str(members(tmp_path / "dots.tar", contents)), 6)
    record = everything(source)
    keys = [source.name(index).rpartition(": ")[2] for index in range(len(source))]
    assert dict(zip(keys, numbers(record), strict=True)) == {name: n for n, name in enumerate(names)}
    assert source.passed_over == {".png": 1, ".cls": 2}


def test_a_damaged_index_is_named_and_made_again(laion, data_folder_of_its_own, caplog):
    before = everything(Shards(str(laion), 6))["caption"]
    index = sorted((data_folder_of_its_own / "index").glob("*.npz"))[0]
    for content in (b"", b"PK no zip", index.read_bytes()[:200]):
        index.write_bytes(content)
        assert everything(Shards(str(laion), 6))["caption"] == before
        assert f"{index}, the index of {laion}" in caplog.text and "is made again" in caplog.text
        caplog.clear()


BAD = {
    "no picture": {"7.txt": b"a"},
    "no caption": {"7.png": png(0)},
    "more than one picture": [("7.png", png(0)), ("7.txt", b"a"), ("7.png", png(0))],
    "more than one caption": [("7.png", png(0)), ("7.txt", b"a"), ("8.png", png(0)), ("8.txt", b"b"), ("7.txt", b"c")],
    "the caption is not UTF-8": {"7.png": png(0), "7.txt": "é".encode("latin-1")},
    "it has no content": {"7.png": b"", "7.txt": b"a"},
    "no known format": {"7.png": b"x" * 100, "7.txt": b"a"},
    "truncated": {"7.png": png(0, 100, 100)[:-30], "7.txt": b"a"},
    "the json cannot be read": {"7.png": png(0), "7.txt": b"a", "7.json": b'{"a":'},
    "the json is no object, but [1]": {"7.png": png(0), "7.txt": b"a", "7.json": b"[1]"},
}


@pytest.mark.parametrize("why", BAD)
def test_a_bad_sample_is_named_with_its_shard(tmp_path, why):
    source = Shards(str(members(tmp_path / "bad.tar", BAD[why])), 6)
    with pytest.raises(BadSample) as caught:
        everything(source)
    assert f"{tmp_path}/bad.tar: 7" in str(caught.value) and why in str(caught.value)


@pytest.mark.parametrize("meta", [{}, {"caption": None}, {"caption": 3}])
def test_a_json_without_the_caption_is_a_bad_sample(tmp_path, meta):
    write(tmp_path / "0.tar", [{"__key__": "7", "png": png(0), "json": meta}])
    with pytest.raises(BadSample, match=r"0\.tar: 7: 'caption' in the json is (None|3), no text"):
        everything(Shards(str(tmp_path), 6, caption="json.caption"))


def test_a_shard_that_shrank_after_indexing_gives_a_bad_sample(laion):
    source = Shards(str(laion / "00000.tar"), 6)
    last = int(source.offset[:, module.IMAGE].argmax())
    cut(laion / "00000.tar", int(source.offset[last, module.IMAGE]) + 10)
    with pytest.raises(BadSample, match="has become shorter since it was indexed"):
        source.take(np.array([last]))


def test_bad_samples_are_replaced_in_training_and_counted(laion):
    members(laion / "bad.tar", {"x.png": b"", "x.txt": b"x"})
    made = image_shards(str(laion), 6, holdout_images=4, batch_size=4, max_bad_fraction=0.5)
    for batch in islice(made.train_dataloader(), 9):  # three passes
        assert len(says(batch)) == 4
        assert says(batch) == ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


# The index


def test_a_shard_is_indexed_once_until_it_changes(laion, monkeypatch, data_folder_of_its_own):
    indexed: list[str] = []
    write_index = shard_index.write_index

    def counted(shard: Path, *rest: Any) -> None:
        indexed.append(shard.name)
        write_index(shard, *rest)

    monkeypatch.setattr(shard_index, "write_index", counted)
    before = everything(Shards(str(laion), 6))
    assert indexed == ["00000.tar", "00001.tar", "00002.tar"]
    again = everything(Shards(str(laion), 6, start=0, stop=None))
    assert len(indexed) == 3 and again["caption"] == before["caption"]
    write(laion / "00001.tar", [sample(70)])
    assert sorted(says(everything(Shards(str(laion), 6)))) == [*range(5), *range(10, 15), 70]
    assert indexed[3:] == ["00001.tar"]
    assert {file.suffix for file in (data_folder_of_its_own / "index").iterdir()} == {".npz", ".lock"}
    assert len(list(laion.iterdir())) == 9  # nothing is left beside the shards


def test_processes_that_index_at_once_do_it_once(laion, tmp_path, monkeypatch):
    write_index = shard_index.write_index

    def counted(shard: Path, *rest: Any) -> None:
        with open(tmp_path / "indexed", "a") as file:
            file.write(f"{shard.name}\n")
        write_index(shard, *rest)

    monkeypatch.setattr(shard_index, "write_index", counted)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=Shards, args=(str(laion), 6)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted((tmp_path / "indexed").read_text().split()) == ["00000.tar", "00001.tar", "00002.tar"]


def test_an_interrupted_index_leaves_nothing_behind(laion, monkeypatch, data_folder_of_its_own):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shard_index.np, "savez", fail)
        with pytest.raises(OSError, match="No space left"):
            Shards(str(laion), 6)
    assert [file.name for file in (data_folder_of_its_own / "index").glob("*.npz")] == []
    assert len(Shards(str(laion), 6)) == 3 * PER_SHARD


def test_only_headers_are_read_to_index(tmp_path, monkeypatch):
    size = 1_000_000
    members(tmp_path / "0.tar", {f"{n}.{suffix}": b"x" * size for n in range(3) for suffix in ("png", "txt")})
    seen: list[int] = []

    class Counted(io.FileIO):
        def read(self, *size: int) -> bytes:
            content = super().read(*size)
            seen.append(len(content))
            return content

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "bltn_open", lambda path, _: Counted(path))
        assert len(Shards(str(tmp_path), 6)) == 3
    assert 0 < sum(seen) < 20_000


# Order, workers, resuming


def test_holdout_and_training_share_no_sample_and_cover_all_shards(laion):
    made = image_shards(str(laion), 6, holdout_images=6, batch_size=3)
    held, trained = (says(everything(made.source(split))) for split in ("holdout", "train"))
    assert len(held) == 6 and sorted(held + trained) == list(range(3 * PER_SHARD))
    assert len({number // PER_SHARD for number in held}) > 1
    assert held == says(
        everything(image_shards(str(laion), 6, holdout_images=6, batch_size=3, seed=9).source("holdout"))
    )


def stream(path: Path, workers: int) -> Any:
    made = image_shards(str(path), 6, holdout_images=3, batch_size=4, seed=1, flip=True, num_workers=workers)
    return made.train_dataloader()


def test_batches_are_the_same_with_workers_and_after_resuming(laion):
    expected = [(batch["caption"], batch["image"]) for batch in islice(stream(laion, 0), 7)]
    loader = stream(laion, 2)
    first = [(batch["caption"], batch["image"]) for batch in islice(loader, 3)]
    resumed = stream(laion, 2)
    resumed.load_state_dict(loader.state_dict())
    rest = [(batch["caption"], batch["image"]) for batch in islice(resumed, 4)]
    for (captions, images), (texts, pictures) in zip(expected, first + rest, strict=True):
        assert captions == texts and torch.equal(images, pictures)


def test_a_source_can_be_sent_to_another_process_with_open_files(laion):
    source = Shards(str(laion), 6)
    expected = everything(source)
    assert source.open_files
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301  as workers that do not fork are given it
    assert not copy.open_files and everything(copy)["caption"] == expected["caption"] == list(copy.captions)


def test_no_more_files_are_open_than_allowed(laion, monkeypatch):
    monkeypatch.setattr(module, "OPEN_FILES", 2)
    source = Shards(str(laion), 6)
    assert says(everything(source)) == numbers(everything(source)) and len(source.open_files) == 2


# As a choice of data


def test_the_configuration_makes_shards(configure, laion):
    made = build(
        configure(
            "data=shards",
            f'data.path="{laion}/{{00000..00002}}.tar"',
            "data.size=6",
            "data.holdout_images=4",
            "data.batch_size=3",
        ).data
    )
    assert len(made.source("train")) == 11 and len(made.source("holdout")) == 4
    assert made.image_shape() == (3, 6, 6)
