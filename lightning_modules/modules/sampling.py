"""Drawing images from seeds under a Trainer."""

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
    """Test batches are those of `seeds`; rank 0 writes one uint8 image a seed, in their order, into the .npy `file`.

    They are written while they are made, so that no more than a batch of each rank is held; `size` resizes them.
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
        self.mine: list[np.ndarray] = []  # of the batches that the ranks have since they last met
        self.written = 0
        self.images: Any = None

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        world = self.trainer.world_size
        if batch_idx % world == self.global_rank:
            samples = self.backbone.generate(batch, self.sampler, self.steps, self.guidance)
            made = self.backbone.decode(samples).numpy()
            self.mine = [made if self.size is None else resized(made, self.size)]
        if batch_idx % world == world - 1 or batch_idx == self.trainer.num_test_batches[0] - 1:
            self.meet()

    def meet(self) -> None:
        """Bring the ranks' batches together and write them."""
        found: list[Any] = [self.mine]
        if self.trainer.world_size > 1:
            found = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(found, self.mine)
        self.mine = []
        if self.file is None:
            return
        for images in (images for part in found for images in part):
            if self.images is None:
                count = len(self.trainer.test_dataloaders.dataset)  # type: ignore[union-attr]
                self.images = open_memmap(self.file, "w+", np.uint8, (count, *images.shape[1:]))
            self.images[self.written : self.written + len(images)] = images
            self.written += len(images)

    def on_test_epoch_end(self) -> None:
        if self.images is not None:
            self.images.flush()


def seeds(seed: int, count: int, batch_size: int, captions: Sequence[str] | None) -> DataLoader:
    """Batches of {"seed": (N,), "caption": list}; seed k has caption k of those there are, going round."""

    def collate(numbers: list[int]) -> dict[str, Any]:
        batch: dict[str, Any] = {"seed": seed * 10_000_019 + torch.tensor(numbers)}
        return batch | {"caption": [captions[k % len(captions)] for k in numbers]} if captions else batch

    return DataLoader(range(count), batch_size=batch_size, collate_fn=collate)  # type: ignore[arg-type]
