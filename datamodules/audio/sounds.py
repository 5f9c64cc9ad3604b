"""Sound as pictures: log-mel spectrograms in 8 bits, so that what handles images (VAE, U-Net, metrics) handles sound.

A data set of sounds is a `Source` of such pictures; its configuration has a `mel` node that turns samples back into
sound. See conf/data/spoken_digits.yaml.
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

from datamodules.images import Images
from datamodules.readers.base import BadSample, ListedSource, MissingData, Record, located
from datamodules.readers.folder import counted_endings, endings_of, files_below, read_file, size_of
from datamodules.readers.hub import HuggingFace
from datamodules.seeding import numpy_rng, torch_rng

EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")
KEPT_BYTES = 2**28
"""of decoded pictures that a source keeps in memory"""


class Mel:
    """Turns sound of `rate` Hz into a picture (`bins` x `frames`, one channel) and back.

    A value of the picture is the power in one band of Slaney's mel scale between 0 and rate / 2 and in one Hann window
    of `n_fft` samples, every `hop` samples, in decibels between `floor_db` (0) and that of a sine at full scale (255):
    by default in steps of 0.31 dB. 0 stands for silence. Low frequencies are at the bottom.
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
        """Samples of one sound: the middle of the first window is its start, that of the last one its end."""
        return self.hop * (self.frames - 1)

    @property
    def seconds(self) -> float:
        """Length of one sound."""
        return self.samples / self.rate

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a picture."""
        return 1, self.bins, self.frames

    def picture(self, wave: np.ndarray) -> np.ndarray:
        """float32 (..., T) -> uint8 (..., bins, frames, 1).

        A sound is cut, or padded with silence, at its end, and scaled to a peak of 1.
        """
        sound = torch.from_numpy(np.asarray(wave, np.float32))[..., : self.samples]
        sound = torch.nn.functional.pad(sound, (0, self.samples - sound.shape[-1]))
        peak = sound.abs().amax(-1, keepdim=True)
        spectrum_FT = self.spectrum(sound / torch.where(peak > 0, peak, 1))
        decibels_MT = 10 * torch.log10((self.filters_MF @ spectrum_FT.abs().square()).clamp_min(1e-30))
        values = ((1 - decibels_MT / self.floor_db) * 255).round().clamp(0, 255)
        return values.to(torch.uint8).flip(-2)[..., None].numpy()

    def wave(self, picture: np.ndarray) -> np.ndarray:
        """uint8 (..., bins, frames, 1) -> float32 (..., samples) in [-1,1].

        The powers of the bands are undone by least squares without negative powers, the lost phases are found by the
        fast Griffin-Lim algorithm (Perraudin et al. 2013), from fixed random ones: the same picture gives the same
        sound. What would exceed 1 is scaled down as a whole.
        """
        if picture.shape[-3:] != (self.bins, self.frames, 1):
            raise ValueError(
                f"a picture of {picture.shape[-3:]} is no sound of this mel, which are ({self.bins}, {self.frames}, 1)"
            )
        values_MT = torch.from_numpy(picture[..., 0].copy()).float().flip(-2)
        power_MT = torch.where(values_MT > 0, 10 ** ((1 - values_MT / 255) * self.floor_db / 10), 0)
        magnitude_FT = non_negative(self.filters_MF, power_MT).sqrt()
        phases = torch.rand(magnitude_FT.shape[-2:], generator=torch_rng("phases"))
        angle_FT = torch.polar(torch.ones_like(phases), 2 * math.pi * phases).expand(magnitude_FT.shape)
        before_FT = torch.zeros_like(angle_FT)
        for _ in range(self.iterations):
            spectrum_FT = self.spectrum(self.inverse(magnitude_FT * angle_FT))
            step_FT = spectrum_FT - 0.99 / 1.99 * before_FT
            angle_FT = step_FT / step_FT.abs().clamp_min(1e-12)
            before_FT = spectrum_FT
        sound = self.inverse(magnitude_FT * angle_FT)
        return (sound / sound.abs().amax(-1, keepdim=True).clamp_min(1)).numpy()

    def spectrum(self, sound: Tensor) -> Tensor:
        """(..., samples) -> complex (..., n_fft / 2 + 1, frames), in which a sine at full scale has a peak of 1."""
        flat = sound.reshape(-1, self.samples)
        found = torch.stft(flat, self.n_fft, self.hop, window=self.window, pad_mode="constant", return_complex=True)
        return (found * (2 / self.window.sum())).reshape(*sound.shape[:-1], *found.shape[1:])

    def inverse(self, spectrum_FT: Tensor) -> Tensor:
        """The sound (..., samples) whose spectrum is nearest."""
        flat = spectrum_FT.reshape(-1, *spectrum_FT.shape[-2:]) / (2 / self.window.sum())
        found = torch.istft(flat, self.n_fft, self.hop, window=self.window, length=self.samples)
        return found.reshape(*spectrum_FT.shape[:-2], -1)


def non_negative(filters_MF: Tensor, power_MT: Tensor, iterations: int = 50) -> Tensor:
    """x >= 0 with filters x near to `power`, by the multiplicative updates of Lee and Seung 2001: (..., F, T)."""
    target_FT = filters_MF.T @ power_MT
    found_FT = target_FT
    for _ in range(iterations):
        found_FT = found_FT * target_FT / (filters_MF.T @ (filters_MF @ found_FT) + 1e-20)
    return found_FT


def heard(sounds: Iterable[tuple[str, Path | bytes | None]], mel: Mel) -> np.ndarray:
    """The pictures (N, bins, frames, 1) of some encoded sounds, each given after its name.

    Channels are averaged, other rates are resampled. Raises BadSample, with the name, for a sound that cannot be
    decoded, is cut off, is shorter than one window of `mel`, or holds values that are no numbers.
    """
    pictures = []
    for name, content in sounds:
        try:
            if not content:
                raise BadSample("it has no content")
            wave, rate = opened(io.BytesIO(content) if isinstance(content, bytes) else content)
            if rate != mel.rate:
                common = math.gcd(rate, mel.rate)
                wave = scipy.signal.resample_poly(wave, mel.rate // common, rate // common)
            if len(wave) < mel.n_fft:
                raise BadSample(f"it has {len(wave) / mel.rate:.3f} s; the least is {mel.n_fft / mel.rate:.3f} s")
        except (OSError, RuntimeError, ValueError) as error:  # soundfile's own errors are RuntimeErrors
            raise BadSample(f"{name} cannot be used: {error}") from error
        pictures.append(mel.picture(wave))
    return np.stack(pictures)


def opened(file: Path | BinaryIO) -> tuple[np.ndarray, int]:
    """The sound in a file, one channel of float32 (T,), and its rate. Raises BadSample for half a sound and such."""
    with soundfile.SoundFile(file) as sound:
        wave = sound.read(dtype="float32", always_2d=True).mean(1)
        # libsndfile notes "should be" where the header promises more than there is.
        if "should be" in sound.extra_info or len(wave) < len(sound):
            raise BadSample(f"it is cut off after {len(wave)} samples")
        if not np.isfinite(wave).all():
            raise BadSample("it holds values that are no numbers")
        return wave, sound.samplerate


class Sounds(ListedSource):
    """Every sound below a folder, as a picture of `mel`.

    Of the files whose names match the regular expression `files` (all of them where it is null), shuffled once as a
    function of their number alone, those of [start, stop). `label` is a regular expression with one group, searched in
    the name of a file; where it is null, the sound's own folder takes the place of that group. Groups that are all
    whole numbers are labels themselves; others are numbered in alphabetical order over the whole folder. A relative
    `path` is looked up in $SECATEUR_DATA, too. Raises MissingData, with what `get` says, where the folder is not, and
    ValueError naming a file in which there is no label.
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
        every = [root / name for name in files_below(root)]
        found = sorted(file for file in every if file.suffix.lower() in EXTENSIONS)
        self.passed_over = endings_of(file.name for file in every if file.suffix.lower() not in EXTENSIONS)
        if not found:
            rest = f"; it has other files: {counted_endings(self.passed_over)}" if self.passed_over else ""
            raise MissingData(f"{root} has no sounds ({', '.join(EXTENSIONS)}) in it or in its folders{rest}")
        groups = [group_of(file, label) for file in found]
        names = sorted(set(groups))
        numbers = all(name.isdecimal() for name in names)
        self.class_names = None if numbers else names
        chosen = [i for i, file in enumerate(found) if files is None or re.search(files, file.name)]
        order = [chosen[i] for i in numpy_rng("folder", len(chosen)).permutation(len(chosen))[start:stop]]
        self.root, self.files = root, [found[i] for i in order]
        self.labels = np.array([int(groups[i]) if numbers else names.index(groups[i]) for i in order], np.int64)
        self.mel = mel
        self.kept: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index].relative_to(self.root).as_posix()

    def raw(self, index: int) -> bytes:
        return read_file(self.files[index])

    def sizes(self, indices: np.ndarray) -> np.ndarray:
        return np.array([size_of(self.files[int(index)]) for index in indices], np.int64)

    def listing(self) -> bytes:
        return "\n".join(map(self.name, range(len(self)))).encode("utf-8", "surrogateescape") + self.labels.tobytes()

    def take(self, indices: np.ndarray) -> Record:
        return {"image": np.stack([self.picture(int(i)) for i in indices]), "label": self.labels[indices]}

    def picture(self, index: int) -> np.ndarray:
        """One sound; kept in memory, while there is room."""
        if index in self.kept:
            return self.kept[index]
        picture = heard([(str(self.files[index]), self.files[index])], self.mel)[0]
        if (len(self.kept) + 1) * picture.size <= KEPT_BYTES:
            self.kept[index] = picture
        return picture


def group_of(file: Path, label: str | None) -> str:
    """What tells the class of a sound: the group of `label` in its name, or its folder."""
    if label is None:
        return file.parent.name
    match = re.search(label, file.name)
    if match is None or len(match.groups()) != 1:
        raise ValueError(f"label={label!r} is to be a regular expression with one group that is found in {file.name!r}")
    return match.group(1)


class HuggingFaceSounds(HuggingFace):
    """The sounds in the column `audio` of a split on the Hugging Face hub, as pictures of `mel`; else as HuggingFace.

    The column holds Audio (or encoded sounds as binary).
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

    def decode(self, encoded: list[tuple[str, Path | bytes | None]]) -> Record:
        return {"image": heard(encoded, self.mel)}


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
    """One folder of sounds, of which `holdout_sounds`, of every subfolder its share, are held out."""
    return Images(
        train=functools.partial(Sounds, path, mel, label, start=holdout_sounds, get=get),
        holdout=functools.partial(Sounds, path, mel, label, stop=holdout_sounds, get=get),
        statistics=statistics,
        max_bad_fraction=max_bad_fraction,
        batch_size=batch_size,
        seed=seed,
        flip=False,
        num_workers=num_workers,
        mel=mel,
    )
