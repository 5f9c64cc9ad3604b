"""Mean and covariance of features, and the Frechet distance between two of them."""

import hashlib
import inspect
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg
from cleanfid.fid import frechet_distance
from safetensors import safe_open
from safetensors.numpy import save_file

from datamodules.readers.base import MissingData


@dataclass
class Statistics:
    """Mean (D,) and covariance (D,D) of features over `count` images (None where a file does not say)."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None

    @classmethod
    def of(cls, features_ND: np.ndarray, name: str = "these images") -> "Statistics":
        """Return the statistics of features; warns where the covariance is singular for lack of images."""
        count, dimension = features_ND.shape
        warn_of_few(count, dimension, name)
        return cls(features_ND.mean(0), np.cov(features_ND, rowvar=False), count)

    @classmethod
    def of_parts(cls, parts_ND: Iterable[np.ndarray], name: str) -> "Statistics":
        """Return the statistics of features that come in parts and are never all in memory."""
        count, mean, scatter = 0, np.zeros(()), np.zeros(())
        for part in parts_ND:  # Chan, Golub and LeVeque 1983, equation 2.1
            total, shift = count + len(part), part.mean(0) - mean
            centred = part - part.mean(0)
            scatter = scatter + centred.T @ centred + np.outer(shift, shift) * (count * len(part) / total)
            mean, count = mean + shift * (len(part) / total), total
        warn_of_few(count, mean.size, name)
        return cls(mean, scatter / (count - 1), count)

    def save(self, path: Path, **origin: str) -> None:
        tensors = {"mean": self.mean, "covariance": np.ascontiguousarray(self.covariance)}
        save_file(tensors, path, metadata={"count": str(self.count), **origin})

    @classmethod
    def load(cls, path: str | Path, **origin: str) -> "Statistics":
        """Read statistics; raises ValueError where the file was made with other features than those of `origin`.

        An .npz with `mu` and `sigma`, as pytorch-fid and clean-fid write it, does not say with which.
        """
        if Path(path).suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return cls(arrays["mu"], arrays["sigma"], None)
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
            for key, value in origin.items():
                if metadata.get(key) != value:
                    raise ValueError(
                        f"{path} was made with {key}={metadata.get(key)}, this run has {value}; make it again"
                    )
            return cls(file.get_tensor("mean"), file.get_tensor("covariance"), int(metadata["count"]))

    def digest(self) -> str:
        """Return the sha256 of mean and covariance."""
        return hashlib.sha256(self.mean.tobytes() + np.ascontiguousarray(self.covariance).tobytes()).hexdigest()

    def distance(self, other: "Statistics") -> float:
        """Return the Frechet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
        with warnings.catch_warnings():  # clean-fid calls scipy's sqrtm as it was before 1.18
            warnings.simplefilter("ignore", DeprecationWarning)
            return float(frechet_distance(self.mean, self.covariance, other.mean, other.covariance))


def check_scipy() -> None:
    """Raise MissingData where the installed scipy is newer than clean-fid allows.

    pip does not choose such a version for this project, but an environment may bring it along.
    """
    if "disp" not in inspect.signature(scipy.linalg.sqrtm).parameters:
        raise MissingData(
            f"scipy {scipy.__version__} no longer has sqrtm(disp=...), which clean-fid calls: pip install 'scipy<1.18'"
        )


def warn_of_few(count: int, dimension: int, name: str) -> None:
    """Warn where there are no more images than dimensions, since the covariance is then singular."""
    if count <= dimension:
        warnings.warn(
            f"{count} images are too few for the covariance of {dimension} features ({name}): "
            "compare the distance only with others of the same protocol",
            stacklevel=3,
        )
