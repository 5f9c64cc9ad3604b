"""Scoring that ends when the plan is stable: under the Trainer, and on batches that speak for all."""

import numpy as np
import torch
from support.classification import tiny_classifier
from support.networks import tiny_backbone, tiny_batch
from test_criteria import CPU, make_trainer
from torch.utils.data import DataLoader

from criteria.scores.block_influence import BlockInfluence
from criteria.scores.bottleneck import Bottleneck
from criteria.scores.output_loss import OutputLoss
from datamodules.images import Images
from datamodules.readers.arrays import Arrays
from lightning_modules.modules.scoring import score


def scored(stable_for: int | None, batches: int) -> tuple[dict, int]:
    backbone = tiny_backbone("UNet2DModel")
    whole, seen = tiny_batch(backbone, batches), []

    class Watched(OutputLoss):
        def update(self, batch):
            seen.append(int(batch["number"][0]))
            super().update(batch)

    loader = DataLoader(
        [{key: value[i : i + 1] for key, value in whole.items()} for i in range(batches)], batch_size=None
    )
    criterion = Watched(batches_at_least=2, stable_for=stable_for, ratios=[0.3, 0.5])
    trainer = make_trainer(CPU, "score units", "32-true")
    return score(criterion, backbone, backbone.units(), loader, trainer, 0), len(seen)


def test_scoring_ends_under_the_trainer_once_the_plan_is_stable():
    whole, seen = scored(None, 12)
    found, batches = scored(2, 12)
    assert seen == 12 and 3 <= batches < 12
    assert found != whole  # the rest was not looked at
    assert scored(2, 12) == (found, batches)


def numbered(data: Images, spread: bool) -> dict[int, torch.Tensor]:
    """{number: image} in the order of the batches."""
    batches = list(data.subset("train", 64, 0, 4, spread))
    return {int(n): image for batch in batches for n, image in zip(batch["number"], batch["image"], strict=True)}


def test_spread_batches_mix_the_same_samples_over_the_whole_range():
    images = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 3), dtype=np.uint8)
    data = Images(lambda: Arrays(images), lambda: Arrays(images), batch_size=4)
    plain, spread = numbered(data, False), numbered(data, True)
    assert plain.keys() == spread.keys() and all(torch.equal(plain[n], spread[n]) for n in plain)
    assert list(plain) == list(range(64))
    order = list(spread)
    assert all([n // 16 for n in order[i : i + 4]] == [0, 1, 2, 3] for i in range(0, 64, 4))  # as timesteps go
    assert order[::4] != sorted(order[::4])
    assert list(spread) == list(numbered(data, True))


def test_batches_are_spread_if_scoring_may_stop_early():
    diffusion, classifier = tiny_backbone("UNet2DModel"), tiny_classifier()
    assert not OutputLoss().spreads_batches(diffusion) and not BlockInfluence().spreads_batches(diffusion)
    assert OutputLoss(stable_for=3, ratios=[0.5]).spreads_batches(classifier)
    assert Bottleneck(ratio=0.5).spreads_batches(diffusion) and not Bottleneck(ratio=0.5).spreads_batches(classifier)
