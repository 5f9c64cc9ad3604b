"""Make the embedded sample of CIFAR-10 and its reference statistics: python -m experiments.make_assets

Reads the whole of CIFAR-10 as data=cifar10 does, and assets/resnet20/. The networks themselves are made by
`python train.py experiment=pretrain_cifar10` and `experiment=pretrain_resnet20`.
"""

import numpy as np
from hydra import compose, initialize_config_module
from PIL import Image

from conf import schema
from datamodules.seeding import numpy_rng
from lightning_modules.metrics.frechet import ResNet20, Statistics

SAMPLE, COLUMNS = 2048, 64


def main() -> None:
    schema.register()
    with initialize_config_module("conf", version_base="1.3"):
        data = schema.build(compose("train", ["data=cifar10"]).data)
    source, folder = data.source("train"), schema.ROOT / "assets" / "cifar10_sample"
    folder.mkdir(parents=True, exist_ok=True)

    chosen = numpy_rng("cifar10_sample").permutation(len(source))[:SAMPLE]
    chosen_record = source.take(chosen)
    tiles, labels = chosen_record["image"], chosen_record["label"]
    sheet = tiles.reshape(SAMPLE // COLUMNS, COLUMNS, 32, 32, 3).swapaxes(1, 2).reshape(-1, COLUMNS * 32, 3)
    Image.fromarray(sheet).save(folder / "images.webp", lossless=True, quality=100, method=6)
    (folder / "images.labels.txt").write_text("".join(map(str, labels)) + "\n")

    features = ResNet20(str(schema.ROOT / "assets/resnet20/model.safetensors"))
    images = source.take(np.arange(len(source)))["image"]
    statistics = Statistics.of(features(images), features.name)
    statistics.save(
        folder / "frechet_resnet20.safetensors", features=features.fingerprint(), transform=features.transform
    )
    print(f"{folder}: {SAMPLE} images, statistics of {statistics.count}")


if __name__ == "__main__":
    main()
