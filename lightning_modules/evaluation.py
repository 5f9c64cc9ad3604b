"""Measuring a network: images from seeds, and the distance of its output from the teacher's."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from criteria.base import Unit
from lightning_modules.backbones.diffusion import DiffusionBackbone, move
from lightning_modules.base import sum_over_ranks
from lightning_modules.distillation import Reference
from lightning_modules.metrics.cost import latencies


class Generation(pl.LightningModule):
    """Test batches are those of `seeds`; after the loop `images` holds one uint8 image a seed, in their order."""

    def __init__(
        self, backbone: DiffusionBackbone, sampler: Callable[..., Any], steps: int, guidance: float = 1.0
    ) -> None:
        super().__init__()
        self.backbone, self.sampler, self.steps, self.guidance = backbone, sampler, steps, guidance
        self.images = np.empty(0, np.uint8)

    def on_test_start(self) -> None:
        self.found: dict[int, Tensor] = {}

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if batch_idx % self.trainer.world_size == self.global_rank:
            samples = self.backbone.generate(batch, self.sampler, self.steps, self.guidance)
            self.found.update(zip(batch["seed"].tolist(), self.backbone.decode(samples), strict=True))

    def on_test_epoch_end(self) -> None:
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, self.found)
            self.found = {seed: image for part in gathered for seed, image in part.items()}
        self.images = torch.stack([self.found[seed] for seed in sorted(self.found)]).numpy()


def seeds(seed: int, count: int, batch_size: int, captions: list[str] | None) -> DataLoader:
    """Batches of {"seed": (N,), "caption": list}; seed k has caption k of those there are, going round."""

    def collate(numbers: list[int]) -> dict[str, Any]:
        batch: dict[str, Any] = {"seed": seed * 10_000_019 + torch.tensor(numbers)}
        return batch | {"caption": [captions[k % len(captions)] for k in numbers]} if captions else batch

    return DataLoader(range(count), batch_size=batch_size, collate_fn=collate)  # type: ignore[arg-type]


class JointLoss(pl.LightningModule):
    """The joint output loss E ||eps_student - eps_teacher||^2 and both task losses, on fixed held-out samples."""

    def __init__(self, student: DiffusionBackbone, teacher: DiffusionBackbone, seed: int) -> None:
        super().__init__()
        self.student, self.reference, self.noise_seed = student, Reference(teacher), seed

    def on_test_start(self) -> None:
        self.reference.network.to(self.device)
        self.sums = torch.zeros(4, dtype=torch.float64)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if batch_idx % self.trainer.world_size != self.global_rank:
            return
        inputs = self.student.calibration_inputs(batch, self.noise_seed, "evaluation")
        eps_s, eps_t = (network.predict(inputs).double() for network in (self.student, self.reference.network))
        joint = (eps_s - eps_t).square().mean()
        means = [joint, *(self.student.losses(eps, inputs).mean() for eps in (eps_s, eps_t))]
        self.sums += len(eps_s) * torch.tensor([*map(float, means), 1.0], dtype=torch.float64)

    def on_test_epoch_end(self) -> None:
        joint, task, teacher, count = sum_over_ranks(self, self.sums).tolist()
        if not math.isfinite(joint + task + teacher):
            raise FloatingPointError(
                f"held-out losses are not finite: student {task / count}, teacher {teacher / count}"
            )
        self.metrics = {"output_loss": joint / count, "task_loss": task / count, "teacher_task_loss": teacher / count}


class JointMeasure:
    """measure(names): E ||eps without all of these units - eps||^2 on fixed calibration samples, one call a plan."""

    def __init__(self, backbone: DiffusionBackbone, batches: DataLoader, seed: int, device: torch.device) -> None:
        self.backbone, self.batches, self.seed, self.device = backbone.to(device).eval(), batches, seed, device

    @functools.cached_property
    @torch.no_grad()
    def dense(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Inputs and the whole network's outputs, kept from the first call on."""
        made = [self.backbone.calibration_inputs(move(batch, self.device), self.seed) for batch in self.batches]
        return [(inputs, self.backbone.predict(inputs).double()) for inputs in made]

    @torch.no_grad()
    def __call__(self, names: Sequence[str]) -> float:
        total, count = 0.0, 0
        dense = self.dense
        with self.backbone.without(names):
            for inputs, expected in dense:
                total += float((self.backbone.predict(inputs).double() - expected).square().flatten(1).mean(1).sum())
                count += len(expected)
        return total / count


def unit_savings(
    backbone: DiffusionBackbone, units: Sequence[Unit], protocol: Any, device: torch.device
) -> dict[str, int]:
    """Microseconds of one forward that the removal of each unit saves; under "" those of the whole network.

    Medians over `protocol.latency_repeats` rounds in which the whole network and every pruned one take their turns.
    """
    inputs = backbone.to(device).eval().example_inputs(protocol.latency_batch, device)

    def without(name: str) -> Callable[[], Any]:
        def call() -> Any:
            with backbone.without([name] if name else []):
                return backbone.predict(inputs)

        return call

    times = latencies(
        {name: without(name) for name in ("", *(unit.name for unit in units))}, protocol.latency_repeats, device
    )
    whole = times.pop("")
    return {"": round(1000 * whole)} | {name: round(1000 * (whole - time)) for name, time in times.items()}
