"""Stores the outputs of a teacher beside stored latents, and checks whether stored outputs are of a job's teacher."""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from datamodules.latents import write_shard
from datamodules.teacher_outputs import OUTPUTS_FILE, Draws
from experiments.engine.artefacts import digest, write_json
from experiments.engine.inputs import build_data
from experiments.tools.shard_files import begin, write_missing
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.backbones.diffusion.pipeline_parts import move
from lightning_modules.backbones.diffusion.schedule import prediction_type
from lightning_modules.metrics.published import digest_of_weights
from lightning_modules.training.trainer import autocast, resolve_accelerator, resolve_precision

log = logging.getLogger(__name__)

OUTPUTS_VERSION = 2
"""Goes up when stored outputs have another content, form or description."""
DIFFERENCES = {
    "version": "another version",
    "weights": "another teacher",
    "configuration": "a teacher of another configuration",
    "prediction_type": "a teacher of another prediction type",
    "schedule": "another noise schedule",
    "scaling": "another scaling of the VAE's latents",
    "latents": "other latents",
    "draws": "another precompute.teacher_draws",
    "seed": "another seed",
    "dtype": "another precompute.dtype",
    "precision": "another trainer.precision",
}
"""{key of what describes stored outputs: how messages call another value of it}"""
SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Fields of a VAE's configuration that scale the latents after they were drawn from what is stored."""


def digest_config(part: Any) -> str:
    """Return the sha256 of the class and the configuration of a part of a pipeline, without paths and versions."""
    settings = {key: value for key, value in part.config.items() if not key.startswith("_")}
    return digest([type(part).__name__, settings])


def describe_teacher(teacher: DiffusionBackbone) -> dict[str, str]:
    """Return what a teacher's outputs depend on beside what is stored of its inputs.

    These are hashes of the network's weights and configuration, of the noise schedule, and of the scaling of latents.
    The version comes first, as other versions have other keys.
    """
    parts = teacher.pipeline_parts
    scaling = parts.vae.config if parts is not None and parts.has_vae else {}
    return {
        "version": str(OUTPUTS_VERSION),
        "weights": digest_of_weights(teacher.network),
        "configuration": digest_config(teacher.network),
        "prediction_type": prediction_type(teacher.noise_scheduler),
        "schedule": digest_config(teacher.noise_scheduler),
        "scaling": digest([scaling.get(field) for field in SCALING]),
    }


def check_outputs(folder: str, manifest: Mapping[str, Any], teacher: Any) -> None:
    """Raise ValueError where stored outputs are those of another teacher than this job's.

    Args:
        folder: `latents` of the job, for messages.
        manifest: what describes the stored outputs.
        teacher: the job's teacher.
    """
    for key, wanted in describe_teacher(teacher).items():
        if manifest[key] != wanted:
            raise ValueError(
                f"latents={folder}: the teacher's outputs in it were computed with {DIFFERENCES[key]}: its "
                f"{key} is {manifest[key][:16]}, this job's {wanted[:16]}; choose distillation.teacher_outputs=live, "
                "or precompute into another folder"
            )


def store_outputs(cfg: DictConfig, teacher: DiffusionBackbone) -> None:
    """Write what is missing of the teacher's outputs beside the finished latents in `cfg.latents`."""
    OutputPrecomputation(cfg, teacher).run()


class OutputPrecomputation:
    """Writes outputs_started.json first, then a shard of outputs per shard of training samples, outputs.json last.

    The teacher runs in `trainer.precision`, on the inputs that training draws: from latents and text states as stored.
    """

    def __init__(self, cfg: DictConfig, teacher: DiffusionBackbone) -> None:
        data: Any = build_data(cfg)
        teacher.check_data(data)
        self.folder, self.options, self.precision = (
            Path(cfg.latents).expanduser(),
            cfg.precompute,
            cfg.trainer.precision,
        )
        self.device = torch.device(resolve_accelerator(cfg.trainer.accelerator))
        self.draws = Draws(self.options.teacher_draws, data.manifest["flips"], cfg.seed)
        self.samples = data.enumerate_draws(self.draws)
        self.teacher = teacher.to(self.device).eval()
        self.shards = data.manifest["splits"]["train"]["shards"]
        self.description = {
            **describe_teacher(teacher),
            "latents": data.manifest["id"],
            "draws": self.draws.per_picture,
            "seed": self.draws.seed,
            "dtype": self.options.dtype,
            "precision": resolve_precision(self.precision, self.device.type),
        }

    def run(self) -> None:
        """Write the shards that no other process works on, then the description if all are there."""
        remedy = "choose another folder, or delete outputs* in it"
        begin(self.folder / "outputs_started.json", self.description, DIFFERENCES, remedy)
        ends = np.cumsum([shard["rows"] for shard in self.shards])
        notes = []
        for number, (shard, end) in enumerate(zip(self.shards, ends, strict=True)):
            note = self.folder / f"outputs-{number:05d}.json"
            indices = np.arange(end - shard["rows"], end)
            notes.append(write_missing(note, functools.partial(self.write_shard, indices, note)))
        if None in notes:
            log.info("%s: other processes are computing the other outputs", self.folder)
            return
        content = {**self.description, "shards": notes}
        write_json(self.folder / OUTPUTS_FILE, {"id": digest(content), **content})
        log.info("%s: %d outputs of the teacher per sample", self.folder, self.draws.per_sample)

    def write_shard(self, indices: np.ndarray, note: Path) -> None:
        """Write the outputs for all draws of some samples, then the note that stands for a complete shard."""
        numbers = np.arange(self.draws.per_sample)
        positions = (indices[:, None] + len(self.samples) * numbers).flatten().tolist()
        size = self.options.batch_size
        steps = tqdm(range(0, len(positions), size), desc=f"{note.stem:<20}", dynamic_ncols=True)
        outputs = [self.compute(positions[start : start + size]) for start in steps]
        path = note.with_suffix(".safetensors")
        write_shard(path, {"output": torch.cat(outputs)})
        write_json(note, {"file": path.name, "rows": len(positions)})

    @torch.no_grad()
    def compute(self, positions: list[int]) -> Tensor:
        """Return the teacher's outputs for the draws at some positions, (N,C,h,w), on the CPU in the stored type.

        Raises FloatingPointError where they are not finite in that type.
        """
        batch = move(self.samples.__getitems__(positions), self.device)
        with autocast(self.precision, self.device):
            output = self.teacher.predict(self.teacher.training_inputs(batch))
        stored = output.to(getattr(torch, self.options.dtype)).cpu()
        if not stored.isfinite().all():
            raise FloatingPointError(
                f"outputs of the teacher are not finite as {self.options.dtype} (precompute.dtype), in a batch with "
                f"the samples {batch['index'].unique().tolist()[:5]}; choose precompute.dtype=float32 and another "
                "folder, or another trainer.precision"
            )
        return stored
