"""The distance of a student's output from the teacher's, on fixed samples."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.diffusion.pipeline_parts import move
from lightning_modules.backbones.repair.least_squares import FLOAT64_VALUES
from lightning_modules.modules.base import Reference
from lightning_modules.training.ranks import sum_over_ranks


class JointLoss(pl.LightningModule):
    """Measures the joint output loss E ||eps_student - eps_teacher||^2 and both task losses on held-out samples.

    The outputs of a language model are its logits. `metrics` has the figures after a test loop; it raises
    FloatingPointError where one is not finite.
    """

    def __init__(self, student: NetworkBackbone, teacher: NetworkBackbone, seed: int) -> None:
        super().__init__()
        self.student, self.reference, self.noise_seed = student, Reference(teacher), seed

    def on_test_start(self) -> None:
        self.reference.network.to(self.device)
        # Over samples: joint loss, task loss of the student, task loss of the teacher, and their number.
        self.sums = torch.zeros(4, dtype=torch.float64)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if batch_idx % self.trainer.world_size != self.global_rank:
            return
        inputs = self.student.calibration_inputs(batch, self.noise_seed, "evaluation")
        output_s, output_t = (network.predict(inputs) for network in (self.student, self.reference.network))
        losses = [float(self.student.losses(output, inputs).mean()) for output in (output_s, output_t)]
        count = len(output_s)
        sums = [sum_square_errors(output_s, output_t), *(count * loss for loss in losses), count]
        self.sums += torch.tensor(sums, dtype=torch.float64)

    def on_test_epoch_end(self) -> None:
        joint, task, teacher, count = sum_over_ranks(self.sums, self.device).tolist()
        if not math.isfinite(joint + task + teacher):
            raise FloatingPointError(
                f"held-out losses are not finite: student {task / count}, teacher {teacher / count}"
            )
        self.metrics = {"output_loss": joint / count, "task_loss": task / count, "teacher_task_loss": teacher / count}


def sum_square_errors(output: Tensor, other: Tensor) -> float:
    """Return the sum over samples of mean((output - other)^2), computed in float64."""
    part = max(1, FLOAT64_VALUES // output[0].numel())
    pairs = zip(output.split(part), other.split(part), strict=True)
    return sum(len(a) * float(a.to(torch.float64, copy=True).sub_(b).square_().mean()) for a, b in pairs)


class JointMeasure:
    """A function of the names of units: E ||eps without all of them - eps||^2 on fixed calibration samples."""

    def __init__(self, backbone: NetworkBackbone, batches: DataLoader, seed: int, device: torch.device) -> None:
        self.backbone, self.batches, self.seed, self.device = backbone.to(device).eval(), batches, seed, device

    @functools.cached_property
    @torch.no_grad()
    def dense(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Inputs of all batches and the whole network's outputs, computed at the first call."""
        batches = [self.backbone.calibration_inputs(move(batch, self.device), self.seed) for batch in self.batches]
        return [(inputs, self.backbone.predict(inputs)) for inputs in batches]

    @torch.no_grad()
    def __call__(self, names: Sequence[str]) -> float:
        total, count = 0.0, 0
        dense = self.dense
        with self.backbone.without(names):
            for inputs, expected in dense:
                total += float((self.backbone.predict(inputs).double() - expected).square().flatten(1).mean(1).sum())
                count += len(expected)
        return total / count
