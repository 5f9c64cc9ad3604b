"""Make the embedded samples and their statistics: python -m experiments.tools.make_assets [cifar10 | digits | stories]

Reads the whole of CIFAR-10 as data=cifar10 does, and all spoken digits as data=spoken_digits does; and assets/resnet20/
and assets/digits_classifier/. Stories are written by teacher=stories15m. The networks themselves are made by
`python train.py experiment=pretrain_cifar10`, `experiment=pretrain_resnet20`, `experiment=pretrain_digits_classifier`.
"""

import argparse
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


def stories() -> None:
    """512 stories to train on and 128 others, drawn from the distribution of stories15m: what it knows best."""
    with initialize_config_module("conf", version_base="1.3"):
        teacher = schema.build(compose("train", ["teacher=stories15m"]).teacher)
    tokenizer, count, batch, texts = teacher.tokenizer, 640, 64, []
    for number in tqdm(range(count // batch), desc="stories"):
        torch.manual_seed(derive("stories", number))
        begin = torch.full((batch, 1), tokenizer.bos_token_id)
        # llama2.c's stories end where the next one begins.
        ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": 255, "eos_token_id": ends, "pad_token_id": ends[1]}
        made = teacher.network.generate(begin, attention_mask=torch.ones_like(begin), **options)
        texts += [" ".join(tokenizer.decode(ids, skip_special_tokens=True).split()) for ids in made]
    folder = ASSETS / "stories"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text("\n\n".join(texts[:512]) + "\n")
    (folder / "holdout.txt").write_text("\n\n".join(texts[512:]) + "\n")


def main() -> None:
    parts = {"cifar10": cifar10, "digits": digits, "stories": stories}
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tools.make_assets", description=__doc__.splitlines()[0]
    )
    parser.add_argument("parts", nargs="*", choices=list(parts), default=list(parts))
    schema.register()
    for name in parser.parse_args().parts:
        parts[name]()


if __name__ == "__main__":
    main()
