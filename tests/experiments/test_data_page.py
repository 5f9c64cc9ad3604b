"""The command `python -m experiments.data`: what it counts, what it warns of, and its page."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from datamodules.audio import Mel, sound_folder
from datamodules.images import image_folder
from datamodules.texts.corpus import Corpus
from datamodules.texts.tokens import Tokenizer
from experiments.inspection import command
from experiments.inspection.command import inspect_data
from experiments.inspection.page import write_data_page
from experiments.inspection.survey import survey_data


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """40 slices of 12 bits in 16, two of them the same, one damaged, in two classes, beside a file of another kind."""
    folder = tmp_path / "scans"
    for number in range(40):
        values = np.random.default_rng(number).integers(0, 4096, (12, 20)).astype(np.uint16)
        file = folder / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(file)
    (folder / "a" / "copy.png").write_bytes((folder / "a" / "0.png").read_bytes())
    (folder / "b" / "1.png").write_bytes(b"damaged")
    (folder / "notes.odt").touch()
    return folder


def survey_scans(folder: Path, **options):
    return survey_data(image_folder(str(folder), 8, 4, 4, mode="L", **options), "scans")


def test_a_survey_counts_what_is_there(scans):
    survey = survey_scans(scans)
    train, holdout = survey.splits
    assert (train.count, holdout.count, survey.shape) == (37, 4, (1, 8, 8))
    assert sum(len(split.bad) for split in survey.splits) == 1
    forms = sum((split.forms for split in survey.splits), train.forms - train.forms)
    assert forms in ({"PNG, I;16, 20x12": 40}, {"PNG, I, 20x12": 40})  # as versions of Pillow name the mode
    assert set(train.sizes) == {(20, 12)} and sum(split.labels.total() for split in survey.splits) == 41
    assert [survey.name_class(label) for label in sorted(train.labels)] == ["a", "b"]


def test_a_survey_says_what_to_look_at(scans):
    text = survey_scans(scans).summarise()
    assert (
        "bad samples: 1 of " in text
        and "; a job would replace them. " in text
        and "b/1.png cannot be used: no known format" in text
    )
    assert re.search(
        r"look at: +data\.train: all pictures together have 1\d of 256 pixel values, so that contrast", text
    )
    assert "; stored values are 0 to 409" in text and "as stored" in text
    assert "look at:    the data have other files: .odt (1); none of them is read" in text
    assert "all pictures together" not in survey_scans(scans, pixel_range=[0, 4095]).summarise()


def test_a_sample_in_both_splits_and_one_that_occurs_twice_are_named(scans):
    pairs = set()
    for seed in range(2):  # the copy is trained on with the original, or one of them is held out
        survey = survey_data(image_folder(str(scans), 8, 1 + 20 * seed, 4, mode="L"), "scans")
        pairs |= {frozenset(pair) for split in survey.splits for pair in split.repeated}
        pairs |= {frozenset(pair) for pair in survey.duplicates}
    assert pairs == {frozenset({"a/0.png", "a/copy.png"})}


def test_a_job_that_would_stop_is_foretold(scans):
    for number in range(30):
        (scans / "a" / f"bad{number}.png").touch()
    assert "a job would stop, as data.max_bad_fraction=0.01 allows 5 in all" in survey_scans(scans).summarise()


def test_the_page_shows_the_first_samples_of_the_training(configure, overrides, tmp_path):
    cfg = configure(*overrides)
    page = inspect_data(cfg)
    assert page == tmp_path / "runs" / "data" / "tiny.html"
    text = page.read_text()
    assert text.count('<img src="data:image/png;base64,') == 32 + 16
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)  # one file, nothing from elsewhere


def test_previews_are_what_training_gets(configure, overrides):
    from experiments.engine.inputs import build_data

    data = build_data(configure(*overrides))
    batch = next(iter(data.train_dataloader()))
    previews = data.preview("train", 4)
    assert [preview.index for preview in previews] == batch["index"].tolist()
    expected = ((batch["image"] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert (np.stack([preview.picture for preview in previews]) == expected).all()
    assert [preview.label for preview in previews] == batch["label"].tolist()


def test_sounds_are_played_and_shown(tmp_path):
    mel = Mel(bins=16, frames=8, n_fft=128, hop=64)
    for number in range(6):
        file = tmp_path / "sounds" / "ab"[number % 2] / f"{number}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, np.sin(np.arange(800) * (0.2 + 0.1 * number)), 8000)
    survey = survey_data(sound_folder(str(tmp_path / "sounds"), mel, 2, 2), "sounds")
    assert survey.splits[0].forms == {"WAV, 8000 Hz, 1 channel": 4}
    text = write_data_page(tmp_path / "page.html", survey, mel, "").read_text()
    assert text.count('<audio controls src="data:audio/wav;base64,') == 6 == text.count("<img")


def test_texts_are_shown_as_text(tmp_path):
    (tmp_path / "train.txt").write_text("the cat sat on the mat " * 8)
    (tmp_path / "holdout.txt").write_text("a dog & a <b> " * 8)
    letters = Tokenizer(lambda text: [ord(letter) for letter in text], 256, decode=lambda ids: "".join(map(chr, ids)))
    data = Corpus(str(tmp_path / "train.txt"), str(tmp_path / "holdout.txt"), letters, length=14, batch_size=2)
    survey = survey_data(data, "texts")
    assert "samples of 14" in survey.summarise() and survey.splits[0].mean is None
    assert survey.splits[1].previews[0].text == "a dog & a <b> " and len(survey.splits[1].repeated) == 7
    assert "a dog &amp; a &lt;b&gt; " in write_data_page(tmp_path / "page.html", survey, None, "").read_text()


def test_data_that_are_missing_end_the_command_with_one_line(tmp_path, monkeypatch):
    arguments = ["data", "data=image_folder", f"data.path={tmp_path}/nothing", f"paths.runs={tmp_path}/runs"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match=r"^data=image_folder: .*/nothing does not exist"):
        command.run()
    assert not (tmp_path / "runs").exists()
