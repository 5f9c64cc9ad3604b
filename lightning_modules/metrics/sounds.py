"""Features of sounds, for Frechet distances. Sounds are given as pictures of a `Mel`, which are converted to waves.

`fad_vggish` is the Frechet audio distance (Kilgour et al. 2019, arXiv 1812.08466), `fad_clap` the same on CLAP's
embeddings (Gui et al. 2024, arXiv 2311.01616). `frechet_digits` uses a small classifier of spoken digits, for
machines without internet access. The three are not comparable.
"""

import functools
import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import scipy.signal
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ClapFeatureExtractor, ClapModel
from transformers.audio_utils import mel_filter_bank

from datamodules.audio import Mel
from datamodules.readers.base import MissingData, data_root
from lightning_modules.backbones.classification.image_networks import CifarResNet
from lightning_modules.backbones.classification.load import load_resnet
from lightning_modules.metrics.features import CPU, ResNet20, ResNet20Classes
from lightning_modules.metrics.published import digest_of_weights


class Digits(ResNet20):
    """Pooled features of the embedded classifier of spoken digits, for the pictures of data=spoken_digits."""

    name, transform = "frechet_digits", "none (48x48)"
    shape = (1, 48, 48)
    experiment, instead = "pretrain_digits_classifier", "fad_clap"

    def network(self) -> CifarResNet:
        return load_resnet(self.path, blocks=1, mean=[0.25], std=[0.25])


class DigitsClasses(Digits):
    """Log-probabilities of the digits 0 to 9 by the embedded classifier."""

    name, dimension = "digits_classes", 10
    outputs = ResNet20Classes.outputs


class SoundFeatures:
    """Base class of features of sounds at `rate` Hz, which `mel` reconstructs from their pictures.

    Subclasses define `name`, `rate`, `network`, `outputs`, `fingerprint` and `dimension`.
    """

    name: str
    rate: int
    batch_size = 32

    def __init__(self, mel: Mel | None) -> None:
        if mel is None:
            raise ValueError(
                f"{self.name} is for sounds, and data.mel is not set: choose data=spoken_digits or another"
            )
        self.mel = mel
        self.transform = f"Griffin-Lim ({mel.iterations} iterations), {mel.rate} Hz -> {self.rate} Hz"

    def check(self, shape: tuple[int, int, int]) -> None:
        if tuple(shape) != self.mel.shape:
            raise ValueError(f"{self.name} takes pictures of data.mel, {self.mel.shape}; these are {shape}")

    def network(self) -> Any:
        """Return the network in eval mode, on the CPU."""
        raise NotImplementedError

    def outputs(self, network: Any, sounds_NT: np.ndarray, device: torch.device) -> Tensor:
        """Return the features (N, dimension) of sounds (N, T) with values in [-1, 1]."""
        raise NotImplementedError

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, device: torch.device = CPU) -> np.ndarray:
        height, width, channels = images.shape[1:]
        self.check((channels, height, width))
        network, common = self.network().to(device), math.gcd(self.rate, self.mel.rate)
        outputs = []
        for start in range(0, len(images), self.batch_size):
            waves = self.mel.wave(images[start : start + self.batch_size])
            sounds = scipy.signal.resample_poly(waves, self.rate // common, self.mel.rate // common, axis=-1)
            outputs.append(self.outputs(network, sounds.astype(np.float32), device).double().cpu())
        return torch.cat(outputs).numpy()


class Clap(SoundFeatures):
    """The joint embedding of audio and text of a CLAP without feature fusion (Wu et al. 2023, arXiv 2211.06687).

    `path` is a folder or a hub id. Sounds are truncated to the network's input (10 s); shorter ones are repeated.
    Raises MissingData where the weights cannot be read.
    """

    name, rate = "fad_clap", 48000

    def __init__(self, mel: Mel | None, path: str = "laion/clap-htsat-unfused") -> None:
        super().__init__(mel)
        local = Path(path).expanduser()
        source = str(local if local.exists() else path)
        try:
            self.model = ClapModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32).eval()
            self.front = ClapFeatureExtractor.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise MissingData(
                f"path={path!r} can be read neither from there nor from the hub ({type(error).__name__}): download "
                "laion/clap-htsat-unfused where there is a network and name its folder, or choose "
                "evaluation=frechet_digits"
            ) from error
        if self.model.config.audio_config.enable_fusion or self.front.sampling_rate != self.rate:
            raise ValueError(f"path={path!r}: choose a CLAP without feature fusion for sounds of {self.rate} Hz")
        self.dimension = int(self.model.config.projection_dim)

    def fingerprint(self) -> str:
        return digest_of_weights(self.model)

    def network(self) -> Any:
        return self.model

    def outputs(self, network: Any, sounds_NT: np.ndarray, device: torch.device) -> Tensor:
        sounds = list(sounds_NT[:, : self.front.nb_max_samples])  # it would take a random part of longer ones
        inputs = self.front(sounds, truncation="rand_trunc", sampling_rate=self.rate, return_tensors="pt")
        return network.get_audio_features(**inputs.to(device)).pooler_output


class Vggish(SoundFeatures):
    """The 128 outputs of VGGish (Hershey et al. 2017, arXiv 1609.09430) before its last ReLU.

    The weights are `path`, else vggish-10086976.pth or vggish.safetensors in $SECATEUR_DATA, as published by
    https://github.com/harritaylor/torchvggish. The outputs of all windows of 0.96 s are averaged; shorter sounds are
    padded with silence. Raises MissingData where there are no weights.
    """

    name, rate = "fad_vggish", 16000

    def __init__(self, mel: Mel | None, path: str | None = None) -> None:
        super().__init__(mel)
        self.transform += ", the mean over windows of 0.96 s"
        paths = [data_root() / name for name in ("vggish.safetensors", "vggish-10086976.pth")]
        paths = [Path(path).expanduser()] if path else paths
        existing = [path for path in paths if path.exists()]
        if not existing:
            raise MissingData(
                f"VGGish's weights are in none of {', '.join(map(str, paths))}: download vggish-10086976.pth from "
                "https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth, or choose "
                "evaluation=frechet_digits"
            )
        self.path = existing[0]
        self.dimension = self.network().dimension

    def fingerprint(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @functools.lru_cache(maxsize=1)  # noqa: B019  kept as long as the job
    def network(self) -> "VggishNetwork":
        if self.path.suffix == ".safetensors":
            state = load_file(self.path)
        else:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        return VggishNetwork(state).eval()

    def outputs(self, network: Any, sounds_NT: np.ndarray, device: torch.device) -> Tensor:
        examples_NKTF = vggish_examples(torch.from_numpy(sounds_NT))
        embeddings = network(examples_NKTF.flatten(0, 1)[:, None].to(device))
        return embeddings.unflatten(0, examples_NKTF.shape[:2]).mean(1)


class VggishNetwork(nn.Module):
    """VGG's first four stages and three linear layers, log-mel (N,1,96,64) -> (N,128), as wide as the weights."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        try:
            for index in (0, 3, 6, 8, 11, 13):  # the convolutions; all but two are followed by pooling
                width, before = state[f"features.{index}.weight"].shape[:2]
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                if index not in (6, 11):
                    layers.append(nn.MaxPool2d(2))
            shapes = [state[f"embeddings.{index}.weight"].shape for index in (0, 2, 4)]
        except KeyError as error:
            raise ValueError(f"these are no weights of VGGish: they have no {error}") from error
        self.features = nn.Sequential(*layers)
        linears = [nn.Linear(before, width) for width, before in shapes]
        self.embeddings = nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2])
        self.dimension = shapes[-1][0]
        self.load_state_dict(state)

    def forward(self, mel_N1TF: Tensor) -> Tensor:
        features_NTFC = self.features(mel_N1TF).permute(0, 2, 3, 1)  # the order in which the weights were trained
        return self.embeddings(features_NTFC.flatten(1))


def vggish_examples(sounds_NT: Tensor) -> Tensor:
    """Return VGGish's log-mel examples (N, K, 96, 64) of 16 kHz sounds, 0.96 s each; a remainder is left out.

    Magnitudes of periodic Hann windows of 25 ms every 10 ms, in 64 bands of HTK's scale from 125 to 7500 Hz, plus 0.01
    before the logarithm.
    """
    window, hop, frames, transform = 400, 160, 96, 512  # samples, samples, windows per example, length of the FFT
    shortest = (frames - 1) * hop + window
    padded = nn.functional.pad(sounds_NT, (0, max(0, shortest - sounds_NT.shape[-1])))
    windows = padded.unfold(-1, window, hop) * torch.hann_window(window)
    bins = transform // 2 + 1
    filters = mel_filter_bank(bins, 64, 125.0, 7500.0, 16000, mel_scale="htk", triangularize_in_mel_space=True)
    bands = torch.fft.rfft(windows, transform).abs() @ torch.from_numpy(filters).float()
    count = bands.shape[1] // frames
    return torch.log(bands[:, : count * frames] + 0.01).unflatten(1, (count, frames))
