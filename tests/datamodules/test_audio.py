"""Sound as pictures and back, folders and tables of sounds, and what is wrong with some of them."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from datasets import Audio, Dataset, Features, Value
from datasets import config as datasets_config
from support.sounds import MEL, noise, peak, tone

from conf.schema import build
from datamodules.audio import HuggingFaceSounds, Mel, Sounds
from datamodules.readers.base import BadSample, MissingData, data_root


def sweep(low: float = 200, high: float = 3500) -> np.ndarray:
    """A sine whose frequency rises evenly over one sound."""
    time = np.arange(MEL.samples) / MEL.rate
    return np.sin(2 * np.pi * (low * time + (high - low) / (2 * MEL.seconds) * time**2)).astype(np.float32)


def loudest(picture: np.ndarray) -> np.ndarray:
    """The band of the most power in each frame, from the lowest one on."""
    return MEL.bins - 1 - picture[..., 0].argmax(-2)


# Pictures and back


def test_a_sound_has_the_size_that_the_parameters_say():
    assert (MEL.samples, MEL.seconds, MEL.shape) == (6016, 0.752, (1, 48, 48))
    picture = MEL.picture(noise())
    assert picture.shape == (48, 48, 1) and picture.dtype == np.uint8
    assert MEL.wave(picture).shape == (6016,) and MEL.wave(picture).dtype == np.float32


@pytest.mark.parametrize("frequency", [150, 440, 1000, 2200, 3600])
def test_a_tone_keeps_its_frequency_to_half_a_band(frequency):
    found = peak(MEL.wave(MEL.picture(tone(frequency))))
    band = loudest(MEL.picture(tone(frequency)))[24]
    width = np.diff(np.flatnonzero(MEL.filters_MF[band].numpy())[[0, -1]])[0] * 8000 / 512
    assert abs(found - frequency) <= max(width / 2, 8000 / 512)


def test_a_sweep_comes_back_band_by_band():
    picture = MEL.picture(sweep())
    bands = loudest(picture)
    assert (np.diff(bands[1:-1]) >= 0).all() and bands[1] < 8 and bands[-2] > 40
    assert np.abs(bands - loudest(MEL.picture(MEL.wave(picture)))).max() <= 1


def test_low_sounds_are_at_the_bottom():
    low, high = (MEL.picture(tone(frequency))[:, 24, 0] for frequency in (100, 3900))
    assert low[-4:].max() > 200 > 100 > low[:24].max() and high[:4].max() > 200 > 100 > high[24:].max()


def test_values_are_decibels():
    steps = tone(1000) * 10.0 ** -np.repeat([0, 1, 2], 2048)  # 0, -20 and -40 dB
    values = MEL.picture(steps)[..., 0].max(0).astype(int)
    assert values[8] == 255 and values[24] - values[40] == pytest.approx(20 / 80 * 255, abs=1)


def test_a_peak_of_one_is_what_a_picture_is_of():
    wave = noise()
    assert (MEL.picture(wave) == MEL.picture(wave / np.abs(wave).max())).all()
    assert (MEL.picture(wave) == MEL.picture(wave / 64)).all()


def test_silence_stays_silence():
    picture = MEL.picture(np.zeros(6016, np.float32))
    assert (picture == 0).all() and (MEL.wave(picture) == 0).all()


def test_short_sounds_are_padded_and_long_ones_cut_at_their_end():
    short = noise(seconds=0.3)
    picture = MEL.picture(short)
    assert (picture == MEL.picture(np.pad(short, (0, 6016 - len(short))))).all() and (picture[:, 24:] == 0).all()
    long = np.concatenate([noise(), 0.1 * noise(1)])
    assert (MEL.picture(long) == MEL.picture(long[:6016])).all()


def test_sounds_stay_within_full_scale_and_do_not_depend_on_the_batch():
    pictures = np.stack([MEL.picture(noise(1)), MEL.picture(tone(500)), np.full((48, 48, 1), 255, np.uint8)])
    torch.manual_seed(1)
    first = MEL.wave(pictures)
    torch.manual_seed(2)
    assert (MEL.wave(pictures) == first).all() and np.abs(first).max() <= 1
    rounding = 2e-3  # the search for phases turns an error of one bit in a magnitude into 4e-4 of full scale
    for picture, wave in zip(pictures, first, strict=True):
        np.testing.assert_allclose(MEL.wave(picture), wave, atol=rounding)


def test_what_is_made_of_a_picture_looks_like_it():
    """Noise, in which no structure helps to find phases, and a voice; up to a factor, as phases decide on peaks."""
    voice = sum(np.sin(2 * np.pi * 120 * k * np.arange(MEL.samples) / 8000) / k for k in range(1, 30))
    for wave, limit in ((noise(), 2.0), (voice, 1.0)):
        picture = MEL.picture(wave)
        error = (MEL.picture(MEL.wave(picture)).astype(int) - picture)[picture > 127] * 80 / 255
        assert np.abs(error - np.median(error)).mean() < limit


@pytest.mark.filterwarnings("ignore:At least one mel filter")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"floor_db": 0.0}, r"floor_db=0\.0 is out of range; choose less than 0 dB"),
        ({"hop": 300}, "hop=300 is out of range; choose 1 to n_fft / 2, here 256"),
        ({"bins": 400}, "bins=400 is too many for data.mel.n_fft=512: .* bands hold no frequency"),
    ],
)
def test_parameters_that_cannot_be_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        Mel(**given)


def test_a_picture_of_another_size_is_no_sound():
    with pytest.raises(ValueError, match=r"a picture of shape \(32, 32, 3\) is no sound: this mel makes \(48, 48, 1\)"):
        MEL.wave(np.zeros((32, 32, 3), np.uint8))


# Folders of sounds


def write(path: Path, wave: np.ndarray, rate: int = 8000, **options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, **options)
    return path


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Two digits by two speakers, recordings 0 to 5."""
    for digit in (3, 7):
        for speaker in ("ann", "bob"):
            for number in range(6):
                frequency = 100 * digit + 10 * number + (5 if speaker == "bob" else 0)
                write(tmp_path / "digits" / f"{digit}_{speaker}_{number}.wav", tone(frequency, 0.2))
    return tmp_path / "digits"


def test_regular_expressions_select_labels_and_files(digits):
    train = Sounds(str(digits), MEL, label=r"^(\d)_", files=r"_([5-9]|\d\d)\.wav$")
    holdout = Sounds(str(digits), MEL, label=r"^(\d)_", files=r"_[0-4]\.wav$")
    assert (len(train), len(holdout)) == (4, 20) and not set(train.files) & set(holdout.files)
    assert {file.name for file in train.files} == {f"{d}_{s}_5.wav" for d in (3, 7) for s in ("ann", "bob")}
    assert [int(file.name[0]) for file in holdout.files] == holdout.labels.tolist()
    taken = holdout.take(np.array([4, 0]))
    assert taken["label"].tolist() == holdout.labels[[4, 0]].tolist() and taken["image"].shape == (2, 48, 48, 1)
    for index, picture in zip((4, 0), taken["image"], strict=True):
        assert (picture == MEL.picture(soundfile.read(holdout.files[index])[0])).all()


def test_labels_number_the_classes_of_the_whole_folder(digits, tmp_path):
    speakers = Sounds(str(digits), MEL, label=r"_([a-z]+)_", files="bob")
    assert set(speakers.labels.tolist()) == {1}
    for kind in ("drum", "bell"):
        write(tmp_path / "kinds" / kind / "0.flac", noise())
    by_folder = Sounds(str(tmp_path / "kinds"), MEL)
    assert {file.parent.name: label for file, label in zip(by_folder.files, by_folder.labels, strict=True)} == {
        "bell": 0,
        "drum": 1,
    }


def test_start_and_stop_share_a_folder_out(digits):
    parts = [Sounds(str(digits), MEL, label=r"^(\d)", **part).files for part in ({"stop": 6}, {"start": 6})]
    assert [len(part) for part in parts] == [6, 18] and set(parts[0]) | set(parts[1]) == set(digits.iterdir())
    assert not set(parts[0]) & set(parts[1])


def test_a_decoded_sound_is_kept(digits):
    source = Sounds(str(digits), MEL)
    first = source.take(np.array([1]))["image"]
    source.files[1].unlink()
    assert (source.take(np.array([1]))["image"] == first).all()
    source.kept.clear()
    with pytest.raises(BadSample):
        source.take(np.array([1]))


@pytest.mark.parametrize("rate", [16000, 44100, 6000])
def test_other_rates_are_resampled(tmp_path, rate):
    write(tmp_path / "a.wav", 0.5 * tone(1000, 0.5, rate), rate)
    found, expected = Sounds(str(tmp_path), MEL).picture(0), MEL.picture(tone(1000, 0.5))
    assert (loudest(found)[2:30] == loudest(expected)[2:30]).all()
    assert np.abs(found[..., 0].max(0).astype(int) - expected[..., 0].max(0))[2:30].max() <= 1


def test_channels_are_averaged(tmp_path):
    left, right = 0.4 * tone(500), 0.2 * tone(1500)
    write(tmp_path / "a.flac", np.stack([left, right], 1))
    write(tmp_path / "b.wav", np.stack([left, -left], 1), subtype="FLOAT")
    source = Sounds(str(tmp_path), MEL)
    pictures = {file.name: source.picture(index) for index, file in enumerate(source.files)}
    assert (
        np.abs(pictures["a.flac"].astype(int) - MEL.picture(left + right))[MEL.picture(left + right) > 100].max() <= 1
    )
    assert (pictures["b.wav"] == 0).all()


def encoded(wave: np.ndarray, kind: str, rate: int = 8000, subtype: str | None = None) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, wave, rate, format=kind, subtype=subtype)
    return content.getvalue()


BAD = {
    "empty file": (b"", "a.wav", "no content|Format not recognised"),
    "text": (b"<html>not found</html>" * 9, "a.wav", "Format not recognised"),
    "header only": (encoded(noise(), "WAV")[:44], "a.wav", "cut off after 0 samples"),
    "half a wav": (encoded(noise(), "WAV")[:6000], "a.wav", "cut off after 2978 samples"),
    "half a flac": (encoded(noise(), "FLAC")[:5000], "a.flac", "cut off|flac|lost sync|[Ee]rror"),
    "no samples": (encoded(np.zeros(0, np.float32), "WAV"), "a.wav", r"it has 0\.000 s; the least is 0\.064 s"),
    "too short": (encoded(noise(seconds=0.05), "WAV"), "a.wav", r"it has 0\.050 s; the least is 0\.064 s"),
    "nan": (
        encoded(np.where(np.arange(6000) == 99, np.nan, noise()[:6000]), "WAV", subtype="FLOAT"),
        "a.wav",
        "no numbers",
    ),
    "infinite": (encoded(np.full(6000, np.inf), "WAV", subtype="FLOAT"), "a.wav", "no numbers"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sound_is_named_with_what_is_wrong(tmp_path, kind):
    content, name, message = BAD[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadSample, match=message) as caught:
        Sounds(str(tmp_path), MEL).take(np.array([0]))
    assert str(tmp_path / name) in str(caught.value)


def test_a_folder_that_is_not_there_says_how_to_get_it(tmp_path):
    with pytest.raises(MissingData, match=r"nowhere.*clone it from there"):
        Sounds(str(tmp_path / "nowhere"), MEL, get="clone it from there")


@pytest.mark.parametrize("label", ["([a-z]{9})", "ann"])
def test_a_label_that_a_name_does_not_have_is_an_error(digits, label):
    with pytest.raises(ValueError, match=r"choose a regular expression with one group that is found in '3_ann_0\.wav'"):
        Sounds(str(digits), MEL, label=label)


# Tables of sounds


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A local copy of a data set: three sounds in a parquet file, the last one damaged."""
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "hub cache")
    contents = [encoded(tone(500), "WAV"), encoded(tone(2000, rate=16000), "FLAC", 16000), b"RIFF"]
    rows = {
        "sound": [{"bytes": content, "path": None} for content in contents],
        "word": [4, 2, 0],
        "said": ["a", "b", "c"],
    }
    binary = {"bytes": Value("binary"), "path": Value("string")}
    features = Features({"sound": binary, "word": Value("int64"), "said": Value("string")})
    path = tmp_path / "copy"
    path.mkdir()
    Dataset.from_dict(rows, features=features).cast_column("sound", Audio(decode=False)).to_parquet(
        path / "train.parquet"
    )
    return str(path)


def test_a_column_of_sounds_is_read(table):
    source = HuggingFaceSounds(table, "train", "sound", MEL, label="word", caption="said")
    taken = source.take(np.array([1, 0]))
    assert taken["label"].tolist() == [2, 4] and taken["caption"] == ["b", "a"] == list(source.captions[1::-1])
    assert taken["image"].shape == (2, 48, 48, 1)
    assert (taken["image"][1] == MEL.picture(soundfile.read(io.BytesIO(encoded(tone(500), "WAV")))[0])).all()
    assert (loudest(taken["image"][0])[2:40] == loudest(MEL.picture(tone(2000)))[2:40]).all()
    with pytest.raises(BadSample, match="row 2 cannot be used"):
        source.take(np.array([0, 2]))


def test_a_column_that_is_not_there_is_named(table):
    with pytest.raises(ValueError, match="has no column 'audio'; it has: sound, word, said"):
        HuggingFaceSounds(table, "train", "audio", MEL)


# Configurations


@pytest.mark.parametrize("place", ["spoken_digits", "shared/spoken_digits/recordings"])
def test_spoken_digits_are_read_from_either_folder(configure, tmp_path, monkeypatch, place):
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    for number in (0, 4, 5, 12):
        write(tmp_path / place / f"6_ann_{number}.wav", noise(number))
    data = build(configure("data=spoken_digits").data)
    assert {file.name for file in data.source("train").files} == {"6_ann_5.wav", "6_ann_12.wav"}
    assert {file.name for file in data.source("holdout").files} == {"6_ann_0.wav", "6_ann_4.wav"}
    assert data.image_shape() == data.mel.shape == (1, 48, 48) and data.source("train").labels.tolist() == [6, 6]
    batch = next(iter(data.subset("holdout", 2, 0, 2)))
    assert (data.mel.picture(noise(0))[..., 0] == MEL.picture(noise(0))[..., 0]).all() and batch["image"].shape == (
        2,
        1,
        48,
        48,
    )


def test_spoken_digits_that_are_in_no_place_name_both(configure, tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    with pytest.raises(
        MissingData, match=r"spoken_digits does not exist[\s\S]*shared/spoken_digits/recordings does not"
    ):
        build(configure("data=spoken_digits").data).source("train")


def test_any_folder_of_sounds_is_a_data_set(configure, digits):
    data = build(
        configure("data=sound_folder", f"data.path={digits}", "data.holdout_sounds=4", "data.mel.frames=32").data
    )
    assert [len(data.source(split)) for split in ("train", "holdout")] == [20, 4]
    assert data.image_shape() == (1, 48, 32) == data.mel.shape and not data.flip


def test_a_table_of_sounds_is_a_data_set(configure, table):
    choices = [f"data.train.path={table}", "data.train.audio=sound", "data.train.start=1"]
    data = build(configure("data=hf_sounds", *choices).data)
    assert [len(data.source(split)) for split in ("train", "holdout")] == [2, 1]
    assert data.image_shape() == data.mel.shape == (1, 64, 256)


# Real recordings


@pytest.mark.data
def test_spoken_digits_survive_being_pictures(configure):
    """300 held-out recordings: the error of the picture of the sound made of a picture, and the pitch of the voice."""
    if not any((data_root() / place).is_dir() for place in ("spoken_digits", "shared/spoken_digits")):
        pytest.skip("no spoken digits in $SECATEUR_DATA")
    data = build(configure("data=spoken_digits").data)
    assert [len(data.source(split)) for split in ("train", "holdout")] == [2700, 300]
    source = data.source("holdout")
    pictures = source.take(np.arange(64))["image"]
    waves = data.mel.wave(pictures)
    error = np.abs(data.mel.picture(waves).astype(int) - pictures) * 80 / 255
    assert error[pictures > 127].mean() < 1.8  # dB, where a sound is within 40 dB of full scale
    loud = [np.flatnonzero(p[..., 0].max(0) > 180) for p in pictures]
    moved = [
        np.abs(a[f] - b[f]) <= 1
        for a, b, f in zip(loudest(pictures), loudest(data.mel.picture(waves)), loud, strict=True)
    ]
    assert np.concatenate(moved).mean() > 0.9
