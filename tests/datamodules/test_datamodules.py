"""Streams and subsets: the same data in the same order, whatever the batches, ranks, workers and resumes."""

import hashlib
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.images import pictures

from conf.schema import build
from datamodules.base import EndlessShuffle
from datamodules.images import Images, ImageSet
from datamodules.readers.arrays import Arrays
from datamodules.seeding import derive, numpy_rng, torch_rng
from experiments.engine.pipeline import run_pipeline
from experiments.engine.stages.score import hash_batches

quickly = settings(derandomize=True, database=None, deadline=None, max_examples=60)


def images(train: int = 10, holdout: int = 4, **options: object) -> Images:
    given = {"batch_size": 4, "seed": 0} | options
    return Images(train=lambda: Arrays(pictures(train)), holdout=lambda: Arrays(pictures(holdout, seed=1)), **given)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


# Seeds


def test_a_derived_seed_depends_on_its_parts_alone():
    assert derive(0, "order", 1) == int.from_bytes(hashlib.sha256(b"0/order/1").digest()[:8], "little") >> 1
    assert len({derive(0), derive(1), derive(0, 0), derive(0, "a"), derive("a", 0), derive(0, 1), derive(1, 0)}) == 7
    assert torch.equal(torch.rand(3, generator=torch_rng(0, "a")), torch.rand(3, generator=torch_rng(0, "a")))
    assert numpy_rng(0, "a").random() == numpy_rng(0, "a").random() != numpy_rng(0, "b").random()


# The stream


@quickly
@given(st.integers(1, 30), st.integers(0, 5), st.integers(1, 4))
def test_every_pass_of_the_stream_is_a_permutation(length, seed, passes):
    positions = list(islice(EndlessShuffle(length, seed, 0, 1), passes * length))
    for number in range(passes):
        part = positions[number * length : (number + 1) * length]
        assert sorted(part) == list(range(number * length, (number + 1) * length))


def test_the_order_depends_on_seed_and_pass():
    def order(seed: int) -> list[int]:
        return list(islice(EndlessShuffle(50, seed, 0, 1), 100))

    assert order(0) == order(0) != order(1)
    assert [position - 50 for position in order(0)[50:]] != order(0)[:50]


@quickly
@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 3))
def test_ranks_together_see_exactly_what_one_process_sees(length, world, seed):
    rounds = 3 * length
    ranks = [list(islice(EndlessShuffle(length, seed, rank, world), rounds)) for rank in range(world)]
    alone = list(islice(EndlessShuffle(length, seed, 0, 1), rounds * world))
    assert [ranks[place % world][place // world] for place in range(rounds * world)] == alone


def on_rank(rank: int, world: int, **options: object) -> Images:
    data = images(**options)
    data.trainer = SimpleNamespace(world_size=world, global_rank=rank)
    return data


def test_batches_of_two_ranks_are_together_those_of_one_process():
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
def test_an_image_depends_on_seed_and_position_alone(positions, seed):
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


def test_about_every_other_image_is_mirrored():
    plain = ImageSet(Arrays(pictures(1))).__getitems__([0])["image"][0]
    flipped = ImageSet(Arrays(pictures(1)), flip=True).__getitems__(list(range(200)))["image"]
    mirrored = [torch.equal(image, plain.flip(2)) for image in flipped]
    assert all(was or torch.equal(image, plain) for was, image in zip(mirrored, flipped, strict=True))
    assert 70 < sum(mirrored) < 130


def test_a_crop_is_any_window_of_the_padded_image():
    image = pictures(1)[0]
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    windows = {padded[top : top + 6, left : left + 6].tobytes() for top in range(3) for left in range(3)}
    data = ImageSet(Arrays(image[None]), crop=1)
    assert {data.augment(image, position).tobytes() for position in range(200)} == windows


# Loading and resuming


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumed_within_a_pass_gives_the_remaining_batches(workers):
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


def test_subsets_of_two_seeds_differ():
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


@pytest.mark.parametrize(("batch_size", "looked_at"), [(10, 30), (2, 50)])
def test_the_key_of_scores_reads_up_to_64_batches(monkeypatch, batch_size, looked_at):
    batches = images(train=300).subset("train", 300, 0, batch_size)
    expected = hashlib.sha256()
    for number, batch in enumerate(batches):
        if number % (300 // batch_size // looked_at) == 0:
            for name in sorted(batch):
                expected.update(batch[name].numpy().tobytes())
    loads = []
    load = type(batches.dataset).__getitems__
    monkeypatch.setattr(type(batches.dataset), "__getitems__", lambda self, n: loads.append(n) or load(self, n))
    assert hash_batches(batches) == expected.hexdigest() and len(loads) == looked_at
    assert hash_batches(images(train=300).subset("train", 300, 1, batch_size)) != expected.hexdigest()


# Data that cannot be used


def test_more_samples_than_there_are_names_both_numbers():
    with pytest.raises(ValueError, match=r"samples=5: data\.holdout has 4 samples; choose a number up to that"):
        images().subset("holdout", 5, 0, 4, field="samples")


def test_a_split_without_images_is_named():
    with pytest.raises(ValueError, match=r"data\.train is empty"):
        images(train=0).train_dataloader()
    with pytest.raises(ValueError, match=r"data\.holdout is empty"):
        images(holdout=0).subset("holdout", 1, 0, 1)


def test_fewer_images_than_a_batch_names_both_numbers():
    with pytest.raises(ValueError, match=r"data\.batch_size=11 is more than the 10 training samples"):
        images(train=10, batch_size=11).train_dataloader()
    assert len(next(iter(images(train=10, batch_size=10).train_dataloader()))["index"]) == 10


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"data\.batch_size=4 cannot be shared by 3 ranks"):
        on_rank(0, 3).train_dataloader()


@pytest.mark.parametrize(("size", "channels"), [(16, 3), (8, 1)])
def test_images_of_another_shape_are_refused_with_both_shapes(configure, overrides, tmp_path, size, channels):
    path = tmp_path / "other.npz"
    other = np.zeros((64, size, size, channels), np.uint8)
    np.savez(path, x_train=other, x_test=other, y_train=np.zeros(64), y_test=np.zeros(64))
    cfg = configure(*overrides, f"data.train.path={path}", f"data.holdout.path={path}")
    with pytest.raises(ValueError) as caught:
        run_pipeline(cfg)
    message = str(caught.value)
    assert "data=tiny" in message and str((channels, size, size)) in message and str((3, 8, 8)) in message
    assert not list(tmp_path.rglob("scores.json"))


def test_an_augmented_subset_is_a_function_of_its_own_seed():
    def batches(data_seed: int, seed: int, augment: bool) -> list[dict[str, torch.Tensor]]:
        data = images(train=12, seed=data_seed, crop=2)
        return list(data.subset("train", 12, seed, 5, augment=augment))

    plain, augmented = batches(0, 3, augment=False), batches(0, 3, augment=True)
    for one, other, again in zip(plain, augmented, batches(1, 3, augment=True), strict=True):
        assert torch.equal(one["index"], other["index"]) and not torch.equal(one["image"], other["image"])
        assert torch.equal(other["image"], again["image"])
    in_order = [
        torch.cat([b["image"] for b in found])[torch.cat([b["index"] for b in found]).argsort()]
        for found in (augmented, batches(0, 4, augment=True))
    ]
    assert not torch.equal(*in_order)
