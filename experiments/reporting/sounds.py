"""The sounds of a run: files that can be played, for the run directory, its page and the dashboard."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import wandb
from omegaconf import OmegaConf

from conf.schema import build
from datamodules.audio import Mel


def write_sounds(folder: Path, mel: Mel, count: int = 8) -> dict[str, list[Path]]:
    """Write the first samples of each network of a run as 16-bit wav files, sounds/<network>/00.wav and so on.

    Returns the files by network; none where the run has drawn no samples of the size of sounds.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted((folder / "samples").glob("*/images.npy")):
        pictures = np.load(path, mmap_mode="r", allow_pickle=False)[:count]
        if pictures.shape[1:] != (mel.bins, mel.frames, 1):  # evaluation.resize
            continue
        target = folder / "sounds" / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        found[target.name] = []
        for number, wave in enumerate(mel.wave(pictures)):
            file = target / f"{number:02}.wav"
            soundfile.write(file, wave, mel.rate, subtype="PCM_16")
            found[target.name].append(file)
    return found


def page_sounds(folder: Path, cfg: dict[str, Any], networks: Sequence[str], count: int = 4) -> dict[str, list[str]]:
    """Write the sounds of a run of this configuration; the first ones of some networks as data addresses, for its page.

    There are none where the data set has no `mel`.
    """
    mel = cfg["data"].get("mel")
    written = {} if mel is None else write_sounds(folder, build(OmegaConf.create(mel)))
    return {name: [inline(file) for file in written[name][:count]] for name in networks if name in written}


def inline(file: Path) -> str:
    """A wav file as a data address, so that a page is one file."""
    return "data:audio/wav;base64," + base64.b64encode(file.read_bytes()).decode()


def dashboard_sounds(folder: Path) -> dict[str, list[Any]]:
    """The sounds of a run as W&B logs them, by network; none where `write_sounds` has written none."""
    files = sorted((folder / "sounds").glob("*/*.wav"))
    names = sorted({file.parent.name for file in files})
    return {
        f"sounds/{name}": [wandb.Audio(str(file), caption=file.stem) for file in files if file.parent.name == name]
        for name in names
    }
