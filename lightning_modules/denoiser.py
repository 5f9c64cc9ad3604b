"""Training a diffusion model from nothing: the task loss alone. It makes the embedded teacher."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbones.diffusion import DiffusionBackbone
from lightning_modules.backbones.unet import CLASSES, UNetBackbone
from lightning_modules.base import Optimizer, Schedule, TrainedModule, sum_over_ranks


class Denoiser(TrainedModule):
    """Mean squared error to the noise that was added (Ho et al. 2020, arXiv 2006.11239, equation 14)."""

    def __init__(
        self, backbone: DiffusionBackbone, optimizer: Optimizer, lr_scheduler: Schedule, seed: int, dump: Path
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, dump)
        self.backbone = backbone.train()

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"loss": self.backbone.loss(self.backbone.training_inputs(batch))}

    def on_test_start(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if batch_idx % self.trainer.world_size == self.global_rank:
            loss = self.backbone.loss(self.backbone.calibration_inputs(batch, seed=0))
            self.sums += len(batch["image"]) * torch.tensor([float(loss), 1.0], dtype=torch.float64)

    def on_test_epoch_end(self) -> None:
        total = sum_over_ranks(self, self.sums)
        self.metrics = {"test_task_loss": float(total[0] / total[1]), "test_images": int(total[1])}

    def save(self, folder: Path) -> None:
        """What `teacher.path` takes: config.json, half-precision safetensors, and the noise schedule beside them."""
        self.backbone.half().save(folder)
        self.backbone.noise_scheduler.save_pretrained(folder)


def from_config(
    unet: dict[str, Any], noise_scheduler: Any, optimizer: Optimizer, lr_scheduler: Schedule, seed: int, dump: Path
) -> Denoiser:
    """A Denoiser around a network with fresh weights, drawn from `seed`."""
    torch.manual_seed(seed)
    network = CLASSES[unet["_class_name"]].from_config(dict(unet))
    return Denoiser(UNetBackbone(network, noise_scheduler), optimizer, lr_scheduler, seed, dump)
