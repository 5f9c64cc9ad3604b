"""Measures of samples, against closed forms and by hand."""

import re

import numpy as np
import pytest
import torch
from cleanfid.fid import kernel_distance
from support.images import pictures
from support.measures import Given, drawn

from conf.schema import ROOT, build
from datamodules.readers.base import MissingData
from lightning_modules.metrics.class_accuracy import ClassAccuracy
from lightning_modules.metrics.distances import Frechet, KernelDistance, Precision, Recall
from lightning_modules.metrics.features import InceptionClasses, ResNet20, ResNet20Classes, resized
from lightning_modules.metrics.inception_score import InceptionScore
from lightning_modules.metrics.protocol import Samples

RESNET20 = str(ROOT / "assets" / "resnet20" / "model.safetensors")


def value(measure: type, vectors, reference=None, **options) -> float:
    """A measure of samples whose features are `vectors`, against a reference whose features are `reference`."""
    given = Given(vectors, reference)
    return measure(given, **options)(given.samples(), given)


# Kernel distance


def mmd(x, y) -> float:
    """The unbiased squared MMD under (x.y / D + 1)^3 by its definition, pair by pair."""

    def k(a, b) -> float:
        return (a @ b / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within += sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_the_kernel_distance_of_few_images_is_the_formula():
    x, y = drawn(6), drawn(6, seed=1) + 0.5
    assert value(KernelDistance, x, y, subsets=3) == pytest.approx(mmd(x, y), rel=1e-12)


def test_the_kernel_distance_of_one_distribution_is_unbiased():
    values = [value(KernelDistance, drawn(40, seed=k), drawn(40, seed=100 + k), subsets=1) for k in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 200**0.5 and min(values) < 0
    assert value(KernelDistance, drawn(40), drawn(40, seed=1) + 2, subsets=1) > 10 * max(values)


def test_the_kernel_distance_is_repeatable_and_leaves_the_global_generator():
    np.random.seed(5)
    found = [value(KernelDistance, drawn(40), drawn(30, seed=1), subset_size=8) for _ in range(2)]
    assert found[0] == found[1] == value(KernelDistance, drawn(40), drawn(30, seed=1), subset_size=8)
    left = np.random.random()
    np.random.seed(5)
    assert np.random.random() == left


def test_the_kernel_distance_is_clean_fids():
    x, y = drawn(30), drawn(30, seed=1) + 0.2
    np.random.seed(0)
    assert value(KernelDistance, x, y, subsets=7, subset_size=10) == kernel_distance(
        y, x, num_subsets=7, max_subset_size=10
    )


# Precision and recall


def test_precision_and_recall_are_1_for_equal_and_0_for_distant_sets():
    x = drawn(20)
    for measure in (Precision, Recall):
        assert value(measure, x, x) == 1 and value(measure, x, x + 100) == 0


def test_precision_and_recall_tell_a_missing_mode_from_a_surplus_mode():
    """Two modes in the reference: samples of one only are all in it, and reach half of it; and the other way round."""
    one, two = drawn(20) * 0.01, drawn(20, seed=1) * 0.01 + 10
    both = np.concatenate([one, two])
    assert (value(Precision, one, both), value(Recall, one, both)) == (1, 0.5)
    assert (value(Precision, both, one), value(Recall, both, one)) == (0.5, 1)


def test_the_manifold_reaches_to_the_kth_neighbour():
    """On a line at 0, 1, 3, 7 the second neighbours are 3, 2, 3 and 6 away: -4 is outside, 13 inside, 13.1 not."""
    line, points = [[0.0], [1.0], [3.0], [7.0]], [[-4.0], [13.0], [13.1]]
    assert value(Precision, points, line, k=2) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="k=4 neighbours were asked for, of 4 images; choose more images"):
        value(Precision, points, line, k=4)


# Classes


@pytest.mark.parametrize("splits", [1, 4])
def test_the_inception_score_ranges_from_one_to_the_number_of_classes(splits):
    sure = np.log(np.eye(4)[np.tile(np.arange(4), 100)].clip(1e-16))
    assert value(InceptionScore, sure, splits=1) == pytest.approx(4)
    assert 3.5 < value(InceptionScore, sure, splits=splits) <= 4 + 1e-9
    assert value(InceptionScore, np.log(np.full((8, 4), 0.25)), splits=splits) == pytest.approx(1)


def test_the_inception_score_is_repeatable_and_leaves_the_global_generator():
    logits = torch.from_numpy(drawn(50)).log_softmax(1).numpy()
    state = torch.random.get_rng_state()
    assert value(InceptionScore, logits) == value(InceptionScore, logits)
    assert torch.equal(torch.random.get_rng_state(), state)


ANSWERS = np.log(np.array([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3], [0.9, 0.05, 0.05]]))


def test_class_accuracy_is_the_share_of_samples_in_the_requested_class():
    given = Given(ANSWERS)
    measure = ClassAccuracy(given, ["cat", "dog", "ship"])
    captions = ["A cat.", 'a photo of the "Ship"', "dog on a hill", "one ship"]
    assert measure(given.samples(captions=captions), given) == 0.75
    assert measure(given.samples(labels=np.array([0, 2, 0, 1])), given) == 0.5


@pytest.mark.parametrize("caption", ["a catfish", "", "a cat and a dog"])
def test_a_caption_without_exactly_one_class_is_refused_early(caption):
    measure = ClassAccuracy(Given(ANSWERS), ["cat", "dog", "ship"])
    with pytest.raises(ValueError, match=re.escape(f"caption {caption!r} has to name one of these classes: cat, dog")):
        measure.check((3, 4, 4), ["a cat", caption], None)


def test_class_accuracy_without_requested_classes_is_refused():
    measure = ClassAccuracy(Given(ANSWERS), ["cat", "dog", "ship"])
    with pytest.raises(ValueError, match="by labels or captions, and this teacher takes neither"):
        measure.check((3, 4, 4), None, None)
    with pytest.raises(ValueError, match="labels from 0 to 9, there are 3 classes: cat, dog, ship"):
        measure.check((3, 4, 4), None, np.arange(10))
    with pytest.raises(ValueError, match="the classifier has 3 classes"):
        ClassAccuracy(Given(ANSWERS), ["cat", "dog"])


def test_class_accuracy_of_real_images_is_the_accuracy_of_the_classifier(configure):
    """On training images, which it knows."""
    record = build(configure().data).source("holdout").take(np.arange(100))
    measure = build(configure("evaluation=class_accuracy").evaluation.metrics.class_accuracy)
    names = [f"a photo of a {measure.classes[k]}." for k in record["label"]]
    by_label, by_name = Samples(record["image"], labels=record["label"]), Samples(record["image"], captions=names)
    assert measure(by_label, None) == measure(by_name, None) >= 0.9
    assert measure(Samples(record["image"], labels=(record["label"] + 1) % 10), None) <= 0.1


def test_the_embedded_classifiers_answers_are_probabilities():
    found = ResNet20Classes(RESNET20)(pictures(3, 32))
    assert found.shape == (3, ResNet20Classes.dimension) and np.allclose(np.exp(found).sum(1), 1)


# Real features


def test_distances_of_real_images_grow_with_the_noise_in_them(configure):
    features = ResNet20(RESNET20)
    images = build(configure().data).source("train").take(np.arange(200))["image"]
    noise = np.random.default_rng(0).standard_normal((100, 32, 32, 3))
    sets = [np.clip(images[100:] + scale * noise, 0, 255).astype(np.uint8) for scale in (0, 10, 30, 90)]
    reference = Given([[0]], features(images[:100]))
    for measure in (Frechet, KernelDistance):
        found = [measure(features)(samples, reference) for samples in map(Samples, sets)]
        assert found == sorted(found) and found[-1] > 3 * found[0], measure


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_resized_by_pil_unless_they_have_the_size(channels):
    images = np.full((2, 8, 8, channels), 200, np.uint8)
    images[0, :4] = 0
    found = resized(images, 4)
    assert found.shape == (2, 4, 4, channels) and found.dtype == np.uint8
    assert (found[1] == 200).all() and (found[0, 0] < 20).all() and (found[0, -1] > 180).all()
    assert resized(images, 8) is images


def test_a_copy_of_inception_without_classes_is_refused_with_what_to_get(tmp_path):
    class Bare(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.save(torch.jit.script(Bare()), tmp_path / "net.pt")
    with pytest.raises(MissingData, match="has Inception's features, but not its classes; put the published"):
        InceptionClasses(str(tmp_path / "net.pt"))


class Classes(torch.nn.Module):
    """The interface of the published Inception: probabilities of 1008 classes, here of the mean of the image."""

    def forward(self, img: torch.Tensor, no_output_bias: bool = False) -> torch.Tensor:
        logits = img.mean([1, 2, 3]).unsqueeze(1) / 255 * torch.arange(1008.0)
        return torch.softmax(logits if no_output_bias else logits + 1000 * torch.arange(1008.0), 1)


def test_inceptions_classes_are_asked_for_without_the_output_layers_bias(tmp_path):
    torch.jit.save(torch.jit.script(Classes()), tmp_path / "net.pt")
    found = InceptionClasses(str(tmp_path / "net.pt"))(np.full((2, 16, 16, 3), 51, np.uint8))
    expected = (torch.arange(1008.0).double() * 0.2).log_softmax(0).clamp_min(np.log(1e-16))
    assert found.shape == (2, 1008) and np.allclose(found, expected, atol=1e-3)
