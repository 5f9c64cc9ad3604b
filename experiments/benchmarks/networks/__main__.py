"""Measures how fast samples are read: pictures against stored latents, and a folder against shards and LMDB.

python -m experiments.benchmarks.networks                                        # on a CPU
python -m experiments.benchmarks.networks --device gpu --batch 256 --samples 1536

Training is that of experiment=pretrain_cifar10_t2i on the embedded sample of CIFAR-10: its U-Net, the embedded
autoencoder, and a text encoder of the shape of all-MiniLM-L6-v2 with random weights, which takes as long as the trained
one. The sources (folder, shards, LMDB) hold the same JPEGs, which are read in random order.
"""

import argparse
import csv
import importlib.util
import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizer

from conf import checks, schema
from datamodules.readers.base import Source
from datamodules.readers.folder import Folder
from datamodules.readers.lsun import Lmdb
from datamodules.readers.shards import Shards
from datamodules.seeding import numpy_rng
from experiments.benchmarks.scoring_speed.__main__ import time_in_turns
from experiments.engine.inputs import build_data
from experiments.reporting.figures import save_figure
from experiments.tools.precompute import precompute
from lightning_modules.metrics.cost import describe_machine
from lightning_modules.modules.denoiser import Denoiser
from lightning_modules.training.trainer import resolve_accelerator

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a an photo of airplane automobile bird cat deer dog frog horse ship truck"
LAYERS: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
"""shape of all-MiniLM-L6-v2 (a distilled BERT, arXiv 2002.10957)"""
CLASSES = 10
"""number of folders among which the pictures are divided"""
COLUMNS = ("part", "what", "samples", "samples_per_s", "of", "ratio")


def write_text_encoder(folder: Path) -> Path:
    """Write a tokenizer for the captions, and a BERT of the shape of LAYERS with random weights; returns the folder."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS.split()))
    BertTokenizer.from_pretrained(str(folder)).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=30_522, intermediate_size=4 * LAYERS["hidden_size"], **LAYERS)
    BertModel(config).save_pretrained(folder)
    return folder


def iterate_batches(data: Any) -> Iterator[dict[str, Any]]:
    """Return an endless iterator over training batches, so that opening files is timed once and not per round."""
    return iter(data.train_dataloader())


def time_training(cfg: DictConfig, latents: Path, batches: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds that `batches` batches take, from pictures and from stored latents.

    The keys "inputs, pictures" and "inputs, latents" are the times until the inputs of the U-Net are there; those with
    "training" are the times of whole training steps.

    Args:
        cfg: the configuration of the training, without latents.
        latents: the folder with the stored latents.
        batches: how many batches a round has.
        repeats: how many rounds are timed.
        device: the device of the networks.
    """
    optimizer, schedule = schema.build(cfg.optimizer), schema.build(cfg.lr_scheduler)
    denoiser: Denoiser = schema.build(
        cfg.pretrain, optimizer=optimizer, lr_scheduler=schedule, seed=0, dump=latents.parent
    )()
    denoiser.to(device)
    stepper = denoiser.configure_optimizers()["optimizer"]
    stored = cfg.copy()
    stored.latents = str(latents)
    loaders = {"pictures": iterate_batches(build_data(cfg)), "latents": iterate_batches(build_data(stored))}

    def make_round(name: str, train: bool) -> Callable[[], dict]:
        def run_round() -> dict:
            for _ in range(batches):
                batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in next(loaders[name]).items()}
                if not train:
                    denoiser.backbone.training_inputs(batch)
                    continue
                stepper.zero_grad()
                denoiser.losses(batch)["loss"].backward()
                stepper.step()
            return {}

        return run_round

    rounds = {
        f"{part}, {name}": make_round(name, part == "training") for part in ("inputs", "training") for name in loaders
    }
    return time_in_turns(rounds, repeats, device)[0]


def encode_jpegs(source: Source, count: int, pixels: int) -> list[bytes]:
    """Return `count` pictures of a source as JPEGs, enlarged to `pixels` x `pixels`."""
    pictures = []
    for image in source.take(np.arange(count) % len(source))["image"]:
        file = io.BytesIO()
        Image.fromarray(image).resize((pixels, pixels), Image.Resampling.BICUBIC).save(file, "jpeg", quality=95)
        pictures.append(file.getvalue())
    return pictures


def write_sources(pictures: list[bytes], folder: Path, pixels: int) -> dict[str, Source]:
    """Write the same pictures as a folder, a tar shard and, where lmdb is installed, an LMDB; return the sources."""
    for i, picture in enumerate(pictures):
        class_folder = folder / "folder" / f"{i % CLASSES}"
        class_folder.mkdir(parents=True, exist_ok=True)
        (class_folder / f"{i:06d}.jpg").write_bytes(picture)
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "00000.tar", "w") as tar:
        for i, picture in enumerate(pictures):
            member = tarfile.TarInfo(f"{i:06d}.jpg")
            member.size = len(picture)
            tar.addfile(member, io.BytesIO(picture))
    sources: dict[str, Source] = {
        "folder": Folder(str(folder / "folder"), pixels),
        "shards": Shards(str(folder / "shards"), pixels, caption=None),
    }
    if importlib.util.find_spec("lmdb"):
        import lmdb  # noqa: PLC0415  an optional extra

        size = 2**30 + 2 * sum(map(len, pictures))
        with lmdb.open(str(folder / "lmdb"), map_size=size) as environment, environment.begin(write=True) as writer:
            for i, picture in enumerate(pictures):
                writer.put(f"{i:06d}".encode(), picture)
        sources["lmdb"] = Lmdb(str(folder / "lmdb"), pixels)
    return sources


def time_reading(sources: dict[str, Source], batch: int, repeats: int) -> dict[str, float]:
    """Return the median seconds that all samples of each source take, in batches and in random order."""

    def make_round(source: Source) -> Callable[[], dict]:
        order = numpy_rng("bench").permutation(len(source))

        def run_round() -> dict:
            for start in range(0, len(order), batch):
                source.take(order[start : start + batch])
            return {}

        return run_round

    rounds = {name: make_round(source) for name, source in sources.items()}
    return time_in_turns(rounds, repeats, torch.device("cpu"))[0]


def make_rows(part: str, seconds: dict[str, float], samples: int, first: str) -> list[dict[str, Any]]:
    """Return a row per way of reading, with samples per second and its ratio to the rate of `first`."""
    return [
        {
            "part": part,
            "what": name,
            "samples": samples,
            "samples_per_s": f"{samples / time:.1f}",
            "of": first,
            "ratio": f"{seconds[first] / time:.2f}",
        }
        for name, time in seconds.items()
    ]


def draw_rates(rows: list[dict[str, Any]], path: Path) -> Path:
    """Draw a panel of bars per part of the benchmark."""
    parts = list(dict.fromkeys(row["part"] for row in rows))
    figure, axes = plt.subplots(1, len(parts), figsize=(4 * len(parts), 2.2), squeeze=False, layout="constrained")
    for axis, part in zip(axes.flat, parts, strict=True):
        panel = [row for row in rows if row["part"] == part][::-1]
        bars = axis.barh([row["what"] for row in panel], [float(row["samples_per_s"]) for row in panel])
        axis.bar_label(bars, [f"{row['ratio']}x" for row in panel], padding=3)
        axis.margins(x=0.2)
        axis.set_title(part, fontsize=10)
        axis.set_xlabel("samples a second")
    return save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.networks", description=__doc__)
    parser.add_argument("--samples", type=int, default=256, help="per round, rounded down to whole batches")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="rounds, in which all ways of reading take turns")
    parser.add_argument("--pixels", type=int, default=256, help="edge of the JPEGs on which sources are compared")
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    if options.samples < options.batch:
        parser.error(f"--samples {options.samples} is less than --batch {options.batch}")
    batches = options.samples // options.batch
    device = torch.device(resolve_accelerator(options.device))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SECATEUR_DATA"] = name  # the folder where indices of shards are kept
        schema.register()
        with initialize_config_module("conf", version_base="1.3"):
            cfg = compose(
                "train",
                [
                    *("experiment=pretrain_cifar10_t2i", "data=cifar10_captions", f"data.batch_size={options.batch}"),
                    *(f"data.train.stop={options.samples}", f"+data.holdout.stop={1792 + options.batch}"),
                    *(f"pretrain.text_encoder={write_text_encoder(folder / 'text')}", f"trainer={options.device}"),
                    *("precompute.dtype=float16", f"precompute.batch_size={options.batch}"),
                ],
            )
        checks.check_config(cfg)
        to_store = cfg.copy()
        to_store.latents = str(folder / "latents")
        start = perf_counter()
        precompute(to_store)
        precompute_seconds = perf_counter() - start
        seconds = time_training(cfg, folder / "latents", batches, options.repeats, device)
        rows = []
        for part in ("inputs", "training"):
            times = {key.split(", ")[1]: value for key, value in seconds.items() if key.startswith(part)}
            rows += make_rows(part, times, batches * options.batch, "pictures")
        pictures = encode_jpegs(build_data(cfg).source("train"), options.samples, options.pixels)
        times = time_reading(write_sources(pictures, folder, options.pixels), options.batch, options.repeats)
        rows += make_rows(f"sources, JPEGs of {options.pixels} pixels", times, options.samples, "folder")

    machine = describe_machine(device)
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, "machine"))
        writer.writeheader()
        writer.writerows(row | {"machine": machine} for row in rows)
    draw_rates(rows, options.out / "bench.png")
    for row in rows:
        print(f"{row['part']:<32}{row['what']:<12}{row['samples_per_s']:>10} samples/s  {row['ratio']:>6}x {row['of']}")
    samples = options.samples + options.batch
    print(f"precomputation of {samples} samples, mirrored ones too: {precompute_seconds:.1f} s ({machine})")


if __name__ == "__main__":
    main()
