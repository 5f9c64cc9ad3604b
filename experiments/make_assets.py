"""Make the embedded samples and their reference statistics: python -m experiments.make_assets [cifar10 | digits]

Reads the whole of CIFAR-10 as data=cifar10 does, and all spoken digits as data=spoken_digits does; and assets/resnet20/
and assets/digits_classifier/. The networks themselves are made by `python train.py experiment=pretrain_cifar10`,
`experiment=pretrain_resnet20` and `experiment=pretrain_digits_classifier`.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_module
from PIL import Image

from conf import schema
from datamodules.seeding import numpy_rng
from datamodules.sources import Record, Source
from lightning_modules.metrics.audio import Digits
from lightning_modules.metrics.frechet import CPU, Features, ResNet20, Statistics
from lightning_modules.metrics.measures import origin

ASSETS = schema.ROOT / "assets"


def data_of(name: str) -> Any:
    """The datamodule of conf/data/<name>.yaml."""
    with initialize_config_module("conf", version_base="1.3"):
        return schema.build(compose("train", [f"data={name}"]).data)


def drawn(source: Source, count: int, *seed: str) -> Record:
    """`count` random samples of a source."""
    return source.take(numpy_rng(*seed).permutation(len(source))[:count])


def write_tiles(path: Path, tiles: np.ndarray, labels: np.ndarray, columns: int) -> None:
    """One lossless picture of square tiles, `columns` a row, and their labels beside it, as `Tiles` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, size, _, channels = tiles.shape
    rows = tiles.reshape(count // columns, columns, size, size, channels).swapaxes(1, 2)
    sheet = rows.reshape(-1, columns * size, channels)
    Image.fromarray(sheet.squeeze(2) if channels == 1 else sheet).save(path, lossless=True, quality=100, method=6)
    path.with_suffix(".labels.txt").write_text("".join(map(str, labels)) + "\n")


def write_statistics(folder: Path, source: Source, features: Features) -> None:
    images = source.take(np.arange(len(source)))["image"]
    statistics = Statistics.of(features(images, CPU), features.name)
    statistics.save(folder / f"{features.name}.safetensors", **origin(features))
    print(f"{folder}: statistics of {statistics.count}")


def cifar10() -> None:
    """2,048 images of the training set, statistics of all of it."""
    source, folder = data_of("cifar10").source("train"), ASSETS / "cifar10_sample"
    sample = drawn(source, 2048, "cifar10_sample")
    write_tiles(folder / "images.webp", sample["image"], sample["label"], columns=64)
    write_statistics(folder, source, ResNet20(str(ASSETS / "resnet20/model.safetensors")))


def digits() -> None:
    """1,024 training recordings and then 256 held-out ones, statistics of all training recordings."""
    data, folder = data_of("spoken_digits"), ASSETS / "digits_sample"
    parts = [drawn(data.source("train"), 1024, "digits_sample"), drawn(data.source("holdout"), 256, "digits_sample")]
    tiles, labels = (np.concatenate([part[key] for part in parts]) for key in ("image", "label"))
    write_tiles(folder / "mels.webp", tiles, labels, columns=32)
    write_statistics(folder, data.source("train"), Digits(str(ASSETS / "digits_classifier/model.safetensors")))


def main() -> None:
    parts = {"cifar10": cifar10, "digits": digits}
    parser = argparse.ArgumentParser(prog="python -m experiments.make_assets", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=list(parts), default=list(parts))
    schema.register()
    for name in parser.parse_args().parts:
        parts[name]()


if __name__ == "__main__":
    main()
