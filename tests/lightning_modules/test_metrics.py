"""Distances between distributions, against closed forms, and costs of a network, against counting by hand."""

import hashlib
import platform
import re
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from support.language import tiny_language
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from conf.schema import ROOT, build
from datamodules.readers.arrays import Npz
from datamodules.readers.base import MissingData, data_root
from datamodules.seeding import numpy_rng
from experiments.engine.pipeline import run_pipeline
from lightning_modules.backbones import costs
from lightning_modules.backbones.classification.load import load_resnet
from lightning_modules.metrics.cost import Macs, count_macs, describe_machine, latencies, peak_memory, reset_peak_memory
from lightning_modules.metrics.distances import Frechet
from lightning_modules.metrics.features import Inception, ResNet20
from lightning_modules.metrics.statistics import Statistics

RESNET20 = ROOT / "assets" / "resnet20" / "model.safetensors"
INCEPTION = "inception-2015-12-05.pt"


def local(name: str) -> Path:
    """A file in $SECATEUR_DATA; the test is skipped where it is not."""
    path = data_root() / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def drawn(count: int, dimension: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, dimension))


# The distance


def test_a_scipy_that_clean_fid_cannot_use_is_refused_early(monkeypatch):
    measure = Frechet(ResNet20(RESNET20))
    measure.check((3, 32, 32), None, None)
    monkeypatch.setattr("scipy.linalg.sqrtm", lambda A: A)
    with pytest.raises(MissingData, match=r"no longer has sqrtm\(disp=\.\.\.\).*: pip install 'scipy<1\.18'"):
        measure.check((3, 32, 32), None, None)


def test_a_set_is_at_no_distance_from_itself():
    statistics = Statistics.of(drawn(200, 8))
    assert abs(statistics.distance(statistics)) < 1e-9


def test_the_distance_of_two_independent_gaussians_is_the_closed_form():
    """|m1 - m2|^2 + sum (s1 - s2)^2 for diagonal covariances."""
    mean, deviation = np.array([[0.0, 1.0, -2.0], [3.0, 1.0, 2.0]]), np.array([[1.0, 2.0, 0.5], [4.0, 2.0, 3.0]])
    one, other = (Statistics(m, np.diag(s**2), 100) for m, s in zip(mean, deviation, strict=True))
    expected = ((mean[0] - mean[1]) ** 2).sum() + ((deviation[0] - deviation[1]) ** 2).sum()
    assert one.distance(other) == pytest.approx(expected, rel=1e-12)
    assert other.distance(one) == pytest.approx(expected, rel=1e-12)


def test_the_distance_of_two_correlated_gaussians_is_the_closed_form():
    """tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for the 2x2 product M of two covariances."""
    one = Statistics(np.array([1.0, 2.0]), np.array([[2.0, 0.8], [0.8, 1.0]]), 100)
    other = Statistics(np.array([0.0, 4.0]), np.array([[1.0, -0.5], [-0.5, 3.0]]), 100)
    product = one.covariance @ other.covariance
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = 1 + 4 + np.trace(one.covariance) + np.trace(other.covariance) - 2 * root
    assert one.distance(other) == pytest.approx(expected, rel=1e-10)


def test_the_distance_grows_with_the_noise_that_is_added():
    clean, noise = drawn(500, 6), drawn(500, 6, seed=1)
    reference = Statistics.of(clean)
    distances = [Statistics.of(clean + scale * noise).distance(reference) for scale in (0, 0.25, 0.5, 1, 2)]
    assert distances == sorted(distances) and len({round(d, 6) for d in distances}) == 5


def test_statistics_are_the_mean_and_the_covariance():
    features = drawn(50, 3)
    statistics = Statistics.of(features)
    centred = features - features.mean(0)
    assert statistics.count == 50
    assert np.allclose(statistics.mean, features.mean(0)) and np.allclose(
        statistics.covariance, centred.T @ centred / 49
    )


@pytest.mark.parametrize("count", [3, 8])
def test_no_more_images_than_dimensions_warns_with_both_numbers(count):
    with pytest.warns(UserWarning, match=rf"{count} images are too few for the covariance of 8 features \(samples\)"):
        statistics = Statistics.of(drawn(count, 8), "samples")
    assert abs(statistics.distance(statistics)) < 1e-6  # defined although the covariance is singular


def test_more_images_than_dimensions_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Statistics.of(drawn(9, 8))


# Statistics in files


def test_statistics_come_back_from_their_file_bit_for_bit(tmp_path):
    made = Statistics.of(drawn(50, 4))
    made.save(tmp_path / "s.safetensors", features="abc", transform="none")
    found = Statistics.load(tmp_path / "s.safetensors", features="abc", transform="none")
    assert (found.mean == made.mean).all() and (found.covariance == made.covariance).all() and found.count == 50
    assert found.distance(made) == made.distance(made)


@pytest.mark.parametrize(("key", "was"), [("features", "abc"), ("transform", "none"), ("dimension", None)])
def test_statistics_of_other_features_are_refused_with_both_origins(tmp_path, key, was):
    Statistics.of(drawn(50, 4)).save(tmp_path / "s.safetensors", features="abc", transform="none")
    with pytest.raises(ValueError, match=rf"s\.safetensors was made with {key}={was}, this run has other"):
        Statistics.load(tmp_path / "s.safetensors", **{"features": "abc", "transform": "none", key: "other"})


# The embedded features


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    """512 images of the embedded sample."""
    from hydra import compose, initialize_config_module

    from conf import schema

    schema.register()
    with initialize_config_module("conf", version_base="1.3"):
        data = build(compose("train").data)
    return data.source("train").take(np.arange(512))["image"]


def test_embedded_features_do_not_depend_on_the_other_images(sample):
    features = ResNet20(str(RESNET20))
    found = features(sample[:300])
    assert found.shape == (300, features.dimension) and found.dtype == np.float64 and (found >= 0).all()
    assert np.allclose(found[100:110], features(sample[100:110]), rtol=1e-4, atol=1e-5)


def test_the_fingerprint_of_the_features_is_that_of_the_weights():
    assert ResNet20(str(RESNET20)).fingerprint() == hashlib.sha256(RESNET20.read_bytes()).hexdigest()


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 32, 32, 1), (2, 64, 64, 3), (2, 3, 32, 32)])
def test_the_embedded_features_refuse_images_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"frechet_resnet20 takes images of \(3, 32, 32\).*choose evaluation=fid"):
        ResNet20(str(RESNET20))(np.zeros(shape, np.uint8))


def test_features_without_weights_name_the_command_that_makes_them(tmp_path):
    path = str(tmp_path / "model.safetensors")
    message = f"path={path!r} does not exist: python train.py experiment=pretrain_resnet20 makes it"
    with pytest.raises(MissingData, match=re.escape(message)):
        ResNet20(path)


def test_two_halves_of_real_images_are_closer_than_real_images_and_noise(sample):
    features = ResNet20(str(RESNET20))
    noise = np.random.default_rng(0).integers(0, 256, (256, 32, 32, 3), dtype=np.uint8)
    one, other, far = (Statistics.of(features(images)) for images in (sample[:256], sample[256:], noise))
    assert 0 < 5 * one.distance(other) < one.distance(far)


def test_the_embedded_reference_belongs_to_the_embedded_features(sample, configure):
    """The statistics of all 50,000 training images, as a run with the default data and metric reads them."""
    cfg = configure()
    features = build(cfg.evaluation.metrics.frechet_resnet20.features)
    path = build(cfg.data).statistics[features.name]
    reference = Statistics.load(path, features=features.fingerprint(), transform=features.transform)
    assert (reference.count, reference.mean.shape, reference.covariance.shape) == (50_000, (64,), (64, 64))
    assert Statistics.of(features(sample)).distance(reference) < Statistics.of(features(sample // 2)).distance(
        reference
    )


# Inception


@pytest.fixture
def no_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights here, and no network to fetch them from."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path / "empty"))
    monkeypatch.setattr("cleanfid.inception_torchscript.check_download_inception", refuse)


def test_fid_without_weights_fails_at_once_with_a_remedy(no_inception, configure, overrides, tmp_path):
    with pytest.raises(Exception, match=INCEPTION) as caught:
        run_pipeline(configure(*overrides, "evaluation=fid"))
    for way_out in (
        "$SECATEUR_DATA",
        "evaluation.metrics.fid: ",
        "`path` of the features",
        "evaluation=frechet_resnet20",
    ):
        assert way_out in str(caught.value)
    assert not list(tmp_path.rglob("scores.json"))


def test_fid_without_weights_is_missing_data(no_inception):
    with pytest.raises(MissingData, match=re.escape(f"put {INCEPTION} into $SECATEUR_DATA")):
        Inception()(np.zeros((1, 8, 8, 3), np.uint8))


def test_a_path_to_weights_that_are_not_there_is_named(tmp_path):
    with pytest.raises(MissingData, match=re.escape(f"path='{tmp_path}/net.pt' does not exist")):
        Inception(f"{tmp_path}/net.pt")


class Layers(nn.Module):
    """Stands for the network inside: 2048 features of images that are normalised already."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean([2, 3]).repeat(1, 683)[:, :2048]


class Bare(nn.Module):
    """TorchScript that is the network and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Published(nn.Module):
    """The interface that clean-fid finds in the published file: 0..255 in, classes out unless asked for features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        features = self.layers((img - 128) / 128)
        if return_features:
            return features
        return torch.softmax(features[:, :1008], dim=1)


@pytest.mark.parametrize("network", [Bare, Published])
@pytest.mark.parametrize("size", [32, 299])
def test_inception_features_are_the_same_from_both_kinds_of_file(tmp_path, network, size):
    torch.jit.save(torch.jit.script(network()), tmp_path / INCEPTION)
    images = np.full((2, size, size, 3), [0, 128, 192], np.uint8)
    found = Inception(str(tmp_path / INCEPTION))(images)
    assert (found.shape, found.dtype) == ((2, 2048), np.float64)
    assert np.allclose(found[:, :4], [-1, 0, 0.5, -1], atol=1e-6)


@pytest.mark.data
def test_fid_is_zero_for_identical_images_and_larger_for_noise(sample, monkeypatch):
    features = Inception(str(local(INCEPTION)))
    noise = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 16 images for 2048 dimensions
        real, far = (Statistics.of(features(images)) for images in (sample[:16], noise))
    assert abs(real.distance(real)) < 1e-3
    assert real.distance(far) > 10


# The embedded network and data, against the whole of CIFAR-10


@pytest.mark.data
def test_the_embedded_resnet20_is_at_least_91_percent_accurate():
    test = Npz(str(local("cifar10.npz")), "x_test", "y_test")
    network = load_resnet(RESNET20, blocks=3)
    pixels = torch.from_numpy(test.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        read = torch.cat([network(part).argmax(1) for part in pixels.split(500)]).numpy()
    assert (read == test.labels).mean() >= 0.91


@pytest.mark.data
def test_the_embedded_sample_is_of_the_training_images_bit_for_bit(configure):
    source = Npz(str(local("cifar10.npz")), "x_train", "y_train")
    chosen = numpy_rng("cifar10_sample").permutation(len(source))[:2048]
    data = build(configure().data)
    images = np.concatenate([data.source(split).images for split in ("train", "holdout")])
    labels = np.concatenate([data.source(split).labels for split in ("train", "holdout")])
    assert (images == source.images[chosen]).all() and (labels == source.labels[chosen]).all()


@pytest.mark.slow
@pytest.mark.data
def test_the_embedded_reference_is_that_of_all_training_images(configure):
    cfg = configure()
    features, data = build(cfg.evaluation.metrics.frechet_resnet20.features), build(cfg.data)
    found = Statistics.of(features(Npz(str(local("cifar10.npz")), "x_train").images))
    assert abs(found.distance(Statistics.load(data.statistics[features.name]))) < 1e-3


# Multiply-accumulates


def macs_of(network: nn.Module, *inputs: Tensor) -> tuple[int, int]:
    counted = count_macs(network, lambda: network(*inputs))
    return counted.linear, counted.attention


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups"), [(3, 1, 1, 1), (3, 2, 1, 1), (1, 1, 0, 1), (3, 1, 1, 4), (5, 1, 0, 2)]
)
def test_a_convolution_costs_its_kernel_at_every_output_element(kernel, stride, padding, groups, bias):
    network = nn.Conv2d(8, 16, kernel, stride, padding, groups=groups, bias=bias)
    out = (10 + 2 * padding - kernel) // stride + 1
    assert macs_of(network, torch.zeros(1, 8, 10, 10)) == (16 * out * out * (8 // groups) * kernel**2, 0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_costs_its_matrix_at_every_token(bias):
    network = nn.Linear(12, 20, bias=bias)
    assert macs_of(network, torch.zeros(1, 12)) == (12 * 20, 0)
    assert macs_of(network, torch.zeros(1, 7, 12)) == (7 * 12 * 20, 0)


def test_experts_cost_the_product_of_each_token_with_its_own_expert():
    class Experts(nn.Module):
        def forward(self, x_SK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor:
            return F.grouped_mm(x_SK, weight_EKN, offs=ends_E)

    tokens, experts = torch.zeros(6, 16, dtype=torch.bfloat16), torch.zeros(4, 16, 8, dtype=torch.bfloat16)
    ends = torch.tensor([1, 3, 3, 6], dtype=torch.int32)
    assert macs_of(Experts(), tokens, experts, ends) == (6 * 16 * 8, 0)


def test_language_models_are_counted_in_bfloat16(monkeypatch):
    """Products of experts on the meta device are in bfloat16 only, in torch 2.11."""
    counted = []

    def count(network: nn.Module, forward: Callable[[], Any]) -> Macs:
        counted.append(next(network.parameters()).dtype)
        return count_macs(network, forward)

    monkeypatch.setattr(costs, "count_macs", count)
    backbone = tiny_language()
    assert backbone.macs().linear > 0 and counted == [torch.bfloat16]
    assert next(backbone.network.parameters()).dtype == torch.float32


@pytest.mark.parametrize("frozen", [False, True])
def test_a_linear_layer_on_transposed_tokens_is_still_a_linear_layer(frozen):
    network = nn.Linear(12, 20).requires_grad_(not frozen)
    assert macs_of(network, torch.zeros(2, 12, 7).transpose(1, 2)) == (2 * 7 * 12 * 20, 0)


@pytest.mark.parametrize("backend", [None, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
def test_attention_costs_its_two_products_whichever_backend_is_active(backend):
    batch, heads, queries, keys, width = 2, 3, 5, 7, 4

    class Products(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    inputs = [torch.zeros(batch, heads, tokens, width) for tokens in (queries, keys, keys)]
    expected = (0, batch * heads * queries * keys * width * 2)
    if backend is None:
        assert macs_of(Products(), *inputs) == expected
    else:
        with sdpa_kernel(backend):
            assert macs_of(Products(), *inputs) == expected


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_an_attention_costs_four_projections_and_two_products(processor, frozen):
    network = Attention(query_dim=16, heads=2, dim_head=8, norm_num_groups=4, bias=True, residual_connection=True)
    network.set_processor(processor())
    network.requires_grad_(not frozen)
    tokens = 6 * 6
    assert macs_of(network, torch.zeros(1, 16, 6, 6)) == (4 * tokens * 16 * 16, 2 * tokens**2 * 16)


def test_modules_are_counted_each_for_itself_and_sum_to_the_whole():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU()))
    counted = count_macs(network, lambda: network(torch.zeros(1, 3, 5, 5)))
    assert (counted.of("0"), counted.of("1"), counted.of("1.0"), counted.of("1.1")) == (8 * 27 * 25, 800, 800, 0)
    assert counted.linear == counted.of("0") + counted.of("1")


def test_a_networks_count_does_not_depend_on_its_state(teacher):
    before = teacher.macs()
    assert before.linear > 0 and before.attention > 0
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.inference_mode():
        assert teacher.requires_grad_(False).train().macs() == before


# Time and memory


def test_latencies_are_measured_in_turns_after_a_warm_up_round():
    calls: list[str] = []
    found = latencies({name: lambda name=name: calls.append(name) for name in "ab"}, 3, torch.device("cpu"))
    assert calls == list("ab" * 4)
    assert set(found) == {"a", "b"} and all(0 <= value < 1000 for value in found.values())


def test_the_peak_memory_never_falls_and_holds_what_was_allocated():
    before = peak_memory(torch.device("cpu"))
    block = np.ones(2**24)
    assert peak_memory(torch.device("cpu")) >= max(before, block.nbytes)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a process's peak can be reset on Linux only")
def test_a_new_measurement_of_peak_memory_does_not_contain_what_was_freed_before():
    block = np.ones(2**24)
    before, size = peak_memory(torch.device("cpu")), block.nbytes
    del block
    reset_peak_memory()
    assert peak_memory(torch.device("cpu")) < before - size / 2


def test_a_machine_is_described_by_processor_threads_versions_and_date(monkeypatch):
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, {date.today()}"
    description = describe_machine(torch.device("cpu"))
    assert description.endswith(f", {torch.get_num_threads()} threads, {versions}")
    info = Path("/proc/cpuinfo")
    processor = description.partition(f", {torch.get_num_threads()} threads")[0]
    assert processor and (processor == platform.machine() or f": {processor}\n" in info.read_text())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert describe_machine(torch.device("cuda")) == f"NVIDIA H200, {versions}"
