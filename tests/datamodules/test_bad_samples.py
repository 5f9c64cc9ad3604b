"""Bad samples: skipped, replaced as a function of (seed, position), counted, and too many of them stop a run."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from PIL import Image
from support.images import pictures

from conf.schema import Trainer
from datamodules.bad_samples import ATTEMPTS, MIN_COUNTED, BadSampleCounter, TooManyBadSamples
from datamodules.images import Images, ImageSet, image_folder
from datamodules.readers.arrays import Arrays
from datamodules.readers.base import BadSample, LazyTexts, Record
from datamodules.readers.folder import Folder
from datamodules.seeding import derive
from experiments.engine.pipeline import run_pipeline
from lightning_modules.training.trainer import fit

# What is bad


def noise(file: Path, size: int = 16, **options: Any) -> None:
    Image.fromarray(pictures(1, size)[0]).save(file, **options)


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def truncated(suffix: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        noise(root / f"bad.{suffix}")
        cut(root / f"bad.{suffix}")
        return root / f"bad.{suffix}"

    return make


def written(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        (root / name).write_bytes(content)
        return root / name

    return make


def saved(name: str, picture: Image.Image) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        picture.save(root / name)
        return root / name

    return make


BAD = {
    "zero bytes": (written("bad.png", b""), "no known format"),
    "no picture": (written("bad.jpg", b"<html>not found</html>"), "no known format"),
    "truncated jpeg": (truncated("jpg"), "OSError: "),
    "truncated png": (truncated("png"), "OSError: "),
    "truncated webp": (truncated("webp"), "OSError: "),
    "1x1": (saved("bad.png", Image.new("RGB", (1, 1))), "it has 1x1 pixels; the least is 4x4"),
    "3x100": (saved("bad.png", Image.new("RGB", (3, 100))), "it has 3x100 pixels; the least is 4x4"),
    "floating point": (
        saved("bad.tif", Image.new("F", (9, 9), 0.5)),
        "floating-point pixels, here from 0.5 to 0.5, have no known range",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_picture_that_cannot_be_used_is_a_bad_sample_and_named(tmp_path, kind):
    make, said = BAD[kind]
    file = make(tmp_path)
    with pytest.raises(BadSample) as caught:
        Folder(str(tmp_path), 8).take(np.array([0]))
    assert str(caught.value).startswith(f"{file} cannot be used: ") and said in str(caught.value)
    assert "0x" not in str(caught.value)  # an address in memory: the message would be another one in the next run


def test_a_picture_too_large_to_decode_is_a_bad_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    noise(tmp_path / "bad.png")
    with pytest.raises(BadSample, match="DecompressionBombError"):
        Folder(str(tmp_path), 8).take(np.array([0]))


# Replacement


class Holed(Arrays):
    """Pictures of which some are bad."""

    def __init__(self, count: int, bad: set[int]) -> None:
        super().__init__(pictures(count), np.arange(count))
        self.bad = bad
        self.captions = LazyTexts(count, self.text)

    def text(self, index: int) -> str:
        if index in self.bad:
            raise BadSample(f"{index} is bad")
        return f"picture {index}"

    def take(self, indices: np.ndarray) -> Record:
        return super().take(indices) | {"caption": [self.text(int(index)) for index in indices]}


BADS = {1, 5, 6}


def holed(count: int = 12, bad: set[int] = BADS, **options: Any) -> Images:
    given = {"batch_size": 6, "seed": 3, "max_bad_fraction": 1.0} | options
    return Images(train=lambda: Holed(count, bad), holdout=lambda: Holed(count, bad), **given)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[key], other[key]) if isinstance(one[key], torch.Tensor) else one[key] == other[key]
        for key in one
    )


def test_a_replacement_is_a_function_of_seed_and_position():
    source, clean = Holed(12, BADS), Arrays(pictures(12), np.arange(12))
    for position in range(24):
        batch = ImageSet(source, seed=3, flip=True).__getitems__([position])
        index = position % 12
        if index in BADS:
            tries = (derive(3, position, "replacement", attempt) % 12 for attempt in range(ATTEMPTS))
            used = next(other for other in tries if other not in BADS)
            assert batch["skipped"] == [f"{index} is bad"]
        else:
            used = index
            assert "skipped" not in batch
        assert batch["index"].tolist() == batch["label"].tolist() == [used]
        assert batch["caption"] == [f"picture {used}"]
        straight = ImageSet(clean).__getitems__([used])["image"]
        assert any(torch.equal(batch["image"], image) for image in (straight, straight.flip(3)))
    assert len({int(ImageSet(source, s).__getitems__([1])["index"]) for s in range(20)}) > 3


def test_a_replacement_does_not_depend_on_what_else_is_in_the_batch():
    data = ImageSet(Holed(12, BADS), seed=3, flip=True, crop=1)
    together = data.__getitems__(list(range(12)))
    assert together["skipped"] == [f"{index} is bad" for index in sorted(BADS)]
    assert set(together["index"].tolist()).isdisjoint(BADS)
    for position in range(12):
        alone = data.__getitems__([position])
        alone.pop("skipped", None)
        part = {key: value[position : position + 1] for key, value in together.items() if key != "skipped"}
        assert same(alone, part)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_resuming_do_not_change_replacements(workers):
    undisturbed = list(islice(holed().train_dataloader(), 6))
    assert sum(len(batch.get("skipped", [])) for batch in undisturbed) == 9  # three passes
    loader = holed(num_workers=workers).train_dataloader()
    before = list(islice(iter(loader), 3))
    resumed = holed(num_workers=workers).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    after = list(islice(iter(resumed), 3))
    assert all(same(*pair) for pair in zip(before + after, undisturbed, strict=True))


@pytest.mark.parametrize("world", [2, 3])
def test_batches_of_ranks_with_bad_samples_are_those_of_one_process(world):
    loaders = []
    for rank in range(world):
        data = holed()
        data.trainer = SimpleNamespace(world_size=world, global_rank=rank)
        loaders.append(iter(data.train_dataloader()))
    for batch in islice(holed().train_dataloader(), 6):
        parts = [next(loader) for loader in loaders]
        assert [len(part["index"]) for part in parts] == [6 // world] * world
        assert torch.equal(torch.stack([part["image"] for part in parts], 1).flatten(0, 1), batch["image"])
        skipped = [message for part in parts for message in part.get("skipped", [])]
        assert sorted(skipped) == sorted(batch.get("skipped", []))


def test_a_subset_with_replacements_is_fixed_and_reports_once(capsys):
    data = holed()
    loaded = list(data.subset("train", 12, seed=0, batch_size=5))
    index = torch.cat([batch["index"] for batch in loaded])
    assert len(index) == 12 and set(index.tolist()).isdisjoint(BADS)
    assert torch.cat([batch["number"] for batch in loaded]).tolist() == list(range(12))
    (whole,) = holed().subset("train", 12, seed=0, batch_size=12)
    assert torch.equal(index, whole["index"]) and len(whole["skipped"]) == 3
    capsys.readouterr()
    subset = data.subset("holdout", 12, seed=0, batch_size=5)
    assert [batch["index"].tolist() for batch in subset] == [batch["index"].tolist() for batch in subset]
    assert capsys.readouterr().out.count("data.holdout: 3 of 12 samples were replaced (25.00%)") == 1


def test_captions_and_pictures_are_replaced_as_in_subsets():
    data = holed()
    captions, record = data.captions("train", 12), data.take("train", np.arange(12))
    assert captions == record["caption"] == [f"picture {label}" for label in record["label"]]
    used = ImageSet(Holed(12, BADS)).__getitems__(list(range(12)))
    assert record["label"].tolist() == used["index"].tolist()
    assert data.captions("train", 5) == captions[:5]
    assert Images(train=lambda: Arrays(pictures(3)), holdout=None, batch_size=1).captions("train", 3) is None
    assert holed(bad={0}).image_shape() == (3, 6, 6)


# Too many


def test_too_many_bad_samples_are_an_error_with_five_messages():
    skipped = BadSampleCounter("data.train", 0.01)
    clean, bad = {"index": range(100)}, {"index": range(100), "skipped": ["why"]}
    for number in range(5):
        skipped.add({"index": range(4), "skipped": [f"picture {number}"]})  # a fifth of few is no reason
    with pytest.raises(TooManyBadSamples) as caught:
        skipped.add({"index": range(4), "skipped": ["the sixth"]})
    assert str(caught.value) == (
        "data.train: 6 of 24 samples cannot be used, more than data.max_bad_fraction=0.01 allows (of at least 500). "
        "Repair the data, or raise the limit (+data.max_bad_fraction=... where the data set's file has no such field). "
        "The first:\n" + "\n".join(f"  picture {number}" for number in range(5))
    )
    many = BadSampleCounter("data.train", 0.01)
    for _ in range(10):
        many.add(bad)  # exactly a hundredth
    many.add(clean)
    many.add({"index": range(100), "skipped": ["why", "why"]})
    with pytest.raises(TooManyBadSamples, match="13 of 1201 samples"):
        many.add({"index": range(1), "skipped": ["why"]})
    with pytest.raises(TooManyBadSamples, match="1 of 100 samples"):
        BadSampleCounter("data.train", 0.0).add(bad)
    assert MIN_COUNTED == 500


def test_a_count_goes_over_a_resume():
    before, after = BadSampleCounter("data.train", 0.01), BadSampleCounter("data.train", 0.01)
    for _ in range(4):
        before.add({"index": range(4), "skipped": ["why"]})
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.state_dict() == {"seen": 16, "count": 4, "first": ["why"] * 4}
    with pytest.raises(TooManyBadSamples, match="6 of 18 samples"):
        after.add({"index": range(2), "skipped": ["why", "why"]})


class Idle(pl.LightningModule):
    """Trains nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_resumed_training_counts_on(tmp_path):
    conf = OmegaConf.structured(Trainer(accelerator="cpu", precision="32-true", steps=7, checkpoint_every=3))
    undisturbed, resumed = holed(), holed()
    fit(Idle(), undisturbed, conf, tmp_path, "idle")
    (tmp_path / "checkpoints" / "idle" / "step=0000006.ckpt").unlink()
    fit(Idle(), resumed, conf, tmp_path, "idle")  # from step 3 on
    counts = undisturbed.skipped.state_dict()
    assert resumed.skipped.state_dict() == counts and counts["seen"] == 7 * 6
    stored = torch.load(tmp_path / "checkpoints" / "idle" / "step=0000003.ckpt", weights_only=True)["Images"]
    assert stored["seen"] == 3 * 6 and 0 < stored["count"] < counts["count"]


@pytest.mark.parametrize("workers", [0, 1])
def test_data_with_only_bad_samples_stop_at_once(workers):
    data = holed(bad=set(range(12)), num_workers=workers)
    for use in (data.image_shape, lambda: next(iter(data.train_dataloader()))):
        with pytest.raises(TooManyBadSamples) as caught:
            use()
        assert f"none of {ATTEMPTS} others can in its place" in str(caught.value)
        assert str(caught.value).count(" is bad\n") + str(caught.value).endswith(" is bad") >= 5


def test_a_subset_with_too_many_bad_samples_stops_in_any_order():
    for bad, stops in ((range(0, 600, 100), False), (range(0, 600, 99), True)):  # six are a hundredth
        data = holed(count=600, bad=set(bad), max_bad_fraction=0.01)
        for seed in range(3):
            subset = data.subset("holdout", 600, seed=seed, batch_size=200)
            if stops:
                with pytest.raises(TooManyBadSamples, match=r"data\.holdout: 7 of \d+ samples"):
                    list(subset)
            else:
                assert len(list(subset)) == 3


@pytest.mark.parametrize("fraction", [-0.1, 1.5])
def test_a_limit_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"data\.max_bad_fraction=.* is out of range; choose 0 to 1"):
        holed(max_bad_fraction=fraction)


# In a job


@pytest.fixture
def damaged(tmp_path: Path, overrides: list[str]) -> Callable[..., list[str]]:
    """damaged(bad): a job on a folder of 40 pictures, of which some are empty files."""

    def make(bad: int) -> list[str]:
        root = tmp_path / "pictures"
        root.mkdir()
        for number, picture in enumerate(pictures(40, 8)):
            Image.fromarray(picture).save(root / f"{number}.png")
        for number in range(bad):
            (root / f"{number}.png").write_bytes(b"")
        kept = [override for override in overrides if not override.startswith("data")]
        data = ["data=image_folder", f"data.path={root}", "data.size=8", "data.holdout_images=16", "data.batch_size=12"]
        return [*kept, *data, "evaluation.loss_samples=16", "calibration.samples=24", "trainer.checkpoint_every=2"]

    return make


@pytest.mark.slow
def test_a_job_replaces_and_counts_its_bad_samples(configure, damaged, tmp_path, capsys, quick_end):
    run_pipeline(configure(*damaged(2)))
    out = capsys.readouterr().out
    files = [str(tmp_path / "pictures" / f"{number}.png") for number in range(2)]
    assert any(f"is replaced by another: {file} cannot be used: no known format of pictures" in out for file in files)
    source = image_folder(str(tmp_path / "pictures"), 8, 16, 12).source("train")
    bad = sum(source.file(index).name in ("0.png", "1.png") for index in range(24))
    (checkpoint,) = tmp_path.rglob("step=0000004.ckpt")
    counted = torch.load(checkpoint, weights_only=True)["Images"]  # four batches of 12 are two passes
    assert bad and (counted["seen"], counted["count"]) == (48, 2 * bad)
    assert f"data.train: {2 * bad} of 48 samples were replaced" in out


def test_a_job_with_too_many_bad_samples_stops_before_it_trains(configure, damaged, tmp_path):
    with pytest.raises(TooManyBadSamples) as caught:
        run_pipeline(configure(*damaged(20)))
    assert "more than data.max_bad_fraction=0.01 allows" in str(caught.value)
    assert str(caught.value).count("no known format of pictures") == 5
    assert not list(tmp_path.rglob("*.ckpt"))
