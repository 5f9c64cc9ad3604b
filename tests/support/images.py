"""Random pictures, and files of them."""

import gzip
from pathlib import Path

import numpy as np


def pictures(count: int, size: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_idx(file: Path, array: np.ndarray, compress: bool = False) -> None:
    codes = {"uint8": 0x08, "int32": 0x0C, "float32": 0x0D}
    header = bytes([0, 0, codes[str(array.dtype)], array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.astype(array.dtype.newbyteorder(">")).tobytes()
    file.write_bytes(gzip.compress(content) if compress else content)


def write_mnist(folder: Path) -> None:
    """Six training and four test pictures of 28x28 in IDX files, of three classes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 6), ("t10k", 4)):
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", pictures(count, 28)[..., 0], compress=True)
        write_idx(folder / f"{name}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 3)
