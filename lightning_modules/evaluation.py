"""Measuring a network: images from seeds, and the distance of its output from the teacher's."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.backbones.unet import UNetBackbone
from lightning_modules.base import sum_over_ranks
from lightning_modules.distillation import Reference


class Generation(pl.LightningModule):
    """Test batches are seeds; after the loop `images` holds one uint8 image a seed, in the order of the seeds."""

    def __init__(self, backbone: UNetBackbone, sampler: Callable[..., Any], steps: int) -> None:
        super().__init__()
        self.backbone, self.sampler, self.steps = backbone, sampler, steps
        self.images = np.empty(0, np.uint8)

    def on_test_start(self) -> None:
        self.found: dict[int, Tensor] = {}

    def test_step(self, seeds: Tensor, batch_idx: int) -> None:
        if batch_idx % self.trainer.world_size == self.global_rank:
            self.found.update(
                zip(seeds.tolist(), self.backbone.generate(seeds.cpu(), self.sampler, self.steps), strict=True)
            )

    def on_test_epoch_end(self) -> None:
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, self.found)
            self.found = {seed: image for part in gathered for seed, image in part.items()}
        self.images = torch.stack([self.found[seed] for seed in sorted(self.found)]).numpy()


class JointLoss(pl.LightningModule):
    """The joint output loss E ||eps_student - eps_teacher||^2 and both task losses, on fixed held-out samples."""

    def __init__(self, student: UNetBackbone, teacher: UNetBackbone, seed: int) -> None:
        super().__init__()
        self.student, self.reference, self.noise_seed = student, Reference(teacher), seed

    def on_test_start(self) -> None:
        self.reference.network.to(self.device)
        self.sums = torch.zeros(4, dtype=torch.float64)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if batch_idx % self.trainer.world_size != self.global_rank:
            return
        inputs = self.student.calibration_inputs(batch, self.noise_seed, "evaluation")
        eps_s, eps_t = self.student.predict(inputs).float(), self.reference.network.predict(inputs).float()
        pairs = ((eps_s, eps_t), (eps_s, inputs["target"]), (eps_t, inputs["target"]))
        means = [float(F.mse_loss(a.double(), b.double())) for a, b in pairs]
        self.sums += len(eps_s) * torch.tensor([*means, 1.0], dtype=torch.float64)

    def on_test_epoch_end(self) -> None:
        joint, task, teacher, count = sum_over_ranks(self, self.sums).tolist()
        if not math.isfinite(joint + task + teacher):
            raise FloatingPointError(
                f"held-out losses are not finite: student {task / count}, teacher {teacher / count}"
            )
        self.metrics = {"output_loss": joint / count, "task_loss": task / count, "teacher_task_loss": teacher / count}
