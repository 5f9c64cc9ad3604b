"""LD-Pruner and the CLIP score: what criteria measure that look at generated samples."""

import math

import numpy as np
import pytest
import torch
from support.criteria import IDENTITY, SAMPLES, Fake, batches, column, scored
from torch import nn
from transformers import CLIPModel, CLIPProcessor

from criteria.scores.clip_score import ClipScore
from criteria.scores.ld_pruner import LDPruner

# LD-Pruner


@torch.no_grad()
def latents(without: str = "", steps: int = 1, guidance: float = 1.0) -> np.ndarray:
    backbone = Fake()
    with backbone.without(without):
        return backbone.generate(batches(SAMPLES)[0], IDENTITY, steps, guidance).flatten(1).numpy()


@pytest.mark.parametrize("squared", [False, True])
def test_ld_pruner_sums_distances_of_means_and_standard_deviations(squared):
    found = scored(LDPruner(IDENTITY, 3, guidance=2.0, squared=squared))
    dense = latents(steps=3, guidance=2.0)
    for unit in "abc":
        other = latents(unit, steps=3, guidance=2.0)
        distances = [np.linalg.norm(f(dense, axis=0) - f(other, axis=0)) for f in (np.mean, np.std)]
        expected = sum(distance ** (2 if squared else 1) for distance in distances)
        assert found[unit] == {"score": pytest.approx(expected, rel=1e-9), "diverged": 0}


def test_ld_pruner_gives_a_unit_that_does_nothing_exactly_zero():
    backbone = Fake()
    with torch.no_grad():
        for parameter in backbone.b.parameters():
            parameter.zero_()
    a, b, c = column(scored(LDPruner(IDENTITY, 1), backbone))
    assert b == 0 and min(a, c) > 0


def test_ld_pruner_grows_with_what_a_unit_does():
    scores = []
    for scale in (0.5, 1.0, 2.0):
        backbone = Fake()
        with torch.no_grad():
            for parameter in backbone.c.parameters():
                parameter.mul_(scale)
        scores.append(scored(LDPruner(IDENTITY, 1), backbone)["c"]["score"])
    assert scores == sorted(scores) and scores[0] < scores[1] < scores[2]


class Diverging(Fake):
    """Without some units some latents of the last batch are not finite; the generator may say so itself."""

    def __init__(self, units: str, says_so: bool) -> None:
        super().__init__()
        self.wild, self.says_so = set(units), says_so

    def generate(self, batch, sampler, steps, guidance=1.0):
        samples = super().generate(batch, sampler, steps, guidance)
        if self.removed & self.wild and SAMPLES - 1 in batch["seed"]:
            if self.says_so:
                raise FloatingPointError
            samples[-1, 0, 0, 0] = math.inf
        return samples


@pytest.mark.parametrize("says_so", [False, True])
def test_ld_pruner_ranks_a_unit_that_prevents_divergence_highest(says_so):
    plain = scored(LDPruner(IDENTITY, 1))
    backbone = Diverging("b", says_so)
    found = scored(LDPruner(IDENTITY, 1), backbone)
    assert [found[unit] for unit in "ac"] == [plain[unit] for unit in "ac"]
    assert found["b"] == {"score": 10 * max(plain[unit]["score"] for unit in "ac"), "diverged": 1}
    assert not backbone.removed
    every = scored(LDPruner(IDENTITY, 1), Diverging("abc", says_so))
    assert column(every) == [10.0] * 3 and column(every, "diverged") == [1] * 3


@pytest.mark.parametrize("make", [LDPruner, ClipScore])
def test_a_dense_network_that_diverges_is_an_error(make, clip):
    criterion = make(lambda sample: sample * math.nan, 1, **({"path": clip} if make is ClipScore else {}))
    with pytest.raises(FloatingPointError):
        scored(criterion)


def test_an_unknown_level_lists_the_choices():
    with pytest.raises(ValueError, match=r"criterion\.level='width' is unknown; choose one of: depth, operator"):
        LDPruner(IDENTITY, 1, level="width")


@pytest.mark.parametrize("make", [LDPruner, ClipScore])
def test_criteria_that_generate_need_seeds_and_a_generating_network(make):
    assert make(IDENTITY, 1).needs == "seeds" and make(IDENTITY, 1, seeds=7).seeds == 7
    assert make(IDENTITY, 1).supports(Fake()) is None
    assert make(IDENTITY, 1).supports(nn.Linear(1, 1)) == "it generates nothing"
    with pytest.raises(ValueError, match=r"criterion\.seeds=0 is out of range"):
        make(IDENTITY, 1, seeds=0)


# CLIP score


@torch.no_grad()
def test_clip_score_is_the_drop_of_the_cosine_between_image_and_caption(clip):
    backbone, batch = Fake(), batches(SAMPLES)[0]
    found = scored(ClipScore(IDENTITY, 2, path=clip), of=[batch])
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)

    def cosines(without: str) -> np.ndarray:
        with backbone.without(without):
            images = backbone.decode(backbone.generate(batch, IDENTITY, 2))
        scores = []
        for image, caption in zip(images, batch["caption"], strict=True):  # one by one: no padding
            inputs = processor(text=[caption], images=[image.numpy()], return_tensors="pt", truncation=True)
            logits = model(**inputs).logits_per_image / model.logit_scale.exp()
            scores.append(100 * float(logits))
        return np.array(scores)

    for unit in "abc":
        harm = cosines("") - cosines(unit)
        assert np.abs(harm).max() > 0.1
        np.testing.assert_allclose(found[unit]["score"], harm.mean(), rtol=1e-4, atol=1e-4)
        error = harm.std(ddof=1) / math.sqrt(SAMPLES)
        np.testing.assert_allclose(found[unit]["standard_error"], error, rtol=1e-4, atol=1e-4)


def test_clip_score_does_not_depend_on_the_batch_size(clip):
    one, other = (scored(ClipScore(IDENTITY, 1, path=clip), of=batches(size)) for size in (2, 5))
    for unit in "abc":
        for key in ("score", "standard_error"):
            np.testing.assert_allclose(one[unit][key], other[unit][key], rtol=1e-3, atol=1e-4)


def test_clip_score_counts_images_that_are_not_finite_as_a_cosine_of_zero(clip):
    found = scored(ClipScore(IDENTITY, 1, path=clip), Diverging("b", True), of=batches(SAMPLES))
    criterion, backbone = ClipScore(IDENTITY, 1, path=clip), Fake()
    criterion.start(backbone, backbone.units(), 0)
    batch = batches(SAMPLES)[0]
    with torch.no_grad():
        dense = criterion.clip_score(backbone.generate(batch, IDENTITY, 1), batch["caption"])
    np.testing.assert_allclose(found["b"]["score"], float(dense.mean()), rtol=1e-9)


def test_clip_score_reads_captions_longer_than_its_text_encoder(clip):
    batch = batches(2)[0] | {"caption": ["a cat " * 20, "a dog"]}
    assert len(scored(ClipScore(IDENTITY, 1, path=clip), of=[batch])) == 3


def test_clip_score_needs_a_network_that_takes_text():
    backbone = Fake()
    backbone.takes_text = False
    assert ClipScore(IDENTITY, 1).supports(backbone) == "it takes no text to compare its images with"


def test_a_missing_clip_model_is_named_with_its_download_command(tmp_path):
    for path in ("nobody/no-such-model", str(tmp_path)):
        with pytest.raises(
            ValueError, match=rf"criterion\.path='{path}' is neither a folder .* run `hf download {path}`"
        ):
            scored(ClipScore(IDENTITY, 1, path=path))


def test_pickled_clip_weights_are_not_read(clip, tmp_path):
    model = CLIPModel.from_pretrained(clip)
    model.config.save_pretrained(tmp_path)
    CLIPProcessor.from_pretrained(clip).save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is neither a folder with a CLIP model in safetensors"):
        scored(ClipScore(IDENTITY, 1, path=str(tmp_path)))
