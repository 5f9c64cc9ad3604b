"""Generation of samples from seeds under a Trainer."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.lib.format import open_memmap
from torch.utils.data import DataLoader

from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.metrics.features import resized


class Generation(pl.LightningModule):
    """Writes one uint8 image per seed, in their order, into a .npy file; the test batches are those of `seed_batches`.

    Rank 0 writes the images as they are generated, so that at most one batch per rank is in memory.

    Args:
        backbone: the network.
        sampler: makes a diffusers scheduler from the configuration of the noise schedule.
        steps: sampling steps.
        guidance: scale of classifier-free guidance; 1 is none.
        size: edge in pixels to which images are resized; None leaves them as they are.
        file: the .npy file, on rank 0; None on other ranks.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        sampler: Callable[..., Any],
        steps: int,
        guidance: float = 1.0,
        size: int | None = None,
        file: Path | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.sampler, self.steps, self.guidance = backbone, sampler, steps, guidance
        self.size, self.file = size, file

    def on_test_start(self) -> None:
        self.unwritten: list[np.ndarray] = []  # images of this rank that rank 0 has not gathered yet
        self.written = 0
        self.images: Any = None

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        world = self.trainer.world_size
        if batch_idx % world == self.global_rank:
            self.unwritten = [self.generate_images(batch)]
        if batch_idx % world == world - 1 or batch_idx == self.trainer.num_test_batches[0] - 1:
            self.gather()

    def generate_images(self, batch: dict[str, Any]) -> np.ndarray:
        """Return the images of a batch of seeds, uint8 (N,H,W,C)."""
        samples = self.backbone.generate(batch, self.sampler, self.steps, self.guidance)
        images = self.backbone.decode(samples).numpy()
        return images if self.size is None else resized(images, self.size)

    def gather(self) -> None:
        """Gather the batches of all ranks on rank 0 and write them."""
        by_rank: list[Any] = [self.unwritten]
        if self.trainer.world_size > 1:
            by_rank = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(by_rank, self.unwritten)
        self.unwritten = []
        if self.file is None:
            return
        for images in (images for batches in by_rank for images in batches):
            if self.images is None:
                count = len(self.trainer.test_dataloaders.dataset)  # type: ignore[union-attr]
                self.images = create_images(self.file, (count, *images.shape[1:]))
            self.images[self.written : self.written + len(images)] = images
            self.written += len(images)

    def on_test_epoch_end(self) -> None:
        if self.images is not None:
            self.images.flush()


def create_images(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Create a .npy file of uint8 images (N,H,W,C) and return it as a memory map; raises OSError naming a full disk.

    All of its space is taken at once: writing to a map of a file with holes would end in SIGBUS on a full disk.
    """
    images = open_memmap(file, "w+", np.uint8, shape)
    size = file.stat().st_size
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(file, "r+b") as stream:
            try:
                os.posix_fallocate(stream.fileno(), 0, size)
            except OSError as error:
                reason = f"{error.strerror}, {size:,} bytes are needed for {shape[0]} samples"
                raise OSError(error.errno, reason, str(file)) from error
    return images


SEED_STRIDE = 10_000_019
"""Distance between the first sample seeds of two consecutive values of `seed`: larger than any number of samples, so
that two values share no sample."""


def seed_batches(seed: int, count: int, batch_size: int, captions: Sequence[str] | None) -> DataLoader:
    """Return batches of {"seed": (N,), "caption": list} with `count` seeds; captions repeat when they are fewer."""

    def collate(numbers: list[int]) -> dict[str, Any]:
        batch: dict[str, Any] = {"seed": seed * SEED_STRIDE + torch.tensor(numbers)}
        return batch | {"caption": [captions[k % len(captions)] for k in numbers]} if captions else batch

    return DataLoader(range(count), batch_size=batch_size, collate_fn=collate)  # type: ignore[arg-type]
