"""Makes the embedded samples and their statistics: python -m experiments.tools.make_assets [cifar10 | digits | stories]

It reads CIFAR-10 as data=cifar10 does, the spoken digits as data=spoken_digits does, and the classifiers in
assets/resnet20/ and assets/digits_classifier/; teacher=stories15m writes the stories. The embedded networks themselves
are trained by `python train.py` with experiment=pretrain_cifar10, pretrain_resnet20 or pretrain_digits_classifier.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module
from PIL import Image
from tqdm import tqdm

from conf import schema
from datamodules.readers.base import Record, Source
from datamodules.seeding import derive, numpy_rng
from lightning_modules.metrics.features import CPU, Features, ResNet20
from lightning_modules.metrics.protocol import origin
from lightning_modules.metrics.sounds import Digits
from lightning_modules.metrics.statistics import Statistics

log = logging.getLogger(__name__)

ASSETS = schema.ROOT / "assets"


def build_data(name: str) -> Any:
    """Return the data module of conf/data/<name>.yaml."""
    with initialize_config_module("conf", version_base="1.3"):
        return schema.build(compose("train", [f"data={name}"]).data)


def draw_samples(source: Source, count: int, *seed: str) -> Record:
    """Return `count` random samples of a source."""
    return source.take(numpy_rng(*seed).permutation(len(source))[:count])


def write_tiles(path: Path, tiles: np.ndarray, labels: np.ndarray, columns: int) -> None:
    """Write a lossless picture of square tiles and a text file of their labels, as `Tiles` reads them.

    Args:
        path: of the picture; the labels lie beside it.
        tiles: (N,S,S,C) uint8 images.
        labels: (N,) digits.
        columns: tiles per row of the picture; N is a multiple of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    count, size, _, channels = tiles.shape
    rows = tiles.reshape(count // columns, columns, size, size, channels).swapaxes(1, 2)
    sheet = rows.reshape(-1, columns * size, channels)
    Image.fromarray(sheet.squeeze(2) if channels == 1 else sheet).save(path, lossless=True, quality=100, method=6)
    path.with_suffix(".labels.txt").write_text("".join(map(str, labels)) + "\n")


def write_statistics(folder: Path, source: Source, features: Features) -> None:
    """Write the statistics of the features of all images of a source into a folder."""
    images = source.take(np.arange(len(source)))["image"]
    statistics = Statistics.of(features(images, CPU), features.name)
    statistics.save(folder / f"{features.name}.safetensors", **origin(features))
    log.info("%s: statistics of %d images", folder, statistics.count)


def make_cifar10() -> None:
    """Write 2,048 images of the training set, and the statistics of the whole set."""
    source, folder = build_data("cifar10").source("train"), ASSETS / "cifar10_sample"
    sample = draw_samples(source, 2048, "cifar10_sample")
    write_tiles(folder / "images.webp", sample["image"], sample["label"], columns=64)
    write_statistics(folder, source, ResNet20(str(ASSETS / "resnet20/model.safetensors")))


def make_digits() -> None:
    """Write 1,024 training recordings followed by 256 held-out ones, and the statistics of all training recordings."""
    data, folder = build_data("spoken_digits"), ASSETS / "digits_sample"
    counts = {"train": 1024, "holdout": 256}
    parts = [draw_samples(data.source(split), count, "digits_sample") for split, count in counts.items()]
    tiles, labels = (np.concatenate([part[key] for part in parts]) for key in ("image", "label"))
    write_tiles(folder / "mels.webp", tiles, labels, columns=32)
    write_statistics(folder, data.source("train"), Digits(str(ASSETS / "digits_classifier/model.safetensors")))


def make_stories() -> None:
    """Write 512 training stories and 128 held-out ones, sampled from stories15m, which was trained on such stories."""
    with initialize_config_module("conf", version_base="1.3"):
        teacher = schema.build(compose("train", ["teacher=stories15m"]).teacher)
    tokenizer, count, batch, texts = teacher.tokenizer, 640, 64, []
    for number in tqdm(range(count // batch), desc="stories"):
        torch.manual_seed(derive("stories", number))
        begin = torch.full((batch, 1), tokenizer.bos_token_id)
        # llama2.c marks the end of a story by the token that begins the next one.
        ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": 255, "eos_token_id": ends, "pad_token_id": ends[1]}
        stories = teacher.network.generate(begin, attention_mask=torch.ones_like(begin), **options)
        texts += [" ".join(tokenizer.decode(ids, skip_special_tokens=True).split()) for ids in stories]
    folder = ASSETS / "stories"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text("\n\n".join(texts[:512]) + "\n")
    (folder / "holdout.txt").write_text("\n\n".join(texts[512:]) + "\n")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parts = {"cifar10": make_cifar10, "digits": make_digits, "stories": make_stories}
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tools.make_assets", description=__doc__.splitlines()[0]
    )
    parser.add_argument("parts", nargs="*", choices=list(parts), default=list(parts))
    schema.register()
    for name in parser.parse_args().parts:
        parts[name]()


if __name__ == "__main__":
    main()
