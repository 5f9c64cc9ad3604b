"""The sounds of a run: wav files, those on its page, and those on the dashboard."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from omegaconf import OmegaConf
from support.config import composed
from support.sounds import MEL, peak, tone

from experiments.reporting.pages import write_page
from experiments.reporting.sounds import embed_sounds, load_wandb_sounds, write_sounds

PICTURES = np.stack([MEL.picture(tone(frequency)) for frequency in (300, 900, 2700)])

NETWORKS = ["teacher", "pruned", "distilled"]


def configured(override: str) -> dict[str, Any]:
    """A configuration as a run keeps it."""
    return OmegaConf.to_container(composed(override), resolve=True)  # type: ignore[return-value]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with three samples of teacher and pruned network."""
    for name in ("teacher", "pruned"):
        (tmp_path / "samples" / name).mkdir(parents=True)
        np.save(tmp_path / "samples" / name / "images.npy", PICTURES)
    return tmp_path


def test_a_run_gets_wav_files_that_can_be_played(run):
    folders = {name: [run / "sounds" / name / f"0{k}.wav" for k in (0, 1)] for name in ("pruned", "teacher")}
    assert write_sounds(run, MEL, count=2) == folders
    assert sorted(run.rglob("*.wav")) == [*folders["pruned"], *folders["teacher"]]
    info = soundfile.info(folders["teacher"][1])
    assert (info.samplerate, info.frames, info.channels, info.subtype) == (8000, 6016, 1, "PCM_16")
    wave = soundfile.read(folders["teacher"][1])[0]
    np.testing.assert_allclose(wave, MEL.wave(PICTURES[1]), atol=1e-4)
    assert peak(wave) == pytest.approx(900, abs=16)


def test_the_page_of_a_run_plays_sounds_of_each_network(run):
    sounds = embed_sounds(run, configured("data=digits_sample"), NETWORKS, count=1)
    assert [(name, len(found)) for name, found in sounds.items()] == [("teacher", 1), ("pruned", 1)]
    head, content = sounds["pruned"][0].split(",")
    assert head == "data:audio/wav;base64"
    assert base64.b64decode(content) == (run / "sounds/pruned/00.wav").read_bytes()
    names = ("samples", "texts", "quality", "better", "references", "losses", "scorings", "fronts", "seconds")
    nothing: dict[str, Any] = {
        "repairs": {},
        "title": "a",
        "report_command": "",
        "summary": "",
        "protocol": None,
        "config": "",
        **{name: {} for name in names},
    }
    page = write_page(run / "report.html", "run.html.j2", networks=NETWORKS, sounds=sounds, **nothing).read_text()
    assert page.count("<audio controls") == 2 and f'src="{sounds["teacher"][0]}"' in page


def test_a_run_on_pictures_has_no_sounds(run):
    assert embed_sounds(run, configured("data=cifar10_sample"), NETWORKS) == {} and not (run / "sounds").exists()


def test_the_dashboard_gets_the_written_sounds(run):
    assert load_wandb_sounds(run) == {}
    write_sounds(run, MEL, count=2)
    logged = load_wandb_sounds(run)
    assert list(logged) == ["sounds/pruned", "sounds/teacher"]
    assert [type(audio).__name__ for found in logged.values() for audio in found] == ["Audio"] * 4


def test_resized_samples_are_not_written_as_sounds(tmp_path):
    (tmp_path / "samples" / "teacher").mkdir(parents=True)
    np.save(tmp_path / "samples" / "teacher" / "images.npy", np.zeros((2, 64, 64, 1), np.uint8))
    assert write_sounds(tmp_path, MEL) == {} and not (tmp_path / "sounds").exists()


def test_a_damaged_array_is_named_with_its_remedy(tmp_path):
    path = tmp_path / "samples" / "pruned" / "images.npy"
    path.parent.mkdir(parents=True)
    for content in (b"no array", b"\x93NUMPY\x01\0", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path} is damaged: .*delete {path.parent} to have it made again"):
            write_sounds(tmp_path, MEL)
