"""Sounds as pictures: log-mel spectrograms in 8 bits, so that VAEs, U-Nets and metrics of images work on them.

A data set of sounds is a `Source` of such pictures; its configuration has a `mel` node that turns samples back into
sounds. See conf/data/spoken_digits.yaml.

Tensors are named by shape: M mel bands, F frequencies of the Fourier transform, T frames.
"""

import functools
import io
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import scipy.signal
import soundfile
import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from datamodules.images import Images, hold_out
from datamodules.readers.base import BadSample, ListedSource, MissingData, Record, located
from datamodules.readers.folder import describe_no_samples, file_size, files_below, read_file, sort_others
from datamodules.readers.hub import HuggingFace
from datamodules.seeding import numpy_rng, torch_rng

EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")
"""Endings of sounds, in lower case."""
KEPT_BYTES = 2**28
"""Bytes of pictures that a source keeps in memory, as a sound costs much more to decode than a picture."""
MIN_POWER = 1e-30
"""Added power below which the logarithm is not taken; far below any `floor_db` of use."""
MOMENTUM = 0.99 / 1.99
"""Weight of the previous spectrum in the fast Griffin-Lim algorithm: alpha / (1 + alpha) of its alpha 0.99."""


class Mel:
    """Turns a sound into a picture (`bins` x `frames`, one channel) and back.

    A value of the picture is the power in one band of Slaney's mel scale, between 0 and rate / 2, in one Hann window.
    It is in decibels, from `floor_db` (0, which stands for silence) to the power of a sine at full scale (255): by
    default in steps of 0.31 dB. Low frequencies are at the bottom.

    Args:
        rate: samples per second of the sound, in Hz.
        n_fft: samples in a window.
        hop: samples from one window to the next.
        bins: number of mel bands, the height of the picture.
        frames: number of windows, the width of the picture.
        floor_db: power of the value 0 in decibels, below 0.
        iterations: iterations of the Griffin-Lim algorithm that finds the phases of a sound.
    """

    def __init__(
        self,
        rate: int = 8000,
        n_fft: int = 512,
        hop: int = 128,
        bins: int = 48,
        frames: int = 48,
        floor_db: float = -80.0,
        iterations: int = 32,
    ) -> None:
        if floor_db >= 0:
            raise ValueError(f"data.mel.floor_db={floor_db} is out of range; choose less than 0 dB")
        if not 0 < hop <= n_fft // 2:
            raise ValueError(f"data.mel.hop={hop} is out of range; choose 1 to n_fft / 2, here {n_fft // 2}")
        self.rate, self.n_fft, self.hop, self.bins, self.frames = rate, n_fft, hop, bins, frames
        self.floor_db, self.iterations = floor_db, iterations
        filters = mel_filter_bank(n_fft // 2 + 1, bins, 0.0, rate / 2, rate, norm=None, mel_scale="slaney")
        self.filters_MF = torch.from_numpy(filters.T.copy()).float()
        self.window = torch.hann_window(n_fft)
        if (empty := int((self.filters_MF.sum(1) == 0).sum())) > 0:
            raise ValueError(
                f"data.mel.bins={bins} is too many for data.mel.n_fft={n_fft}: {empty} bands hold no frequency at all"
            )

    @property
    def samples(self) -> int:
        """Number of samples of one sound: it starts at the middle of the first window and ends at that of the last."""
        return self.hop * (self.frames - 1)

    @property
    def seconds(self) -> float:
        """Length of one sound in seconds."""
        return self.samples / self.rate

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a picture."""
        return 1, self.bins, self.frames

    def picture(self, wave: np.ndarray) -> np.ndarray:
        """Return the picture uint8 (..., bins, frames, 1) of a sound (..., samples).

        The sound is cut, or padded with silence, at its end, and scaled to a peak of 1.
        """
        sound = torch.from_numpy(np.asarray(wave, np.float32))[..., : self.samples]
        sound = torch.nn.functional.pad(sound, (0, self.samples - sound.shape[-1]))
        peak = sound.abs().amax(-1, keepdim=True)
        spectrum_FT = self.spectrum(sound / torch.where(peak > 0, peak, 1))
        decibels_MT = 10 * torch.log10((self.filters_MF @ spectrum_FT.abs().square()).clamp_min(MIN_POWER))
        values = ((1 - decibels_MT / self.floor_db) * 255).round().clamp(0, 255)
        return values.to(torch.uint8).flip(-2)[..., None].numpy()

    def wave(self, picture: np.ndarray) -> np.ndarray:
        """Return the sound float32 (..., samples) in [-1,1] of a picture uint8 (..., bins, frames, 1).

        The powers of the frequencies are the non-negative least-squares solution for those of the bands; the lost
        phases are found by the fast Griffin-Lim algorithm (Perraudin et al. 2013), which begins at fixed random phases,
        so that the same picture gives the same sound. A sound that would exceed 1 is scaled down as a whole.
        """
        if picture.shape[-3:] != (self.bins, self.frames, 1):
            raise ValueError(
                f"a picture of shape {picture.shape[-3:]} is no sound: this mel makes ({self.bins}, {self.frames}, 1)"
            )
        values_MT = torch.from_numpy(picture[..., 0].copy()).float().flip(-2)
        power_MT = torch.where(values_MT > 0, 10 ** ((1 - values_MT / 255) * self.floor_db / 10), 0)
        magnitude_FT = solve_non_negative(self.filters_MF, power_MT).sqrt()
        phases = torch.rand(magnitude_FT.shape[-2:], generator=torch_rng("phases"))
        angle_FT = torch.polar(torch.ones_like(phases), 2 * math.pi * phases).expand(magnitude_FT.shape)
        before_FT = torch.zeros_like(angle_FT)
        for _ in range(self.iterations):
            spectrum_FT = self.spectrum(self.inverse(magnitude_FT * angle_FT))
            step_FT = spectrum_FT - MOMENTUM * before_FT
            angle_FT = step_FT / step_FT.abs().clamp_min(1e-12)
            before_FT = spectrum_FT
        sound = self.inverse(magnitude_FT * angle_FT)
        return (sound / sound.abs().amax(-1, keepdim=True).clamp_min(1)).numpy()

    def spectrum(self, sound: Tensor) -> Tensor:
        """Return the complex spectrum (..., F, T) of a sound (..., samples); a sine at full scale has a peak of 1."""
        flat = sound.reshape(-1, self.samples)
        spectra = torch.stft(flat, self.n_fft, self.hop, window=self.window, pad_mode="constant", return_complex=True)
        return (spectra * (2 / self.window.sum())).reshape(*sound.shape[:-1], *spectra.shape[1:])

    def inverse(self, spectrum_FT: Tensor) -> Tensor:
        """Return the sound (..., samples) whose spectrum is nearest to the one given."""
        flat = spectrum_FT.reshape(-1, *spectrum_FT.shape[-2:]) / (2 / self.window.sum())
        sounds = torch.istft(flat, self.n_fft, self.hop, window=self.window, length=self.samples)
        return sounds.reshape(*spectrum_FT.shape[:-2], -1)


def solve_non_negative(filters_MF: Tensor, power_MT: Tensor, iterations: int = 50) -> Tensor:
    """Return x >= 0 (..., F, T) that minimises |filters x - power|.

    It is found by the multiplicative updates of Lee and Seung 2001. `filters_MF` are the weights of each frequency in
    each band, `power_MT` (..., M, T) the powers of the bands.
    """
    target_FT = filters_MF.T @ power_MT
    x_FT = target_FT
    for _ in range(iterations):
        x_FT = x_FT * target_FT / (filters_MF.T @ (filters_MF @ x_FT) + 1e-20)  # no division by 0
    return x_FT


def decode_sounds(sounds: Iterable[tuple[str, Path | bytes | None]], mel: Mel) -> np.ndarray:
    """Return the pictures (N, bins, frames, 1) of encoded sounds, each given as (name, content or file).

    Channels are averaged, and other rates are resampled. Raises BadSample, with the name, for a sound that cannot be
    decoded, is cut off, is shorter than one window of `mel`, or holds values that are not finite.
    """
    pictures = []
    for name, content in sounds:
        try:
            if not content:
                raise BadSample("it has no content")
            wave, rate = read_wave(io.BytesIO(content) if isinstance(content, bytes) else content)
            if rate != mel.rate:
                common = math.gcd(rate, mel.rate)
                wave = scipy.signal.resample_poly(wave, mel.rate // common, rate // common)
            if len(wave) < mel.n_fft:
                raise BadSample(f"it has {len(wave) / mel.rate:.3f} s; the least is {mel.n_fft / mel.rate:.3f} s")
        except (OSError, RuntimeError, ValueError) as error:  # soundfile's own errors are RuntimeErrors
            raise BadSample(f"{name} cannot be used: {error}") from error
        pictures.append(mel.picture(wave))
    return np.stack(pictures)


def read_wave(file: Path | BinaryIO) -> tuple[np.ndarray, int]:
    """Return the sound in a file, float32 (samples,) with channels averaged, and its rate in Hz.

    Raises BadSample for a sound that is cut off, and for values that are not finite.
    """
    with soundfile.SoundFile(file) as sound:
        wave = sound.read(dtype="float32", always_2d=True).mean(1)
        # libsndfile notes "should be" where the header promises more than there is.
        if "should be" in sound.extra_info or len(wave) < len(sound):
            raise BadSample(f"it is cut off after {len(wave)} samples")
        if not np.isfinite(wave).all():
            raise BadSample("it holds values that are no numbers")
        return wave, sound.samplerate


class Sounds(ListedSource):
    """Every sound in a folder and its subfolders, as a picture of its mel spectrogram.

    Sounds are shuffled once, as a function of their number alone. If all names of classes are whole numbers, they are
    the labels; else labels number the classes of the whole folder in alphabetical order.

    Args:
        path: the folder; a relative one is looked up in $SECATEUR_DATA, too.
        mel: makes the pictures.
        label: regular expression whose one group, in the name of a file, is the name of its class; None for the folder
            that the file is in.
        files: regular expression that the names of files have to match; None for all files.
        start: number of the first sound that is used, of those that match, in the shuffled order.
        stop: number after the last sound that is used; None for all.
        get: how to get the data, for the message where they are missing.

    Raises:
        MissingData: the folder does not exist, or has no sounds.
        ValueError: `label` is not found in the name of a file.
    """

    captions = None

    def __init__(
        self,
        path: str,
        mel: Mel,
        label: str | None = None,
        files: str | None = None,
        start: int = 0,
        stop: int | None = None,
        get: str | None = None,
    ) -> None:
        root = located(path, get)
        if not root.is_dir():
            raise MissingData(f"{root} is not a folder: `path` names the folder that holds the sounds")
        names_below = list(files_below(root))
        sounds = sorted(root / name for name in names_below if name.lower().endswith(EXTENSIONS))
        others = (name for name in names_below if not name.lower().endswith(EXTENSIONS))
        self.passed_over, self.dangling_links = sort_others(root, others)
        if not sounds:
            raise MissingData(describe_no_samples(self, root, "sounds", EXTENSIONS))
        groups = [find_class(file, label) for file in sounds]
        names = sorted(set(groups))
        numbers = all(name.isdecimal() for name in names)
        self.class_names = None if numbers else names
        chosen = [i for i, file in enumerate(sounds) if files is None or re.search(files, file.name)]
        order = [chosen[i] for i in numpy_rng("folder", len(chosen)).permutation(len(chosen))[start:stop]]
        self.root, self.files = root, [sounds[i] for i in order]
        self.labels = np.array([int(groups[i]) if numbers else names.index(groups[i]) for i in order], np.int64)
        self.mel = mel
        self.kept: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index].relative_to(self.root).as_posix()

    def raw(self, index: int) -> bytes:
        return read_file(self.files[index])

    def describe_sample(self, index: int) -> str:
        return describe_sound(self.name(index), self.files[index])

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        return np.array([file_size(self.files[int(index)]) for index in indices], np.int64)

    def listing(self) -> bytes:
        return "\n".join(map(self.name, range(len(self)))).encode("utf-8", "surrogateescape") + self.labels.tobytes()

    def take(self, indices: np.ndarray) -> Record:
        return {"image": np.stack([self.picture(int(i)) for i in indices]), "label": self.labels[indices]}

    def picture(self, index: int) -> np.ndarray:
        """Return the picture of one sound, which is kept in memory while there is room for it."""
        if index in self.kept:
            return self.kept[index]
        picture = decode_sounds([(str(self.files[index]), self.files[index])], self.mel)[0]
        if (len(self.kept) + 1) * picture.size <= KEPT_BYTES:
            self.kept[index] = picture
        return picture


def describe_sound(name: str, file: Path | BinaryIO) -> str:
    """Return the form of an encoded sound, such as "WAV, 8000 Hz, 1 channel". Raises BadSample, with the name."""
    try:
        sound = soundfile.info(file)
    except (OSError, RuntimeError) as error:
        raise BadSample(f"{name} cannot be used: {error}") from error
    return f"{sound.format}, {sound.samplerate} Hz, {sound.channels} channel{'s' * (sound.channels > 1)}"


def find_class(file: Path, label: str | None) -> str:
    """Return the name of a sound's class: the group of `label` in the name of its file, or its folder without one."""
    if label is None:
        return file.parent.name
    match = re.search(label, file.name)
    if match is None or len(match.groups()) != 1:
        raise ValueError(
            f"data.label={label!r}: choose a regular expression with one group that is found in {file.name!r}"
        )
    return match.group(1)


class HuggingFaceSounds(HuggingFace):
    """A split of a data set of sounds on the Hugging Face hub, as pictures of their mel spectrograms.

    Args:
        path: see HuggingFace, as `split`, `label`, `caption`, `subset`, `data_files`, `start` and `stop`.
        audio: column of sounds, as Audio or as binary with an encoded sound in each row.
        mel: makes the pictures.
    """

    def __init__(
        self,
        path: str,
        split: str,
        audio: str,
        mel: Mel,
        label: str | None = None,
        caption: str | None = None,
        subset: str | None = None,
        data_files: str | list[str] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        super().__init__(path, split, audio, label, mel.bins, "L", caption, subset, data_files, start=start, stop=stop)
        self.mel = mel

    def describe_sample(self, index: int) -> str:
        return describe_sound(self.name(index), io.BytesIO(self.raw(index)))

    def decode(self, encoded: list[tuple[str, Path | bytes | None]]) -> Record:
        return {"image": decode_sounds(encoded, self.mel)}


def sound_folder(
    path: str,
    mel: Mel,
    holdout_sounds: int,
    batch_size: int,
    label: str | None = None,
    seed: int = 0,
    num_workers: int = 0,
    get: str | None = None,
    statistics: dict[str, str] | None = None,
    max_bad_fraction: float = 0.01,
) -> Images:
    """Return the data set of one folder of sounds, of which some are held out.

    Args:
        path: the folder.
        mel: makes the pictures of the sounds, and sounds of generated pictures.
        holdout_sounds: number of sounds that are held out, drawn from all subfolders alike.
        batch_size: number of sounds in a training batch, over all ranks.
        label: see Sounds, as `get`.
        seed: see Images, as `num_workers`, `statistics` and `max_bad_fraction`.
    """
    return hold_out(
        functools.partial(Sounds, path, mel, label, get=get),
        holdout_sounds,
        statistics=statistics,
        max_bad_fraction=max_bad_fraction,
        batch_size=batch_size,
        seed=seed,
        flip=False,  # a sound backwards is another sound
        num_workers=num_workers,
        mel=mel,
    )
