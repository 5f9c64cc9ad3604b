"""Stored outputs of a teacher: their format, and the noise and timestep that each of them was computed for.

A folder of stored latents may also have outputs.json, and beside each training shard a shard of the teacher's outputs
for a few draws of (latent, timestep, noise) per sample. Only the outputs are stored: a draw is a function of a seed, of
the sample and of the draw's number, and is drawn again in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.latents import Rows, parse_manifest
from datamodules.readers.base import MissingData
from datamodules.seeding import derive

OUTPUTS_FILE = "outputs.json"
"""The file that describes the stored outputs of a folder; it is written last."""


@dataclass(frozen=True)
class Draws:
    """The draws of (latent, timestep, noise) that every training sample has, numbered from 0.

    Args:
        per_picture: number of draws of a picture.
        mirrored: whether the mirror image of each picture has as many draws, which are numbered after the picture's.
        seed: seed of all draws.
    """

    per_picture: int
    mirrored: bool
    seed: int

    @property
    def per_sample(self) -> int:
        """Number of draws of a sample: those of the picture, and of its mirror image."""
        return self.per_picture * (2 if self.mirrored else 1)

    def seeds(self, indices: Sequence[int] | np.ndarray, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """Return the seed of one draw of each sample, (N,), a function of (seed, sample, number of the draw)."""
        pairs = zip(indices, numbers, strict=True)
        return torch.tensor([derive(self.seed, "teacher", int(index), int(number)) for index, number in pairs])

    def choose(self, seed: int, positions: Sequence[int], samples: int, flipped: np.ndarray) -> np.ndarray:
        """Return the number of the draw that training uses at each position, (N,).

        A sample's draws follow one another from pass to pass, from a first one that depends on (seed, sample).

        Args:
            seed: seed of the training.
            positions: positions in the order of training, see `Samples`.
            samples: number of training samples.
            flipped: (N,) whether the picture at each position is mirrored.
        """
        first = [derive(seed, "draw", position % samples) + position // samples for position in positions]
        return np.array([number % self.per_picture for number in first]) + self.per_picture * flipped


def read_outputs_manifest(folder: str | Path) -> dict[str, Any]:
    """Return what describes the stored outputs of a folder of latents; raises MissingData where it has none."""
    path = Path(folder).expanduser() / OUTPUTS_FILE
    if not path.exists():
        raise MissingData(
            f"distillation.teacher_outputs='stored', but latents={str(folder)!r} has no {OUTPUTS_FILE}: python -m "
            "experiments.precompute makes it, with the same arguments as the job and precompute.teacher_draws=8 (or "
            "another number); or choose distillation.teacher_outputs=live"
        )
    return parse_manifest(path)


class StoredOutputs:
    """The teacher's outputs in a folder of stored latents; row `sample * draws.per_sample + number` has one draw's.

    Raises MissingData where there are none, and ValueError where they belong to other latents.

    Args:
        folder: the folder.
        latents: the manifest of its latents.
    """

    def __init__(self, folder: Path, latents: dict[str, Any]) -> None:
        self.manifest = read_outputs_manifest(folder)
        if self.manifest["latents"] != latents["id"]:
            raise ValueError(
                f"latents={str(folder)!r}: the teacher's outputs in it belong to other latents than those that are "
                "there now; delete outputs* in that folder and precompute again, or choose "
                "distillation.teacher_outputs=live"
            )
        shards = self.manifest["shards"]
        self.rows = Rows([folder / shard["file"] for shard in shards], [shard["rows"] for shard in shards])
        self.draws = Draws(self.manifest["draws"], latents["flips"], self.manifest["seed"])

    def take(self, indices: np.ndarray, numbers: np.ndarray) -> dict[str, Tensor]:
        """Return one draw of each sample: "draw_seed" (N,) and "teacher_output" (N,C,h,w) in the type it is stored in.

        Args:
            indices: (N,) the samples.
            numbers: (N,) the numbers of their draws.
        """
        output = self.rows.take("output", indices * self.draws.per_sample + numbers)
        return {"draw_seed": self.draws.seeds(indices, numbers), "teacher_output": output}
