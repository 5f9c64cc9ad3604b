"""Encodes a data set once: python -m experiments.precompute teacher=sd15 data=captioned_folder latents=/latents ...

The arguments are those of the job that is to use the latents. For every picture, and with data.flip=true for its mirror
image, the mean and the standard deviation of the VAE's posterior are stored, and for every distinct caption its text
states, so that training runs neither VAE nor text encoder. With precompute.teacher_draws the teacher's outputs are
stored as well, see teacher_outputs.py. Several processes may share the work: each encodes shards
that no other process works on. A call that was stopped continues where it was.
"""

import contextlib
import functools
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from filelock import FileLock
from omegaconf import DictConfig
from tqdm import tqdm

from conf import checks, schema, search_path
from conf.schema import ConfigError, build
from datamodules.bad_samples import MIN_COUNTED, BadSampleCounter
from datamodules.base import DataModule
from datamodules.images import ImageSet
from datamodules.latents import FLIPPED, POSTERIOR, write_shard
from datamodules.readers.base import BadSample, MissingData
from experiments.engine.artefacts import digest, write_json
from experiments.engine.identity import get_effective_settings
from experiments.engine.inputs import build_teacher
from experiments.tools.shard_files import begin, write_missing
from experiments.tools.teacher_outputs import store_outputs
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.backbones.diffusion.pipeline_parts import PipelineParts
from lightning_modules.backbones.diffusion.text_states import store_texts
from lightning_modules.metrics.published import digest_of_weights
from lightning_modules.training.trainer import resolve_accelerator

log = logging.getLogger(__name__)

SPLITS = ("train", "holdout")
VERSION = 1
"""Goes up when stored latents have another content or form."""
NO_EFFECT = (
    "name",
    "license",
    "batch_size",
    "seed",
    "num_workers",
    "max_bad_fraction",
    "flip",
    "crop",
    "statistics",
)
"""Fields of a data set's configuration that do not change what is stored."""
DIFFERENCES = {
    "version": "another version",
    "vae": "another VAE",
    "text": "another text encoder",
    "data": "another data set or other fields of it",
    "content": "other samples",
    "flips": "another data.flip",
    "image_shape": "pictures of another shape",
    "dtype": "another precompute.dtype",
    "samples_per_shard": "another precompute.samples_per_shard",
}
"""{key of what describes stored latents: how messages call another value of it}"""


def load_backbone(cfg: DictConfig) -> Any:
    """Return the network whose VAE and text encoders are used: the teacher, or the one that `cfg.pretrain` trains."""
    if cfg.pretrain is None:
        teacher = build_teacher(cfg)
        if not teacher.generates:
            raise ConfigError(f"teacher={cfg.teacher.get('name', '?')} has no latents; choose a diffusion model")
        return teacher
    module = build(cfg.pretrain, optimizer=None, lr_scheduler=None, seed=cfg.seed, dump=None)()
    if not hasattr(module, "backbone"):
        raise ConfigError(f"latents={cfg.latents}: a {type(module).__name__} is not trained on latents; choose null")
    return module.backbone


def hash_content(data: Any) -> str:
    """Return the sha256 of the number of samples of each split, and of pictures, labels and captions of 64 of them."""
    total = hashlib.sha256()
    for split in SPLITS:
        count = len(data.source(split))
        record = data.take(split, np.linspace(0, count - 1, min(count, 64)).astype(int))
        total.update(f"{split} {count} {record.get('caption')}".encode("utf-8", "surrogatepass"))
        for name in ("image", "label"):
            total.update(record[name].tobytes())
    return total.hexdigest()


def identify_latents(cfg: DictConfig, backbone: DiffusionBackbone, content: str) -> dict[str, str]:
    """Return hashes of what latents are made from: VAE, text encoders, the data's configuration and content.

    `content` is the hash of the data's content. Raises ValueError for a network without a VAE.
    """
    pipeline_parts = backbone.pipeline_parts
    if pipeline_parts is None or not pipeline_parts.has_vae:
        raise ValueError("latents=... is for models with a VAE; this one works on images. Leave it out")
    data = {key: value for key, value in get_effective_settings(cfg)["data"].items() if key not in NO_EFFECT}
    encoders = [module for module in pipeline_parts.modules() if module is not pipeline_parts.vae]
    return {
        "vae": digest_of_weights(pipeline_parts.vae),
        "text": digest([digest_of_weights(*encoders), pipeline_parts.describe_vocabularies()]),
        "data": digest(data),
        "content": content,
        "version": str(VERSION),
    }


def check_latents(cfg: DictConfig, data: DataModule, backbone: Any) -> None:
    """Raise ValueError where stored latents belong to another VAE, text encoder or data set than this job's.

    The content of the data is not compared where the pictures are no longer on this machine.
    """
    manifest = data.manifest
    if manifest is None:
        return
    try:
        content = hash_content(data)
    except MissingData:
        content = manifest["content"]
    for key, wanted in identify_latents(cfg, backbone, content).items():
        stored = manifest["text_encoder" if key == "text" else key]
        if stored != wanted:
            raise ValueError(
                f"latents={cfg.latents} was made with {DIFFERENCES[key]}: its {key} is "
                f"{stored[:16]}, this job's {wanted[:16]}; precompute into another folder"
            )


def precompute(cfg: DictConfig) -> Path:
    """Write what is missing of the latents, and of the teacher's outputs, in the folder `cfg.latents`; returns it."""
    latents = Precomputation(cfg)
    folder = latents.run()
    if cfg.precompute.teacher_draws:
        if (folder / "manifest.json").exists():
            store_outputs(cfg, latents.backbone)
        else:
            log.info("%s: call this again for the teacher's outputs, once all latents are there", folder)
    return folder


class Precomputation:
    """Writes a folder of latents: started.json, which identifies them, comes first, manifest.json last."""

    def __init__(self, cfg: DictConfig) -> None:
        self.folder, cfg = Path(cfg.latents).expanduser(), cfg.copy()
        cfg.latents = None
        self.options, self.data = cfg.precompute, build(cfg.data)
        self.device = torch.device(resolve_accelerator(cfg.trainer.accelerator))
        self.backbone = load_backbone(cfg)
        self.origin = identify_latents(cfg, self.backbone, hash_content(self.data))
        shape, wanted = self.data.image_shape(), self.backbone.image_shape()
        if shape != wanted:
            raise ValueError(f"data has images of (channels, height, width) {shape}, the VAE belongs to {wanted}")
        self.flips = bool(self.data.flip)
        self.texts: dict[str, int] = {}
        """{caption: row of its text states}"""
        self.description = {
            **self.origin,
            "flips": self.flips,
            "crop": "centre",
            "image_shape": list(shape),
            "dtype": self.options.dtype,
            "samples_per_shard": self.options.samples_per_shard,
        }

    @property
    def pipeline_parts(self) -> PipelineParts:
        assert self.backbone.pipeline_parts is not None
        return self.backbone.pipeline_parts

    def run(self) -> Path:
        """Write the text states, then the shards that no other process works on, then the manifest if all are there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        begin(self.folder / "started.json", self.description, DIFFERENCES, "choose another folder, or delete it")
        if self.backbone.takes_text:
            captions = [text for split in SPLITS for text in iterate_captions(self.data, split)]
            dtype, size = getattr(torch, self.options.dtype), self.options.batch_size
            with FileLock(self.folder / ".text.lock"):
                self.texts = store_texts(self.pipeline_parts, captions, self.folder, size, dtype, self.device)
        splits = {split: self.write_split(split) for split in SPLITS}
        if any(shard is None for shards in splits.values() for shard in shards):
            log.info("%s: other processes are making the other shards", self.folder)
            return self.folder
        for split, shards in splits.items():
            assert sum(shard["rows"] + shard["skipped"] for shard in shards if shard) == len(self.data.source(split))
        content = {
            **self.description,
            "text": bool(self.texts),
            "text_encoder": self.origin["text"],
            "splits": {split: {"shards": shards} for split, shards in splits.items()},
        }
        write_json(self.folder / "manifest.json", {"id": digest(content), **content})
        counts = (f"{sum(shard['rows'] for shard in shards if shard)} of {split}" for split, shards in splits.items())
        log.info("%s: %s", self.folder, ", ".join(counts))
        return self.folder

    def write_split(self, split: str) -> list[dict[str, Any] | None]:
        """Write the missing shards of a split; returns each shard's note, None where another process works on it."""
        notes = []
        total, size = len(self.data.source(split)), self.options.samples_per_shard
        skipped = BadSampleCounter(f"data.{split}", self.data.max_bad_fraction, max(total, MIN_COUNTED))
        for start in range(0, total, size):
            note = self.folder / f"{split}-{start // size:05d}.json"
            indices = np.arange(start, min(start + size, total))
            notes.append(write_missing(note, functools.partial(self.write_shard, split, indices, note, skipped)))
        skipped.report()
        return notes

    def write_shard(self, split: str, indices: np.ndarray, note: Path, skipped: BadSampleCounter) -> None:
        """Write one shard, then its note, a JSON file that stands for a complete shard.

        Args:
            split: the split that the samples are from.
            indices: of the samples.
            note: path of the note; the shard lies beside it. The note counts the bad samples, which are left out.
            skipped: counts the bad samples of the split.
        """
        reader, parts = ImageSet(self.data.source(split)), []
        size, before = self.options.batch_size, skipped.count
        flips = self.flips and split == "train"  # held-out pictures are never mirrored
        for start in tqdm(range(0, len(indices), size), desc=f"{note.stem:<20}", dynamic_ncols=True):
            wanted = indices[start : start + size]
            batch = reader.record(wanted.tolist(), wanted)
            skipped.add(batch)
            good = np.flatnonzero(batch["index"] == wanted)  # the others are replacements of bad samples
            kept = {key: take_rows(value, good) for key, value in batch.items() if key != "skipped"}
            parts.append(self.encode(kept, flips))
        dtype = getattr(torch, self.options.dtype)
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        path = note.with_suffix(".safetensors")
        write_shard(path, tensors)
        write_json(note, {"file": path.name, "rows": len(tensors["index"]), "skipped": skipped.count - before})

    def encode(self, batch: dict[str, Any], flips: bool) -> dict[str, torch.Tensor]:
        """Return the tensors that a shard holds for a batch of samples; with `flips` those of mirror images, too."""
        image = batch["image"].to(self.device)
        tensors: dict[str, torch.Tensor] = {}
        for prefix, pictures in (("", image), (FLIPPED, image.flip(-1))) if flips else (("", image),):
            for name, value in zip(POSTERIOR, self.pipeline_parts.encode_posterior(pictures), strict=True):
                tensors[prefix + name] = value.cpu()
        for name, value in batch.items():
            if isinstance(value, np.ndarray):
                tensors[name] = torch.from_numpy(value)
        if self.texts:
            tensors["caption"] = torch.tensor([self.texts[caption] for caption in batch["caption"]])
        return tensors


def iterate_captions(data: DataModule, split: str) -> Iterator[str]:
    """Yield the captions of a split, without those that cannot be read."""
    captions = data.source(split).captions
    if captions is None:
        raise ValueError("the model takes text, but the data have no captions; choose data with captions")
    for index in range(len(captions)):
        with contextlib.suppress(BadSample):
            yield captions[index]


def take_rows(value: Any, rows: np.ndarray) -> Any:
    """Return some rows of a tensor, an array or a list."""
    return [value[row] for row in rows] if isinstance(value, list) else value[rows]


@hydra.main(version_base="1.3", config_path="../../conf", config_name="train")
def main(cfg: DictConfig) -> None:
    search_path.check_shadowed_files()
    checks.check_config(cfg)
    if cfg.latents is None:
        raise schema.ConfigError("latents=null: choose the folder to write the latents to, with latents=...")
    precompute(cfg)


def run() -> None:
    """Compose the configuration from the command line, and precompute."""
    schema.register()
    search_path.register_own_files_first()
    main()


if __name__ == "__main__":
    run()
