"""Features of sounds for Frechet distances: the embedded classifier of digits, CLAP and VGGish on small weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.process import ROOT
from support.sounds import MEL, noise, tone
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

from conf.schema import build
from datamodules.audio import Mel
from datamodules.readers.base import MissingData
from lightning_modules.backbones.classification.image_networks import CifarResNet
from lightning_modules.backbones.classification.load import load_resnet
from lightning_modules.metrics.sounds import Clap, Digits, DigitsClasses, Vggish, VggishNetwork, vggish_examples
from lightning_modules.metrics.statistics import Statistics

WEIGHTS = ROOT / "assets/digits_classifier/model.safetensors"
PICTURES = np.stack([MEL.picture(wave) for wave in (tone(300), tone(1200), noise(0), noise(1))])


# The embedded classifier


def test_the_classifier_has_its_training_normalisation(tmp_path):
    torch.manual_seed(0)
    network = CifarResNet(1, mean=[0.25], std=[0.25]).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    found = Digits(str(tmp_path / "model.safetensors"))(PICTURES)
    images = torch.from_numpy(PICTURES).permute(0, 3, 1, 2) / 127.5 - 1
    normal_N1HW = torch.from_numpy(PICTURES).permute(0, 3, 1, 2) / 255 * 4 - 1  # (x - 0.25) / 0.25
    with torch.inference_mode():
        expected = network.stages(F.relu(network.bn1(network.conv1(normal_N1HW)))).mean((2, 3))
        logits = network(images)
    assert found.shape == (4, 64) == (4, Digits.dimension) and found.dtype == np.float64
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    classes = DigitsClasses(str(tmp_path / "model.safetensors"))(PICTURES)
    np.testing.assert_allclose(classes, logits.log_softmax(1).numpy(), atol=1e-5)


def test_networks_for_colour_are_as_before():
    network = load_resnet(ROOT / "assets/resnet20/model.safetensors", blocks=3)
    assert network.mean == (0.4914, 0.4822, 0.4465) and network.conv1.weight.shape == (16, 3, 3, 3)
    with pytest.raises(ValueError, match=r"mean=\[0\.5\] and std=\[0\.1, 0\.2\]: both need one value per channel"):
        CifarResNet(1, mean=[0.5], std=[0.1, 0.2])


@pytest.fixture(scope="module")
def sample():
    """The embedded sample, as its configuration gives it."""
    from support.config import composed

    data = build(composed("data=digits_sample").data)
    return data, *(data.source(split).take(np.arange(len(data.source(split)))) for split in ("train", "holdout"))


def test_the_embedded_sample_holds_pictures_of_sounds(sample):
    data, train, holdout = sample
    assert train["image"].shape == (1024, 48, 48, 1) and holdout["image"].shape == (256, 48, 48, 1)
    assert set(train["label"]) == set(range(10)) == set(holdout["label"])
    assert data.mel.shape == data.image_shape() and (data.mel.samples, data.mel.rate) == (6016, 8000)
    kinds = {picture.tobytes() for part in (train, holdout) for picture in part["image"]}
    assert len(kinds) == 1280 and train["image"].max() < 255


def test_the_classifier_hears_the_digits(sample):
    holdout = sample[2]
    heard = DigitsClasses(str(WEIGHTS))(holdout["image"]).argmax(1)
    assert (heard == holdout["label"]).mean() > 0.95


def test_the_distance_is_small_between_digits_and_large_from_noise(sample):
    data, train, holdout = sample
    digits = Digits(str(WEIGHTS))
    origin = {"features": digits.fingerprint(), "transform": digits.transform}
    reference = Statistics.load(data.statistics["frechet_digits"], **origin)
    assert reference.count == 2700
    halves = [Statistics.of(digits(train["image"][start::4])) for start in (0, 1)]
    same = halves[0].distance(halves[1])
    real = Statistics.of(digits(holdout["image"])).distance(reference)
    one = Statistics.of(digits(train["image"][train["label"] == 3])).distance(reference)
    noises = np.stack([data.mel.picture(noise(seed)) for seed in range(100)])
    far = Statistics.of(digits(noises)).distance(reference)
    assert max(same, real) < 0.3 and one > 5 and far > 100


def test_digits_are_recognised_after_a_round_trip_through_sound(sample):
    data, _, holdout = sample
    back = data.mel.picture(data.mel.wave(holdout["image"][:64]))
    heard = DigitsClasses(str(WEIGHTS))(back).argmax(1)
    assert (heard == holdout["label"][:64]).mean() > 0.95


def test_pictures_of_another_shape_and_missing_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"frechet_digits takes images of \(1, 48, 48\).*choose evaluation=fad_clap"):
        Digits(str(WEIGHTS)).check((3, 32, 32))
    with pytest.raises(MissingData, match=r"python train\.py experiment=pretrain_digits_classifier makes it"):
        Digits(str(tmp_path / "none.safetensors"))


# VGGish


def vggish_state(
    widths: tuple[int, ...] = (2, 3, 4, 4, 5, 5), hidden: int = 6, outputs: int = 4
) -> dict[str, torch.Tensor]:
    """Random weights of a narrow VGGish, named as the published ones are."""
    generator = torch.Generator().manual_seed(0)
    state, before = {}, 1
    for place, width in zip((0, 3, 6, 8, 11, 13), widths, strict=True):
        state[f"features.{place}.weight"] = torch.randn(width, before, 3, 3, generator=generator) / (3 * before**0.5)
        state[f"features.{place}.bias"] = torch.randn(width, generator=generator) / 10
        before = width
    before *= 6 * 4
    for place, width in zip((0, 2, 4), (hidden, hidden, outputs), strict=True):
        state[f"embeddings.{place}.weight"] = torch.randn(width, before, generator=generator) / before**0.5
        state[f"embeddings.{place}.bias"] = torch.randn(width, generator=generator) / 10
        before = width
    return state


@pytest.fixture
def vggish(tmp_path: Path) -> Path:
    save_file(vggish_state(), tmp_path / "vggish.safetensors")
    return tmp_path / "vggish.safetensors"


def test_vggish_is_the_published_network():
    state, mel = vggish_state(), torch.randn(2, 1, 96, 64, generator=torch.Generator().manual_seed(1))
    h = mel
    for place, pooled in {0: True, 3: True, 6: False, 8: True, 11: False, 13: True}.items():
        h = F.conv2d(h, state[f"features.{place}.weight"], state[f"features.{place}.bias"], padding=1).relu()
        h = F.max_pool2d(h, 2) if pooled else h
    assert h.shape == (2, 5, 6, 4)
    h = torch.stack([h[:, :, t, f] for t in range(6) for f in range(4)], 1).flatten(1)  # time, frequency, channel
    for place in (0, 2, 4):
        h = F.linear(h, state[f"embeddings.{place}.weight"], state[f"embeddings.{place}.bias"])
        h = h.relu() if place != 4 else h
    with torch.inference_mode():
        torch.testing.assert_close(VggishNetwork(state).eval()(mel), h)


def test_vggish_hears_what_its_parameters_say():
    sounds = torch.from_numpy(np.stack([tone(1000, 2.0, 16000), np.zeros(32000, np.float32)]))
    examples = vggish_examples(sounds)
    assert examples.shape == (2, 2, 96, 64)  # (32000 - 400) // 160 + 1 = 198 frames: two examples, 6 left over
    assert torch.allclose(examples[1], torch.log(torch.tensor(0.01)))
    htk = 2595 * np.log10(1 + np.array([125, 1000, 7500]) / 700)
    band = (htk[1] - htk[0]) / (htk[2] - htk[0]) * 65 - 1
    assert (examples[0].argmax(-1) == round(band)).all()
    # a Hann window of 400 sums to 200: a sine at full scale has a magnitude of 100, in a band of a triangle's height
    assert np.exp(examples[0].max()) < 200 and np.exp(examples[0].max()) > 50
    assert vggish_examples(sounds[:, :8000]).shape == (2, 1, 96, 64)  # shorter than one example: padded
    assert torch.equal(vggish_examples(sounds[:, :8000])[0, 0, :48], vggish_examples(sounds)[0, 0, :48])


def test_vggish_weights_as_published_and_as_safetensors_are_the_same(vggish, tmp_path):
    torch.save(vggish_state(), tmp_path / "vggish.pth")
    first, second = (Vggish(MEL, str(path)) for path in (vggish, tmp_path / "vggish.pth"))
    found = first(PICTURES)
    assert found.shape == (4, 4) == (4, first.dimension) and np.array_equal(found, second(PICTURES))
    assert not np.allclose(found[0], found[1]) and first.fingerprint() != second.fingerprint()
    front = "Griffin-Lim (32 iterations), 8000 Hz -> 16000 Hz"
    assert first.transform == f"{front}, the mean over windows of 0.96 s"


def test_a_long_sound_has_the_mean_of_its_examples(vggish):
    mel = Mel(frames=200)  # 3.184 s: three examples
    features = Vggish(mel, str(vggish))
    picture = mel.picture(np.concatenate([tone(300, 1.0), tone(1200, 1.0), noise(seconds=1.2)]))
    sound = torch.from_numpy(mel.wave(picture))
    from scipy.signal import resample_poly

    examples = vggish_examples(torch.from_numpy(resample_poly(sound.numpy(), 2, 1))[None])
    assert examples.shape[1] == 3
    with torch.inference_mode():
        expected = torch.stack([features.network()(example[None, None]) for example in examples[0]]).mean(0)
    np.testing.assert_allclose(features(picture[None]), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_vggish_weights_in_the_data_folder_are_found(vggish, monkeypatch):
    monkeypatch.setenv("SECATEUR_DATA", str(vggish.parent))
    assert Vggish(MEL).path == vggish


def test_vggish_without_its_weights_says_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    with pytest.raises(MissingData, match=r"releases/download/v0\.1/vggish-10086976\.pth.*evaluation=frechet_digits"):
        Vggish(MEL)
    save_file({"weight": torch.zeros(1)}, tmp_path / "vggish.safetensors")
    with pytest.raises(ValueError, match=r"these are no weights of VGGish: they have no 'features\.0\.weight'"):
        Vggish(MEL)


# CLAP


def small_clap(folder: Path, **audio: object) -> str:
    """A CLAP of random weights, with the front end of the published ones, but for sounds of up to 2 s."""
    torch.manual_seed(0)
    sizes = {"patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [1, 1], "hidden_size": 16}
    config = ClapConfig(
        audio_config={**sizes, "spec_size": 64, "num_mel_bins": 16, "window_size": 2, "num_hidden_layers": 2, **audio},
        text_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "vocab_size": 9,
        },
        projection_dim=12,
    )
    ClapModel(config).save_pretrained(folder)
    ClapFeatureExtractor(feature_size=16, max_length_s=2, truncation="rand_trunc").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clap(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_clap(tmp_path_factory.mktemp("clap"))


def test_clap_gives_its_embedding_of_each_sound(clap):
    features = Clap(MEL, clap)
    found = features(PICTURES)
    assert found.shape == (4, 12) == (4, features.dimension)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.random.seed(1)
    assert np.array_equal(found, Clap(MEL, clap)(PICTURES)) and len(np.unique(found.round(6), axis=0)) == 4
    assert features.fingerprint() == Clap(MEL, clap).fingerprint()
    np.testing.assert_allclose(features(PICTURES[2:3]), found[2:3], atol=1e-5)


def test_of_a_sound_that_is_too_long_clap_takes_the_beginning(clap):
    mel = Mel(frames=188)  # 3 s
    sound = np.concatenate([tone(300, 2.2), noise(seconds=0.79)])
    features = Clap(mel, clap)
    found = features(np.stack([mel.picture(sound)] * 2))
    assert np.array_equal(found[0], found[1])  # a part drawn at random would differ


def test_other_weights_have_another_fingerprint(clap, tmp_path):
    model = ClapModel.from_pretrained(clap)
    with torch.no_grad():
        model.audio_projection.linear1.bias += 1
    model.save_pretrained(tmp_path)
    ClapFeatureExtractor.from_pretrained(clap).save_pretrained(tmp_path)
    assert Clap(MEL, str(tmp_path)).fingerprint() != Clap(MEL, clap).fingerprint()


def test_a_clap_that_fuses_features_is_refused(tmp_path):
    path = small_clap(tmp_path, enable_fusion=True)
    with pytest.raises(ValueError, match="choose a CLAP without feature fusion"):
        Clap(MEL, path)


def test_a_missing_clap_is_refused_with_a_remedy():
    with pytest.raises(MissingData, match=r"laion/clap-htsat-unfused.*name its folder, or choose"):
        Clap(MEL, "/no/such/folder")


# Configurations


@pytest.mark.parametrize("name", ["frechet_digits", "digits_accuracy"])
def test_the_offline_measures_can_be_chosen(configure, name):
    cfg = configure("data=digits_sample", f"evaluation={name}")
    measures = {key: build(node) for key, node in cfg.evaluation.metrics.items()}
    for measure in measures.values():
        measure.check((1, 48, 48), None, np.arange(10))
    assert name in measures


def test_vggish_gets_the_data_sets_own_mel(configure, vggish):
    cfg = configure(
        "data=digits_sample", "evaluation=fad_vggish", f"evaluation.metrics.fad_vggish.features.path={vggish}"
    )
    measure = build(cfg.evaluation.metrics.fad_vggish)
    measure.check((1, 48, 48), None, None)
    assert measure.features.mel.shape == (1, 48, 48)
    with pytest.raises(
        ValueError, match=r"fad_vggish takes pictures of data\.mel, \(1, 48, 48\); these are \(3, 32, 32\)"
    ):
        measure.check((3, 32, 32), None, None)


@pytest.mark.parametrize("name", ["fad_clap", "fad_vggish"])
def test_a_data_set_without_sounds_has_no_audio_distance(configure, name):
    cfg = configure("data=cifar10_sample", f"evaluation={name}")
    with pytest.raises(Exception, match=f"{name} is for sounds, and data.mel is not set: choose data=spoken_digits"):
        build(cfg.evaluation.metrics[name])
