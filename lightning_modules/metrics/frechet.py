"""Frechet distances between sets of images, each named after the features it is taken on.

`fid` is clean-fid (Parmar et al. 2022, arXiv 2104.11222) on Inception; `frechet_resnet20` is the same distance on the
64 features of a small CIFAR-10 classifier, for machines without a network: the two are not comparable.
"""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from cleanfid.features import build_feature_extractor
from cleanfid.fid import frechet_distance
from cleanfid.resize import build_resizer
from safetensors import safe_open
from safetensors.numpy import save_file

from datamodules.sources import MissingData, data_root
from lightning_modules.backbones.resnet_cifar import load_resnet

CPU = torch.device("cpu")


class Features(Protocol):
    """Turns images into the vectors between whose distributions the distance is taken."""

    name: str
    """of the distance, as it stands in metrics.json"""
    dimension: int
    transform: str
    """what is done to an image before the network sees it"""

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raise ValueError where images of (channels, height, width) are none these features are made for."""
        ...

    def fingerprint(self) -> str:
        """Of the network's weights."""
        ...

    def __call__(self, images: np.ndarray, device: torch.device) -> np.ndarray:
        """uint8 (N,H,W,C) -> float64 (N, dimension)."""
        ...


class ResNet20:
    """Pooled features of the embedded CIFAR-10 classifier; images have to be 32x32 RGB."""

    name, dimension, transform = "frechet_resnet20", 64, "none (32x32)"

    def __init__(self, path: str) -> None:
        self.path = path
        if not Path(path).exists():
            raise MissingData(
                f"evaluation.metric.path={path!r} does not exist: python train.py experiment=pretrain_resnet20 makes it"
            )

    def check(self, shape: tuple[int, int, int]) -> None:
        if tuple(shape) != (3, 32, 32):
            raise ValueError(f"frechet_resnet20 takes images of (3, 32, 32), these are {shape}; choose evaluation=fid")

    def fingerprint(self) -> str:
        return hashlib.sha256(Path(self.path).read_bytes()).hexdigest()

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, device: torch.device = CPU) -> np.ndarray:
        height, width, channels = images.shape[1:]
        self.check((channels, height, width))
        network = load_resnet(self.path, blocks=3).to(device)
        tensor_NCHW = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        return torch.cat([network.features(part.to(device)).cpu() for part in tensor_NCHW.split(250)]).double().numpy()


class Inception:
    """Clean-fid's Inception-v3 features, after its antialiased bicubic resize to 299x299.

    Weights: `path`, else inception-2015-12-05.pt in $SECATEUR_DATA, else what clean-fid downloads by itself.
    Raises MissingData naming these where none is to be had.
    """

    name, dimension, transform = "fid", 2048, "clean-fid: PIL bicubic, 299x299"

    def __init__(self, path: str | None = None) -> None:
        local = Path(path).expanduser() if path else data_root() / "inception-2015-12-05.pt"
        if path and not local.exists():
            raise MissingData(
                f"evaluation.metric.path={path!r} does not exist: it names the TorchScript Inception-v3 (2015-12-05)"
            )
        self.path = local if local.exists() else None
        if self.path is None:
            self.network(CPU)  # the download fails now or not at all

    def check(self, shape: tuple[int, int, int]) -> None:
        if shape[0] != 3:
            raise ValueError(f"fid takes images of 3 channels, these are {shape}; choose evaluation=none")

    def fingerprint(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest() if self.path else "clean-fid's download"

    def network(self, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
        """(N,3,299,299) in 0..255 -> (N,2048)."""
        if self.path is None:
            try:
                return build_feature_extractor("clean", device, use_dataparallel=False)
            except Exception as error:
                raise MissingData(
                    f"the Inception-v3 behind fid could not be downloaded ({type(error).__name__}); "
                    "put inception-2015-12-05.pt into $SECATEUR_DATA, or set evaluation.metric.path, "
                    "or choose evaluation=frechet_resnet20"
                ) from error
        net = torch.jit.load(self.path, map_location=device).eval()
        layers = getattr(net, "layers", net)  # clean-fid's own copy keeps the network in `layers`
        return lambda x: layers((x - 128) / 128).view(len(x), 2048)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, device: torch.device = CPU) -> np.ndarray:
        network, resize = self.network(device), build_resizer("clean")
        found = []
        for start in range(0, len(images), 32):
            resized = np.stack([resize(image) for image in images[start : start + 32]])
            found.append(network(torch.from_numpy(resized).permute(0, 3, 1, 2).float().to(device)).double().cpu())
        return torch.cat(found).numpy()


@dataclass
class Statistics:
    """Mean (D,) and covariance (D,D) of features over `count` images."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int

    @classmethod
    def of(cls, features_ND: np.ndarray, name: str = "these images") -> "Statistics":
        """Warns where there are no more images than dimensions: the covariance is then singular."""
        count, dimension = features_ND.shape
        if count <= dimension:
            warnings.warn(
                f"{count} images are too few for the covariance of {dimension} features ({name}): "
                "compare the distance only with others of the same protocol",
                stacklevel=2,
            )
        return cls(features_ND.mean(0), np.cov(features_ND, rowvar=False), count)

    def save(self, path: Path, **origin: str) -> None:
        tensors = {"mean": self.mean, "covariance": np.ascontiguousarray(self.covariance)}
        save_file(tensors, path, metadata={"count": str(self.count), **origin})

    @classmethod
    def load(cls, path: str | Path, **origin: str) -> "Statistics":
        """Raises ValueError where the file was made by other features than `origin` says."""
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
            for key, value in origin.items():
                if metadata.get(key) != value:
                    raise ValueError(
                        f"{path} was made with {key}={metadata.get(key)}, this run has {value}; make it again"
                    )
            return cls(file.get_tensor("mean"), file.get_tensor("covariance"), int(metadata["count"]))

    def distance(self, other: "Statistics") -> float:
        """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
        with warnings.catch_warnings():  # clean-fid calls scipy's sqrtm as it was before 1.18
            warnings.simplefilter("ignore", DeprecationWarning)
            return float(frechet_distance(self.mean, self.covariance, other.mean, other.covariance))
