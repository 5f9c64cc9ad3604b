"""Evaluation follows the data: references are the data's own, and measures of other data are warned of by name."""

from typing import Any

import pytest
from support.results import the_run

from experiments.engine.measures import build_measures, describe_references, list_unfit_measures
from experiments.engine.pipeline import run_pipeline
from experiments.engine.run import Run
from experiments.inspection.command import list_unfit_evaluation


def list_sentences(cfg: Any) -> list[str]:
    return list_unfit_measures(cfg, build_measures(cfg))


@pytest.mark.parametrize("choice", ["data=cifar10", "task=uig", "task=t2i", "task=uag", "data=cifar10_full_captions"])
def test_a_measure_fits_the_data_that_its_features_were_learnt_from(configure, choice):
    assert list_sentences(configure(choice)) == []


def test_features_of_other_data_are_warned_of_by_name(configure):
    (sentence,) = list_sentences(configure("data=fashion_mnist"))
    assert sentence.startswith("evaluation.metrics.frechet_resnet20: its features were learnt from data=cifar10 and ")
    assert "pictures of data=fashion_mnist apart" in sentence and "choose evaluation=fid for figures" in sentence
    known = "evaluation.fits.frechet_resnet20=[fashion_mnist]"
    assert list_sentences(configure("data=fashion_mnist", known)) == []
    sounds = configure("task=uag", "data=sound_folder", "data.path=/sounds")
    assert "choose evaluation=fad_clap for figures to report" in list_sentences(sounds)[0]


def test_inherited_reference_statistics_are_warned_of(configure):
    (sentence,) = list_sentences(configure("data.name=other"))
    assert sentence.endswith("the file data.statistics.frechet_resnet20: see that it was made from data=other")


def test_what_measures_fit_is_no_part_of_a_run(configure):
    cfg = configure("evaluation.fits={}")
    assert Run(cfg, "teacher").id == Run(configure(), "teacher").id


def test_images_of_another_shape_are_refused_with_what_to_choose(configure):
    cfg = configure("data=fashion_mnist")
    (sentence,) = list_unfit_evaluation(cfg, (1, 64, 64))
    assert sentence == (
        "evaluation.metrics.frechet_resnet20: frechet_resnet20 takes images of (3, 32, 32), these are (1, 64, 64); "
        "choose evaluation=fid"
    )
    assert "its features were learnt from" in next(list_unfit_evaluation(cfg, (3, 32, 32)))


PROTOCOL = {"measures": {"frechet": {"reference_images": 48}, "brightness": {"better": "higher"}}}


@pytest.mark.parametrize(
    ("data", "evaluation", "more", "source"),
    [
        ({}, {"resize": None}, {}, "48 images of the training images of data=mine"),
        (
            {"statistics": {"frechet": "f"}},
            {"resize": None},
            {},
            "the statistics that come with data=mine, of 48 images",
        ),
        ({"statistics": {"frechet": "f"}}, {"resize": 8}, {}, "48 images of the training images of data=mine"),
        (
            {},
            {"resize": None},
            {"statistics": "coco.npz", "reference_images": None},
            "the statistics in coco.npz, of images whose number the file does not say, which "
            "evaluation.metrics.frechet names",
        ),
    ],
)
def test_a_reference_is_told_by_its_source(data, evaluation, more, source):
    config = {"data": {"name": "mine", **data}, "evaluation": evaluation}
    protocol = {"measures": {**PROTOCOL["measures"], "frechet": {"reference_images": 48} | more}}
    assert describe_references(config, protocol) == [f"frechet compares samples with {source}"]


def test_the_report_of_a_run_names_its_reference(configure, sampling, unverified, tmp_path):
    run_pipeline(configure(*sampling, "distillation=none"))
    page = (the_run(tmp_path / "runs") / "report.html").read_text()
    assert "frechet_channels compares samples with 48 images of the training images of data=tiny." in page
