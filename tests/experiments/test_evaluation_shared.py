"""Parts that measures share: samples, features on any number of ranks, references, prompts, choices and reports."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from support.measures import Flat, Given, drawn
from support.networks import tiny_backbone, tiny_seeds
from support.ranks import two_ranks
from support.results import read_markdown
from support.runs import write_run

from conf.schema import ConfigError, build
from datamodules.images import Images
from datamodules.readers.arrays import Arrays
from datamodules.readers.base import BadSample, MissingData
from datamodules.texts.prompts import read_prompts
from experiments.engine.measures import TrainingImages, build_measures, describe_protocol
from experiments.reporting import figures
from experiments.reporting.run_page import report_run
from experiments.reporting.set_page import report_set
from lightning_modules.metrics import protocol
from lightning_modules.metrics.distances import Frechet
from lightning_modules.metrics.protocol import Samples
from lightning_modules.metrics.statistics import Statistics
from lightning_modules.modules.sampling import Generation, seed_batches
from lightning_modules.training.trainer import autocast, make_trainer, resolve_precision

# Samples


def small(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 1), dtype=np.uint8)


def test_features_are_computed_once_for_all_measures_in_parts(monkeypatch):
    monkeypatch.setattr(protocol, "PART", 4)
    samples, one, same, other = Samples(small(10)), Flat(), Flat(), Flat(2.0)
    assert np.array_equal(samples.features(one), small(10).reshape(10, 4))
    assert samples.features(same) is samples.features(one) and not same.asked
    assert np.array_equal(samples.features(other), 2 * samples.features(one))
    assert one.asked == other.asked == [4, 4, 2]


def drawn_and_measured(rank: int, folder, devices: int) -> None:
    """Draw samples by a tiny teacher and take the features of a set of images, on as many ranks as there are."""
    backbone = tiny_backbone("ddpm")
    conf = OmegaConf.create({"accelerator": "cpu", "devices": devices, "num_nodes": 1, "strategy": "auto"})
    conf.options = {}
    conf.strategy = "ddp" if devices > 1 else "auto"
    sampler = build(OmegaConf.create({"_target_": "diffusers.DDIMScheduler.from_config", "_partial_": True}))
    file = folder / f"{devices}.npy" if rank == 0 else None
    module = Generation(backbone, sampler, 2, size=4, file=file)
    make_trainer(conf, "samples", "32-true").test(module, seed_batches(0, 7, 3, None), verbose=False)
    protocol.PART = 4
    features = Flat()
    found = Samples(small(10)).features(features)
    np.save(folder / f"features_{devices}_{rank}.npy", found)
    assert sum(features.asked) == (10 if devices == 1 else (6, 4)[rank])


@pytest.mark.slow
def test_two_ranks_give_the_samples_and_features_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "PART", 4)
    drawn_and_measured(0, tmp_path, 1)
    with two_ranks(drawn_and_measured, tmp_path, 2):
        pass
    assert (tmp_path / "1.npy").read_bytes() == (tmp_path / "2.npy").read_bytes()
    images = np.load(tmp_path / "1.npy", mmap_mode="r")
    assert images.shape[:3] == (7, 4, 4) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 7
    one, *both = (np.load(tmp_path / f"features_{name}.npy") for name in ("1_0", "2_0", "2_1"))
    assert all(np.array_equal(one, other) for other in both)


def test_a_class_conditional_network_gets_the_class_of_the_seed():
    backbone = tiny_backbone("dit")
    batch = tiny_seeds(backbone, 4)
    labels = backbone.conditions({"seed": batch["seed"]}, torch.device("cpu"))["class_labels"]
    assert labels.tolist() == (batch["seed"] % backbone.null_class).tolist()


# Reference images


class Some(Arrays):
    """A source of which some samples cannot be used."""

    def __init__(self, images, bad=()) -> None:
        super().__init__(images)
        self.bad = set(bad)

    def take(self, indices):
        for index in indices:
            if int(index) in self.bad:
                raise BadSample(f"sample {index} is broken")
        return super().take(indices)


def build_data(source, statistics=None) -> Images:
    return Images(train=lambda: source, holdout=lambda: source, batch_size=2, statistics=statistics)


def reference(data: Images, folder, limit: int = 100, size: int | None = None) -> TrainingImages:
    return TrainingImages(data, folder, torch.device("cpu"), limit, size)


def test_reference_statistics_are_cached_by_content(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "PART", 16)
    data, features = build_data(Some(small(50))), Flat()
    found = reference(data, tmp_path).statistics(features)
    expected = Statistics.of(small(50).reshape(50, 4).astype(float))
    assert np.allclose(found.mean, expected.mean) and np.allclose(found.covariance, expected.covariance)
    assert found.count == 50 and features.asked == [16, 16, 16, 2]
    kept = reference(data, tmp_path, limit=10).features(features)
    assert kept.shape == (10, 4) and np.array_equal(kept[[0, -1]], small(50).reshape(50, 4)[[0, -1]])
    asked = len(features.asked)
    again = reference(data, tmp_path, limit=10)
    assert (again.statistics(features).mean == found.mean).all() and (again.features(features) == kept).all()
    assert len(features.asked) == asked
    for other in (build_data(Some(small(50, seed=1))), build_data(Some(small(49)))):
        reference(other, tmp_path).statistics(features)
    reference(data, tmp_path).statistics(Flat(2.0))
    reference(data, tmp_path, size=1).statistics(features)
    assert len(list((tmp_path / "statistics").glob("*.safetensors"))) == 5
    assert reference(data, tmp_path, limit=20).features(features).shape == (20, 4)


def test_two_jobs_at_once_compute_the_reference_once(tmp_path):
    data, features = build_data(Some(small(50))), Flat()
    with ThreadPoolExecutor(2) as pool:  # each has its own file handle, as two processes have
        for method in ("statistics", "features"):
            jobs = [pool.submit(getattr(reference(data, tmp_path), method), features) for _ in range(2)]
            assert [job.exception() for job in jobs] == [None, None]
    assert features.asked == [50, 50]


def test_an_unreadable_reference_image_is_replaced_by_another(tmp_path):
    images, source = reference(build_data(Some(small(20), bad=[3, 19])), tmp_path), small(20).reshape(20, 4)
    found = images.features(Flat())
    assert np.array_equal(np.delete(found, [3, 19], 0), np.delete(source, [3, 19], 0))
    others = {row.tobytes() for row in np.delete(source, [3, 19], 0).astype(float)}
    assert {found[3].tobytes(), found[19].tobytes()} <= others


def test_published_statistics_are_not_used_for_resized_images(tmp_path):
    Statistics.of(drawn(30)).save(tmp_path / "own.safetensors", features="1.0", transform="none")
    data = build_data(Some(small(20)), {"flat": str(tmp_path / "own.safetensors")})
    assert reference(data, tmp_path).statistics(Flat()).count == 30
    assert reference(data, tmp_path, size=1).statistics(Flat()).count == 20


def test_statistics_of_parts_equal_those_of_the_whole():
    features = drawn(97) * [1, 10, 0.1, 3] + 5
    found, expected = Statistics.of_parts(np.array_split(features, 5), "some"), Statistics.of(features)
    assert found.count == 97
    assert np.allclose(found.mean, expected.mean) and np.allclose(found.covariance, expected.covariance, rtol=1e-10)
    with pytest.warns(UserWarning, match=r"3 images are too few for the covariance of 4 features \(some\)"):
        Statistics.of_parts([features[:1], features[1:3]], "some")


def test_a_frechet_distance_reads_the_statistics_file_that_it_names(tmp_path, monkeypatch):
    """pytorch-fid's arrays; a relative path is one in $SECATEUR_DATA."""
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    expected = Statistics.of(drawn(30))
    np.savez(tmp_path / "real.npz", mu=expected.mean, sigma=expected.covariance)
    given = Given(drawn(30, seed=1), drawn(30, seed=2))
    measure = Frechet(given, "real.npz")
    assert measure(given.samples(), given) == Statistics.of(drawn(30, seed=1)).distance(expected)
    assert measure.protocol(given) == {
        **{"features": "given", "transform": "none", "reference_images": None, "statistics": "real.npz"},
        "reference": expected.digest()[:8],
    }
    against_training = Frechet(given).protocol(given)
    assert against_training["reference_images"] == 30 and against_training["reference"] != expected.digest()[:8]
    with pytest.raises(MissingData, match=re.escape(f"{tmp_path}/no.npz does not exist: `statistics` names it")):
        Frechet(given, "no.npz")


# Prompts


def test_prompts_are_read_from_lines_or_from_a_table_column(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    (tmp_path / "some.txt").write_text("a cat\n\n  a dog \n")
    (tmp_path / "some.csv").write_text('file_name,text\n1.jpg,"a cat, asleep"\n2.jpg,NA\n')
    assert read_prompts("some.txt") == ["a cat", "a dog"]
    assert read_prompts(str(tmp_path / "some.csv"), "text") == ["a cat, asleep", "NA"]
    with pytest.raises(ValueError, match=r"evaluation\.prompts\.column='txt' is not in .*; it has: file_name, text"):
        read_prompts("some.csv", "txt")
    with pytest.raises(MissingData, match=re.escape(f"{tmp_path}/none.csv does not exist: evaluation.prompts.path")):
        read_prompts("none.csv", "text")
    (tmp_path / "some.csv").write_text("file_name,text\n1.jpg,a\n2.jpg, \n")
    with pytest.raises(ValueError, match="a prompt is empty"):
        read_prompts("some.csv", "text")


# Configuration


def test_several_choices_of_measures_are_joined_in_order(configure):
    metrics = configure("evaluation=[precision_recall,frechet_resnet20,class_accuracy]").evaluation.metrics
    assert list(metrics) == ["precision", "recall", "frechet_resnet20", "class_accuracy"]
    assert configure("evaluation=none").evaluation.metrics == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("+evaluation.metrics.mine=3", r"evaluation\.metrics\.mine=3 is no measure"),
        ("+evaluation.metrics.params={_target_: builtins.dict}", r"evaluation\.metrics\.params: that name is taken"),
        ("evaluation.resize=0", r"evaluation\.resize=0 is out of range"),
    ],
)
def test_a_class_that_is_no_measure_is_refused(configure, given, message):
    with pytest.raises(ConfigError, match=message):
        configure(given)


def test_a_measure_that_cannot_be_built_is_named(configure):
    cfg = configure("evaluation=class_accuracy", "evaluation.metrics.class_accuracy.classes=[cat]")
    with pytest.raises(ValueError, match=r"evaluation\.metrics\.class_accuracy: classes=\['cat'\]"):
        build_measures(cfg)


def test_the_coco_protocol_sets_the_sampler_of_bk_sdm(configure):
    for experiment in ("bk_sdm_base", "laptop_diff_sd15_50"):
        cfg = configure(f"experiment={experiment}", "evaluation=coco_30k")
        assert (cfg.sampler.name, cfg.sampler.steps, cfg.sampler.guidance) == ("pndm", 25, 7.5)
        assert (cfg.evaluation.samples, cfg.evaluation.resize) == (30_000, 256)
        assert list(cfg.evaluation.metrics) == ["fid", "inception_score", "clip_score"]


# Reports


def test_a_report_of_several_measures_draws_the_first(tmp_path, monkeypatch):
    labels = []

    def noted(table, columns, axes, path, *_: object, **options: object) -> Path:
        labels.append(axes)
        path.write_bytes(b"")
        return path

    monkeypatch.setattr(figures, "draw_curves", noted)
    write_run(tmp_path, "one", 0.3, {"clip_score": 25.0, "kid": 0.0125})
    write_run(tmp_path, "two", 0.5, {"clip_score": 20.0, "kid": 0.03})
    page = report_set(tmp_path).read_text()
    assert [label for _, label in labels] == [
        *["clip_score (higher is better)"] * 2,
        "joint output loss right after pruning",
    ]
    assert "quality = clip_score, higher is better" in page
    table = read_markdown(tmp_path / "report" / "table.md")
    assert table[["ratio", "clip_score", "kid"]].to_numpy().tolist() == [
        ["0.3", "25.00", "0.0125"],
        ["0.5", "20.00", "0.0300"],
    ]
    run = report_run(tmp_path / "one")
    assert re.search(r"clip_score: +25\.00 pruned, 25\.00 distilled, 25\.00 teacher \(8 samples, ddim, 2 steps\)", run)
    assert re.search(r"kid: +0\.0125 pruned", run)
    shown = (tmp_path / "one" / "report.html").read_text()
    assert "clip_score (higher is better)" in shown and "kid (lower is better)" in shown
    assert "clip_score: better higher, features ffffffff, transform none; kid: better lower, features eeeeeeee" in shown


def test_a_protocol_in_words_has_shared_and_own_parts():
    measures = {"a": {"better": "lower", "features": "0123456789abcdef"}, "b": {"better": "higher", "k": 3}}
    content = {"samples": 8, "measures": measures}
    assert describe_protocol(content) == "samples 8; a: better lower, features 01234567; b: better higher, k 3"
    assert describe_protocol(content, "b") == "samples 8; b: better higher, k 3"
    assert describe_protocol({}) == ""


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_precision_auto_is_the_same_with_and_without_a_trainer(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert resolve_precision("auto", "cuda") == "bf16-mixed" and resolve_precision("auto", "cpu") == "32-true"
    assert autocast("auto", torch.device("cuda")).fast_dtype == torch.bfloat16
    assert not isinstance(autocast("auto", torch.device("cpu")), torch.autocast)
