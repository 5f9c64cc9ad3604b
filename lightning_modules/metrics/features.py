"""Features of images, between whose distributions the distances are computed.

`fid` is clean-fid (Parmar et al. 2022, arXiv 2104.11222) on Inception; `frechet_resnet20` is the same distance on the
64 features of a small CIFAR-10 classifier, for machines without internet access. The two are not comparable.
"""

import functools
import hashlib
import tempfile
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from PIL import Image
from torch import Tensor

from datamodules.readers.base import MissingData, data_root
from lightning_modules.backbones.classification.image_networks import CifarResNet
from lightning_modules.backbones.classification.load import load_resnet

CPU = torch.device("cpu")


class Features(Protocol):
    """A function from images to feature vectors."""

    name: str
    """Name of the Frechet distance on these features, and key of its reference statistics in `data.statistics`."""
    dimension: int
    transform: str
    """Preprocessing of the images, in words."""

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raise ValueError where the features are not defined for images of (channels, height, width)."""
        ...

    def fingerprint(self) -> str:
        """Return a digest of the network's weights."""
        ...

    def __call__(self, images: np.ndarray, device: torch.device) -> np.ndarray:
        """Return the features (N, dimension), float64, of uint8 images (N,H,W,C)."""
        ...


class ResNet20:
    """Pooled features of the embedded CIFAR-10 classifier, for 32x32 RGB images."""

    name, dimension, transform = "frechet_resnet20", 64, "none (32x32)"
    shape: tuple[int, int, int] = (3, 32, 32)
    experiment, instead = "pretrain_resnet20", "fid"
    """The experiment that trains the weights, and the evaluation to choose for images of other shapes."""

    def __init__(self, path: str) -> None:
        self.path = path
        if not Path(path).exists():
            raise MissingData(f"path={path!r} does not exist: python train.py experiment={self.experiment} makes it")

    def check(self, shape: tuple[int, int, int]) -> None:
        if tuple(shape) != self.shape:
            raise ValueError(
                f"{self.name} takes images of {self.shape}, these are {shape}; choose evaluation={self.instead}"
            )

    def fingerprint(self) -> str:
        return hashlib.sha256(Path(self.path).read_bytes()).hexdigest()

    def network(self) -> CifarResNet:
        return load_resnet(self.path, blocks=3)

    def outputs(self, network: Any, image_NCHW: Tensor) -> Tensor:
        return network.features(image_NCHW)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, device: torch.device = CPU) -> np.ndarray:
        height, width, channels = images.shape[1:]
        self.check((channels, height, width))
        network = self.network().to(device)
        tensor_NCHW = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        outputs = [self.outputs(network, part.to(device)).cpu() for part in tensor_NCHW.split(250)]
        return torch.cat(outputs).double().numpy()


class ResNet20Classes(ResNet20):
    """Log-probabilities of CIFAR-10's classes by the embedded classifier."""

    name, dimension = "resnet20_classes", 10

    def outputs(self, network: Any, image_NCHW: Tensor) -> Tensor:
        return network(image_NCHW).log_softmax(1)


class Inception:
    """Inception-v3 features of images resized to 299x299.

    `resize` is one of clean-fid's filters: `clean` (PIL's antialiased bicubic), or `legacy_pytorch` (bilinear, as in
    pytorch-fid). The weights are `path`, else inception-2015-12-05.pt in $SECATEUR_DATA, else clean-fid's download.
    Raises MissingData naming these where there are none.
    """

    name, dimension = "fid", 2048

    def __init__(self, path: str | None = None, resize: Literal["clean", "legacy_pytorch"] = "clean") -> None:
        local = Path(path).expanduser() if path else data_root() / "inception-2015-12-05.pt"
        if path and not local.exists():
            raise MissingData(f"path={path!r} does not exist: it names the TorchScript Inception-v3 (2015-12-05)")
        self.path, self.resize = local if local.exists() else None, resize
        filters = {"clean": "PIL bicubic", "legacy_pytorch": "PyTorch bilinear, this network"}
        self.transform = f"clean-fid: {filters[resize]}, 299x299"
        if self.path is None:
            assert self.network  # the download fails now or not at all

    def check(self, shape: tuple[int, int, int]) -> None:
        if shape[0] != 3:
            raise ValueError(f"Inception takes images of 3 channels, these are {shape}; choose evaluation=none")

    def fingerprint(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest() if self.path else "clean-fid's download"

    @functools.cached_property
    def network(self) -> Any:
        """The TorchScript network, loaded once."""
        if self.path is not None:
            return torch.jit.load(self.path, map_location=CPU).eval()
        try:
            return InceptionV3W(tempfile.gettempdir(), download=True).base
        except Exception as error:
            raise MissingData(
                f"the Inception-v3 behind fid could not be downloaded ({type(error).__name__}); "
                "put inception-2015-12-05.pt into $SECATEUR_DATA, or set the `path` of the features, "
                "or choose evaluation=frechet_resnet20"
            ) from error

    def outputs(self, network: Any, image_NCHW: Tensor) -> Tensor:
        """Return the features (N, dimension) of images (N,3,299,299) with values in [0, 255]."""
        layers = getattr(network, "layers", network)  # the published file keeps the network in `layers`
        return layers((image_NCHW - 128) / 128).view(len(image_NCHW), 2048)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, device: torch.device = CPU) -> np.ndarray:
        network, resize = self.network.to(device), build_resizer(self.resize)
        outputs = []
        for start in range(0, len(images), 32):
            pixels = np.stack([resize(image) for image in images[start : start + 32]])
            tensor_NCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().to(device)
            outputs.append(self.outputs(network, tensor_NCHW).double().cpu())
        return torch.cat(outputs).numpy()


class InceptionClasses(Inception):
    """Log-probabilities of Inception's 1008 classes, without the output layer's bias.

    The Inception Score has left the bias out since its first implementation. Raises MissingData where the file has the
    features only, and not the published network with its classes.
    """

    name, dimension = "inception_classes", 1008

    def __init__(self, path: str | None = None, resize: Literal["clean", "legacy_pytorch"] = "clean") -> None:
        super().__init__(path, resize)
        if "no_output_bias" not in str(self.network.forward.schema):
            raise MissingData(
                f"{self.path} has Inception's features, but not its classes; put the published inception-2015-12-05.pt "
                "(stylegan2-ada-pytorch/pretrained/metrics on nvlabs-fi-cdn.nvidia.com) there, or set the `path` of "
                "the features to it, or leave the Inception Score out"
            )

    def outputs(self, network: Any, image_NCHW: Tensor) -> Tensor:
        return network(image_NCHW, no_output_bias=True).clamp_min(1e-16).log()


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """Return uint8 images (N,H,W,C), C of 1 or 3, resized to (N,size,size,C) by PIL's antialiased bicubic filter."""
    if images.shape[1:3] == (size, size):
        return images
    pictures = [Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image) for image in images]
    resized_N = np.stack([np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)) for picture in pictures])
    return resized_N.reshape(len(images), size, size, -1)
