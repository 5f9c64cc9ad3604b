"""First-order Taylor: products summed before absolute values, the threshold on timesteps, the network untouched."""

import contextlib
import math

import numpy as np
import pytest
import torch
from support.criteria import SAMPLES, Fake, batches, close, column, scored, whole_batch
from torch import Tensor, nn

from criteria.base import Unit
from criteria.scores.taylor import Taylor, divide_by_group_mean


def gradients(backbone: Fake, inputs: dict, of: slice = slice(None)) -> dict[str, list[Tensor]]:
    """d(mean loss)/dw * w of some samples, by unit."""
    loss = backbone.losses(backbone.predict(inputs), inputs)[of].mean()
    weights = {unit.name: backbone.freed_weights(unit, backbone.weights()) for unit in backbone.units()}
    return {
        unit: [g * w for g, w in zip(torch.autograd.grad(loss, ws, retain_graph=True), ws, strict=True)]
        for unit, ws in weights.items()
    }


def summed(products: dict[str, list[Tensor]]) -> list[float]:
    return [sum(float(product.detach().abs().sum()) for product in products[unit]) for unit in "abc"]


def test_taylor_takes_absolute_values_after_the_mean_over_samples():
    backbone, inputs = whole_batch()
    expected = summed(gradients(backbone, inputs))
    np.testing.assert_allclose(column(scored(Taylor())), expected, rtol=1e-5)
    by_sample = [summed(gradients(backbone, inputs, slice(i, i + 1))) for i in range(SAMPLES)]
    assert (np.mean(by_sample, axis=0) > 1.01 * np.array(expected)).all()  # signs do cancel between samples


def test_taylor_is_the_derivative_of_the_loss_by_a_scale_of_the_weights():
    """d loss(s * w) / ds at s = 1 is the sum of the signed products, of one unit of one weight."""
    backbone = Fake()
    backbone.freed_weights = lambda unit, tensors: [tensors[f"{unit.name}.weight"]]
    with torch.no_grad():
        for unit in "abc":
            weight = getattr(backbone, unit).weight
            weight.mul_(torch.zeros(4, 4).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1.0)))
    found, inputs = column(scored(Taylor(), backbone)), whole_batch()[1]
    for unit, score in zip("abc", found, strict=True):
        weight, losses = getattr(backbone, unit).weight.data, []
        for scale in (1 - 1e-5, 1 + 1e-5):
            kept = weight.clone()
            weight.mul_(scale)
            losses.append(float(backbone.losses(backbone.predict(inputs), inputs).mean().detach()))
            weight.copy_(kept)
        np.testing.assert_allclose(score, abs(losses[1] - losses[0]) / 2e-5, rtol=1e-4)


def test_taylor_drops_the_parts_of_the_schedule_with_a_small_loss():
    """Six samples of known loss in three parts; the threshold is a fraction of the largest part's mean."""
    backbone, inputs = whole_batch()
    losses = backbone.losses(backbone.predict(inputs), inputs).detach()
    parts = losses.view(3, 2).mean(1)
    order = parts.argsort(descending=True).tolist()
    for kept in (1, 2, 3):
        threshold = float(parts[order[kept - 1]] / parts.max()) - 1e-9
        samples = sorted(2 * part + k for part in order[:kept] for k in (0, 1))
        expected = summed(gradients(backbone, inputs, samples))
        found = scored(Taylor(threshold=threshold, buckets=3))
        np.testing.assert_allclose(column(found), expected, rtol=1e-5)


def test_taylor_at_a_threshold_of_zero_keeps_every_sample():
    close(scored(Taylor(threshold=0.0, buckets=50)), scored(Taylor()))


def test_taylor_counts_the_last_timestep_in_the_last_part():
    """Those of a flow are no whole numbers and end at the number of steps, not one below."""
    criterion, backbone = Taylor(threshold=0.5, buckets=4), Fake()
    criterion.start(backbone, backbone.units(), 0)
    timestep = torch.tensor([0.0, 24.9, 25.0, 99.5, 100.0])
    assert criterion.bucket_of({"timestep": timestep}, 5).tolist() == [0, 0, 1, 3, 3]


def test_taylor_counts_a_parameter_of_two_units_in_both_and_sums_it_once():
    backbone = Fake()
    backbone.freed_weights = lambda unit, tensors: [
        tensors[key] for key in tensors if key[0] in {"a", unit.name} & {"a", "b"}
    ]
    found = column(scored(Taylor(), backbone))
    a, b, _ = column(scored(Taylor()))
    np.testing.assert_allclose(found, [a, a + b, a], rtol=1e-9)


def test_taylor_gives_an_unused_weight_a_score_of_zero():
    backbone = Fake()
    backbone.spare = nn.Parameter(torch.ones(3, dtype=torch.float64))
    freed_weights = backbone.freed_weights
    backbone.freed_weights = lambda unit, tensors: (
        [tensors["spare"]] if unit.name == "c" else freed_weights(unit, tensors)
    )
    assert column(scored(Taylor(), backbone))[2] == 0


def channels(backbone: Fake) -> Fake:
    """The network with its units in two groups of channels: a:0, a:1 and b:0."""
    units = [Unit("a:0", "channel", 20, 16), Unit("a:1", "channel", 20, 16), Unit("b:0", "channel", 20, 16)]
    layers = dict(zip(("a:0", "a:1", "b:0"), "abc", strict=True))
    freed_weights = backbone.freed_weights
    backbone.units = lambda level="channel": units
    backbone.freed_weights = lambda unit, tensors: freed_weights(Unit(layers[unit.name], "block", 20, 16), tensors)
    return backbone


def test_taylor_divides_scores_by_the_mean_of_their_group():
    names = ("a:0", "a:1", "b:0")
    raw = scored(Taylor(level="channel"), channels(Fake()))
    first, second, _ = (raw[name]["score"] for name in names)
    mean = (first + second) / 2
    divided = scored(Taylor(level="channel", normalization="group_mean"), channels(Fake()))
    assert [divided[name]["score"] for name in names] == [first / mean, second / mean, 1.0]


def test_a_group_without_any_harm_keeps_its_scores_of_zero():
    score = torch.tensor([0.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    assert divide_by_group_mean(score, ["a:0", "a:1", "b:0", "b:1"]).tolist() == [0.0, 0.0, 0.5, 1.5]
    score[2] = math.nan
    assert divide_by_group_mean(score, ["a:0", "a:1", "b:0", "b:1"])[3] == 3.0  # the error names b:0 alone


def test_group_means_need_groups_of_channels():
    with pytest.raises(
        ValueError, match=r"normalization='group_mean' needs groups of channels, and criterion\.level='de"
    ):
        Taylor(normalization="group_mean")
    with pytest.raises(
        ValueError, match=r"criterion\.normalization='mean' is unknown; choose one of: none, group_mean"
    ):
        Taylor(normalization="mean", level="channel")


@pytest.mark.parametrize("fails", [False, True])
def test_taylor_leaves_gradients_and_flags_as_they_were(fails):
    backbone, criterion = Fake(), Taylor()
    backbone.a.weight.requires_grad_(False)
    backbone.last.requires_grad_(False)
    backbone.b.weight.grad = torch.ones(4, 4, dtype=torch.float64)
    flags = [parameter.requires_grad for parameter in backbone.parameters()]
    if fails:
        backbone.losses = lambda output, inputs: 1 / 0
    criterion.start(backbone, backbone.units(), 0)
    with torch.no_grad(), pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        criterion.update(batches()[0])
    assert [parameter.requires_grad for parameter in backbone.parameters()] == flags
    assert torch.equal(backbone.b.weight.grad, torch.ones(4, 4, dtype=torch.float64))
    assert all(parameter.grad is None for parameter in backbone.parameters() if parameter is not backbone.b.weight)
    if not fails:
        frozen = column(criterion.finish())
        assert frozen == column(scored(Taylor(), of=batches()[:1])) and min(frozen) > 0


def test_a_gradient_that_is_not_finite_is_an_error_naming_the_unit():
    backbone = Fake()
    backbone.losses = lambda output, inputs: (output - inputs["target"]).square().mean(1) * math.inf
    for criterion in (Taylor(), Taylor(threshold=0.1)):
        with pytest.raises(ValueError, match="the score of unit 'a' is nan"):
            scored(criterion, backbone)


def test_a_threshold_needs_timesteps():
    backbone = Fake()
    assert Taylor(threshold=0.1).supports(backbone) is None
    del backbone.noise_scheduler
    assert Taylor().supports(backbone) is None
    assert "criterion.threshold=0.1 is for networks with timesteps" in Taylor(threshold=0.1).supports(backbone)


@pytest.mark.parametrize("fields", [{"threshold": 1.5}, {"threshold": -0.1}, {"threshold": math.nan}, {"buckets": 0}])
def test_a_threshold_or_number_of_parts_out_of_range_is_refused(fields):
    with pytest.raises(ValueError, match=rf"criterion\.{next(iter(fields))}=.* is out of range; choose"):
        Taylor(**fields)
