"""The samples of a run as sounds: wav files in its folder, on its page and on the dashboard."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb
from omegaconf import OmegaConf

from conf.schema import build
from datamodules.audio import Mel
from experiments.engine.artefacts import read_array
from experiments.reporting.pages import encode_address


def write_sounds(folder: Path, mel: Mel, count: int = 8) -> dict[str, list[Path]]:
    """Write the first samples of each network as 16-bit wav files, sounds/<network>/00.wav and so on.

    Returns {network: its files}. A network whose samples do not have the size of the data's mel spectrograms
    (`evaluation.resize`), or that has none, is left out.
    """
    import soundfile  # noqa: PLC0415  for sounds alone

    files: dict[str, list[Path]] = {}
    for path in sorted((folder / "samples").glob("*/images.npy")):
        mels = read_array(path)[:count]
        if mels.shape[1:] != (mel.bins, mel.frames, 1):
            continue
        network = path.parent.name
        (folder / "sounds" / network).mkdir(parents=True, exist_ok=True)
        files[network] = []
        for number, wave in enumerate(mel.wave(mels)):
            file = folder / "sounds" / network / f"{number:02}.wav"
            soundfile.write(file, wave, mel.rate, subtype="PCM_16")
            files[network].append(file)
    return files


def embed_sounds(folder: Path, cfg: dict[str, Any], networks: Sequence[str], count: int = 4) -> dict[str, list[str]]:
    """Write the sounds of a run, and return the first ones of each network as `data:` addresses for its page.

    The result is empty where the data set of the run's configuration has no `mel`, i.e. no sounds.
    """
    mel = cfg["data"].get("mel")
    files = {} if mel is None else write_sounds(folder, build(OmegaConf.create(mel)))
    return {
        name: [encode_address(file.read_bytes(), "audio/wav") for file in files[name][:count]]
        for name in networks
        if name in files
    }


def load_wandb_sounds(folder: Path) -> dict[str, list[Any]]:
    """Return {"sounds/<network>": sounds as W&B logs them} of the files that `write_sounds` has written."""
    files = sorted((folder / "sounds").glob("*/*.wav"))
    networks = sorted({file.parent.name for file in files})
    return {
        f"sounds/{name}": [wandb.Audio(str(file), caption=file.stem) for file in files if file.parent.name == name]
        for name in networks
    }
