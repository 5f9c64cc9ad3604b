"""What each criterion measures that compares one forward pass with another, and when it stops."""

import functools
import math

import numpy as np
import pytest
import torch
from support.criteria import IDENTITY, SAMPLES, Fake, batches, close, column, scored, whole_batch
from torch import Tensor

from criteria.scores.block_influence import BlockInfluence
from criteria.scores.ld_pruner import LDPruner
from criteria.scores.magnitude import Magnitude
from criteria.scores.output_loss import OutputLoss
from criteria.scores.task_loss import TaskLoss
from criteria.scores.taylor import Taylor

EVERY = {
    "output_loss": OutputLoss,
    "task_loss": TaskLoss,
    "taylor": Taylor,
    "taylor with a threshold": functools.partial(Taylor, threshold=0.9, buckets=3),
    "block_influence": BlockInfluence,
    "ld_pruner": functools.partial(LDPruner, IDENTITY, 1),
}


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_scores_do_not_depend_on_batch_size_or_sample_order(make):
    found = scored(make())
    for other in (batches(1), batches(4), batches(SAMPLES), batches()[::-1]):
        close(scored(make(), of=other), found)


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_states_summed_over_ranks_give_the_scores_of_one_process(make):
    ranks = []
    for rank in range(2):
        backbone, criterion = Fake(), make()
        criterion.start(backbone, backbone.units(), 0)
        for batch in batches()[rank::2]:
            criterion.update(batch)
        ranks.append(criterion)
    assert ranks[0].states.keys() == ranks[1].states.keys()
    ranks[0].states = {key: value + ranks[1].states[key] for key, value in ranks[0].states.items()}
    close(ranks[0].finish(), scored(make()))


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_a_criterion_can_be_started_again(make):
    criterion = make()
    assert scored(criterion) == scored(criterion)


# Output loss and task loss


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
def test_task_loss_is_the_mean_of_paired_differences(seed):
    backbone, inputs = whole_batch(seed)
    found = scored(TaskLoss(), seed=seed)
    dense = backbone.losses(backbone.predict(inputs), inputs)
    for unit in "abc":
        with backbone.without([unit]):
            harm = (backbone.losses(backbone.predict(inputs), inputs) - dense).numpy()
        np.testing.assert_allclose(found[unit]["score"], harm.mean(), rtol=1e-12)
        np.testing.assert_allclose(found[unit]["standard_error"], harm.std(ddof=1) / math.sqrt(SAMPLES), rtol=1e-9)


def test_task_loss_is_negative_where_the_removal_helps():
    backbone = Fake()
    backbone.calibration_inputs = lambda batch, seed: {"sample": batch["image"], "target": without_b(batch["image"])}

    @torch.no_grad()
    def without_b(images: Tensor) -> Tensor:
        with backbone.without("b"):
            return backbone.predict({"sample": images})

    found = scored(TaskLoss(), backbone)
    assert found["b"]["score"] < 0
    output_loss = scored(OutputLoss(), backbone)
    np.testing.assert_allclose(found["b"]["score"], -output_loss["b"]["score"], rtol=1e-12)


# Block influence


@torch.no_grad()
def test_block_influence_is_one_minus_the_cosine_of_input_and_output():
    backbone, inputs = whole_batch()
    found, x = scored(BlockInfluence()), inputs["sample"].numpy()
    for unit in "abc":
        layer = getattr(backbone, unit)
        y = x + x @ layer.weight.numpy().T + layer.bias.numpy()
        harm = 1 - (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        np.testing.assert_allclose(found[unit]["score"], harm.mean(), rtol=1e-9)
        np.testing.assert_allclose(found[unit]["standard_error"], harm.std(ddof=1) / math.sqrt(SAMPLES), rtol=1e-9)
        x = y


@pytest.mark.parametrize(("factor", "expected"), [(0.0, 0.0), (1.0, 0.0), (-2.0, 2.0)])
def test_block_influence_of_a_unit_that_scales_or_turns_round(factor, expected):
    """x + f x: nothing is added, the same is added, or twice the same is taken away."""
    backbone = Fake()
    with torch.no_grad():
        backbone.b.weight.copy_(factor * torch.eye(4))
        backbone.b.bias.zero_()
    np.testing.assert_allclose(scored(BlockInfluence(), backbone)["b"]["score"], expected, atol=1e-12)


# Magnitude


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_magnitude_looks_at_no_data(reduction):
    backbone, criterion = Fake(), Magnitude(reduction)
    assert criterion.needs == "nothing"
    criterion.start(backbone, backbone.units(), 0)
    for unit, score in zip(backbone.units(), column(criterion.finish()), strict=True):
        weights = torch.cat([weight.detach().flatten() for weight in backbone.freed_weights(unit, backbone.weights())])
        np.testing.assert_allclose(score, float(getattr(weights.abs(), reduction)()), rtol=1e-12)


# Early stopping

GRID = [0.1, 0.3, 0.6]


class Scripted(OutputLoss):
    """The scores after each batch are given, and nothing is measured."""

    def __init__(self, script: list[list[float]], **fields) -> None:
        super().__init__(**fields)
        self.script = script

    def compute(self):
        return {unit: {"score": score} for unit, score in zip("abc", self.script[self.stopping.batches], strict=True)}

    def stops_after(self, backbone: Fake) -> int | None:
        """The number of batches after which nothing more needs to be looked at; None where all are."""
        self.start(backbone, backbone.units(), 0)
        assert not self.settled()
        for count in range(1, len(self.script) + 1):
            self.stopping.observe({unit: entry["score"] for unit, entry in self.compute().items()})
            if self.settled():
                return count
        return None


def test_scoring_settles_once_no_plan_changed_over_the_last_batches():
    """Three units of equal size and a grid with room for one unit or two: what counts is the order of the scores."""
    script = [[1, 2, 3], [1, 2, 3], [1, 3, 2], [2, 6, 4], [2, 6, 5], [2, 6, 5.0]]
    fields = {"ratios": [1 / 3, 2 / 3]}
    for batches_at_least, stable_for, expected in [(1, 1, 2), (1, 2, 5), (1, 3, 6), (1, 4, None), (4, 1, 4), (6, 2, 6)]:
        criterion = Scripted(script, batches_at_least=batches_at_least, stable_for=stable_for, **fields)
        assert criterion.stops_after(Fake()) == expected


def test_scoring_never_settles_without_stable_for_or_a_feasible_ratio():
    script = [[1.0, 2.0, 3.0]] * 6
    assert Scripted(script, ratios=GRID).stops_after(Fake()) is None
    assert Scripted(script, batches_at_least=1, stable_for=1, ratios=[0.1, 0.5]).stops_after(Fake()) is None
    assert Scripted(script, batches_at_least=1, stable_for=1, ratios=[0.1, 1 / 3]).stops_after(Fake()) == 2


def test_scores_that_are_not_finite_settle_nothing():
    script = [[1.0, 2.0, 3.0], [1.0, 2.0, math.nan], [1.0, 2.0, math.nan], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    assert Scripted(script, batches_at_least=1, stable_for=1, ratios=[1 / 3]).stops_after(Fake()) == 5


@pytest.mark.parametrize("make", [OutputLoss, TaskLoss])
def test_a_criterion_that_settles_has_the_scores_of_its_batches(make):
    criterion, backbone = make(batches_at_least=2, stable_for=1, ratios=[2 / 3]), Fake()
    criterion.start(backbone, backbone.units(), 0)
    seen = []
    for batch in batches(2)[:1] * 5:
        criterion.update(batch)
        seen.append(batch)
        if criterion.settled():
            break
    assert len(seen) == 2  # the same batch again changes nothing
    assert criterion.finish() == scored(make(), of=seen)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stable_for": 0}, r"criterion\.stable_for=0 is out of range; choose a whole number of 1 or more"),
        ({"batches_at_least": 0}, r"criterion\.batches_at_least=0 is out of range"),
        ({"stable_for": 1}, r"criterion\.ratios=None cannot be a grid to stop on"),
        ({"stable_for": 1, "ratios": []}, r"criterion\.ratios=\[\] cannot be a grid"),
        ({"ratios": [0.5, 1.5]}, r"criterion\.ratios=\[1\.5\] cannot be .* choose ratios between 0 and 1"),
    ],
)
def test_early_stopping_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OutputLoss(**fields)
