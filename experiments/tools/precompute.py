"""Encode a data set once: python -m experiments.precompute teacher=sd15 data=captioned_folder latents=/latents ...

With the arguments of the job that is to use it. What is written is the posterior's mean and standard deviation of every
picture (of its mirrored twin, too, with data.flip=true) and the text states of every distinct caption; training then
runs neither VAE nor text encoder. Several processes may share the work: each takes shards that nobody has. A call that
was stopped goes on where it was.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from filelock import FileLock, Timeout
from omegaconf import DictConfig
from safetensors.torch import save_file
from tqdm import tqdm

from conf import schema
from conf.schema import ConfigError, build
from datamodules.bad_samples import LEAST, Skipped
from datamodules.images import ImageSet
from datamodules.latents import FLIPPED, POSTERIOR
from datamodules.readers.base import BadSample, MissingData
from experiments.engine.artefacts import digest, read_json, write_json
from experiments.engine.identity import effective
from experiments.engine.inputs import teacher_of
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.backbones.diffusion.pipeline_parts import Surroundings
from lightning_modules.backbones.diffusion.text_states import store_texts
from lightning_modules.metrics.published import digest_of_weights
from lightning_modules.training.trainer import accelerator_of

SPLITS = ("train", "holdout")
VERSION = 1
NO_PART = ("name", "license", "batch_size", "seed", "num_workers", "max_bad_fraction", "flip", "crop", "statistics")
"""Keys of a data set's configuration that do not change what is stored."""


def backbone_of(cfg: DictConfig) -> Any:
    """Return the teacher, or the network that a recipe trains from nothing: what matters is its pipeline."""
    if cfg.pretrain is None:
        teacher = teacher_of(cfg)
        if not teacher.generates:
            raise ConfigError(f"teacher={cfg.teacher.get('name', '?')} has no latents; choose a diffusion model")
        return teacher
    module = build(cfg.pretrain, optimizer=None, lr_scheduler=None, seed=cfg.seed, dump=None)()
    if not hasattr(module, "backbone"):
        raise ConfigError(f"latents={cfg.latents}: a {type(module).__name__} is not trained on latents; choose null")
    return module.backbone


def content_of(data: Any) -> str:
    """sha256 over the number of samples of each split, and the pictures, labels and captions of 64 of them."""
    total = hashlib.sha256()
    for split in SPLITS:
        count = len(data.source(split))
        record = data.take(split, np.linspace(0, count - 1, min(count, 64)).astype(int))
        total.update(f"{split} {count} {record.get('caption')}".encode("utf-8", "surrogatepass"))
        for name in ("image", "label"):
            total.update(record[name].tobytes())
    return total.hexdigest()


def provenance(cfg: DictConfig, backbone: DiffusionBackbone, content: str) -> dict[str, str]:
    """What stored latents are of: hashes of the VAE, of text encoders and vocabularies, of the data's configuration and
    of their content."""
    surroundings = backbone.surroundings
    if surroundings is None or not surroundings.encodes:
        raise ValueError("latents=... is for models with a VAE; this one works on images. Leave it out")
    data = {key: value for key, value in effective(cfg)["data"].items() if key not in NO_PART}
    encoders = [module for module in surroundings.modules() if module is not surroundings.vae]
    return {
        "vae": digest_of_weights(surroundings.vae),
        "text": digest([digest_of_weights(*encoders), surroundings.vocabularies()]),
        "data": digest(data),
        "content": content,
        "version": str(VERSION),
    }


def check_latents(cfg: DictConfig, data: Any, backbone: Any) -> None:
    """Raise ValueError where stored latents belong to another VAE, text encoder or data set than this job's.

    Where the pictures themselves are not on this machine any more, their content is not compared.
    """
    manifest = getattr(data, "manifest", None)
    if manifest is None:
        return
    try:
        content = content_of(data)
    except MissingData:
        content = manifest["content"]
    names = {
        "vae": "another VAE",
        "text": "another text encoder",
        "data": "another data set or other fields of it",
        "content": "other samples",
    }
    for key, wanted in provenance(cfg, backbone, content).items():
        stored = manifest["text_encoder" if key == "text" else key]
        if stored != wanted:
            raise ValueError(
                f"latents={cfg.latents} was made with {names.get(key, 'another version')}: its {key} is "
                f"{stored[:16]}, this job's {wanted[:16]}; precompute into another folder"
            )


def precompute(cfg: DictConfig) -> Path:
    """Write what is not there yet of `cfg.latents`; returns the folder."""
    return Precomputation(cfg).go()


class Precomputation:
    """A folder in the making. started.json says what it is to hold, manifest.json comes last."""

    def __init__(self, cfg: DictConfig) -> None:
        self.folder, cfg = Path(cfg.latents).expanduser(), cfg.copy()
        cfg.latents = None
        self.options, self.data = cfg.precompute, build(cfg.data)
        self.device = torch.device(accelerator_of(cfg.trainer.accelerator))
        self.backbone = backbone_of(cfg)
        self.origin = provenance(cfg, self.backbone, content_of(self.data))
        found, wanted = self.data.image_shape(), self.backbone.image_shape()
        if found != wanted:
            raise ValueError(f"data has images of (channels, height, width) {found}, the VAE belongs to {wanted}")
        self.flips = bool(self.data.flip)
        self.texts: dict[str, int] = {}
        self.about = {
            **self.origin,
            "flips": self.flips,
            "crop": "centre",
            "image_shape": list(found),
            "dtype": self.options.dtype,
            "samples_per_shard": self.options.samples_per_shard,
        }

    @property
    def surroundings(self) -> Surroundings:
        assert self.backbone.surroundings is not None
        return self.backbone.surroundings

    def go(self) -> Path:
        """Text states first, then the shards that nobody has, then the manifest if all are there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        started = self.folder / "started.json"
        if started.exists() and read_json(started) != self.about:
            raise ValueError(
                f"{self.folder} was begun with another VAE, text encoder, data set, type or size of shards; choose "
                "another folder, or delete it"
            )
        write_json(started, self.about)
        if self.backbone.takes_text:
            captions = [text for split in SPLITS for text in captions_of(self.data, split)]
            dtype, size = getattr(torch, self.options.dtype), self.options.batch_size
            with FileLock(self.folder / ".text.lock"):
                self.texts = store_texts(self.surroundings, captions, self.folder, size, dtype, self.device)
        splits = {split: self.split(split) for split in SPLITS}
        if any(shard is None for shards in splits.values() for shard in shards):
            print(f"{self.folder}: the other shards are being made by other processes")
            return self.folder
        for split, shards in splits.items():
            assert sum(shard["rows"] + shard["skipped"] for shard in shards if shard) == len(self.data.source(split))
        content = {
            **self.about,
            "text": bool(self.texts),
            "text_encoder": self.origin["text"],
            "splits": {split: {"shards": shards} for split, shards in splits.items()},
        }
        write_json(self.folder / "manifest.json", {"id": digest(content), **content})
        counts = (f"{sum(shard['rows'] for shard in shards if shard)} of {split}" for split, shards in splits.items())
        print(f"{self.folder}: {', '.join(counts)}")
        return self.folder

    def split(self, split: str) -> list[dict[str, Any] | None]:
        """Encode the shards of a split that nobody has; returns their notes, None where another process is at it."""
        found: list[dict[str, Any] | None] = []
        total, size = len(self.data.source(split)), self.options.samples_per_shard
        skipped = Skipped(f"data.{split}", self.data.max_bad_fraction, max(total, LEAST))
        for start in range(0, total, size):
            note = self.folder / f"{split}-{start // size:05d}.json"
            if not note.exists():
                try:
                    with FileLock(self.folder / f".{note.stem}.lock", timeout=0):
                        if not note.exists():
                            self.shard(split, np.arange(start, min(start + size, total)), note, skipped)
                except Timeout:
                    found.append(None)
                    continue
            found.append(read_json(note))
        skipped.report()
        return found

    def shard(self, split: str, indices: np.ndarray, note: Path, skipped: Skipped) -> None:
        """Write one shard, then the note that says that it is whole; bad samples are left out and named in the note."""
        reader, parts = ImageSet(self.data.source(split)), []
        size, before = self.options.batch_size, skipped.count
        flips = self.flips and split == "train"  # what is held out is never mirrored
        for at in tqdm(range(0, len(indices), size), desc=f"{note.stem:<20}", dynamic_ncols=True):
            some = indices[at : at + size]
            batch = reader.record(some.tolist(), some)
            skipped.add(batch)
            good = np.flatnonzero(batch["index"] == some)  # the others are replacements of bad ones
            kept = {key: rows_of(value, good) for key, value in batch.items() if key != "skipped"}
            parts.append(self.encoded(kept, flips))
        dtype = getattr(torch, self.options.dtype)
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        path = note.with_suffix(".safetensors")
        partial = path.with_name(f".{path.name}")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        partial.chmod(0o644)  # safetensors makes files that only their owner can read
        partial.replace(path)
        write_json(note, {"file": path.name, "rows": len(tensors["index"]), "skipped": skipped.count - before})

    def encoded(self, batch: dict[str, Any], flips: bool) -> dict[str, torch.Tensor]:
        """The tensors of a shard for some samples."""
        image = batch["image"].to(self.device)
        found: dict[str, torch.Tensor] = {}
        for prefix, pictures in (("", image), (FLIPPED, image.flip(-1))) if flips else (("", image),):
            for name, value in zip(POSTERIOR, self.surroundings.posterior(pictures), strict=True):
                found[prefix + name] = value.cpu()
        for name, value in batch.items():
            if isinstance(value, np.ndarray):
                found[name] = torch.from_numpy(value)
        if self.texts:
            found["caption"] = torch.tensor([self.texts[caption] for caption in batch["caption"]])
        return found


def captions_of(data: Any, split: str) -> Iterator[str]:
    """The captions of a split, but for those that cannot be read."""
    captions = data.source(split).captions
    if captions is None:
        raise ValueError("the model takes text, but the data have no captions; choose data with captions")
    for index in range(len(captions)):
        with contextlib.suppress(BadSample):
            yield captions[index]


def rows_of(value: Any, good: np.ndarray) -> Any:
    """Some rows of a tensor, an array or a list."""
    return [value[row] for row in good] if isinstance(value, list) else value[good]


@hydra.main(version_base="1.3", config_path="../../conf", config_name="train")
def main(cfg: DictConfig) -> None:
    schema.check(cfg)
    if cfg.latents is None:
        raise schema.ConfigError("latents=null: name the folder that is to hold the latents")
    precompute(cfg)


def run() -> None:
    """Compose the configuration from the command line, and precompute."""
    schema.register()
    main()


if __name__ == "__main__":
    run()
