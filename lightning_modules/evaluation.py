"""Measuring a network: images from seeds, and the distance of its output from the teacher's."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import DataLoader

from criteria.base import Unit
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.conditions import move
from lightning_modules.backbones.diffusion import DiffusionBackbone
from lightning_modules.base import sum_over_ranks
from lightning_modules.distillation import Reference
from lightning_modules.metrics.cost import latencies
from lightning_modules.metrics.frechet import resized


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


class JointLoss(pl.LightningModule):
    """The joint output loss E ||eps_student - eps_teacher||^2 and both task losses, on fixed held-out samples.

    Of a language model the outputs are logits.
    """

    def __init__(self, student: NetworkBackbone, teacher: NetworkBackbone, seed: int) -> None:
        super().__init__()
        self.student, self.reference, self.noise_seed = student, Reference(teacher), seed

    def on_test_start(self) -> None:
        self.reference.network.to(self.device)
        self.sums = torch.zeros(4, dtype=torch.float64)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if batch_idx % self.trainer.world_size != self.global_rank:
            return
        inputs = self.student.calibration_inputs(batch, self.noise_seed, "evaluation")
        output_s, output_t = (network.predict(inputs) for network in (self.student, self.reference.network))
        losses = [float(self.student.losses(output, inputs).mean()) for output in (output_s, output_t)]
        count = len(output_s)
        found = [square_errors(output_s, output_t), *(count * loss for loss in losses), count]
        self.sums += torch.tensor(found, dtype=torch.float64)

    def on_test_epoch_end(self) -> None:
        joint, task, teacher, count = sum_over_ranks(self, self.sums).tolist()
        if not math.isfinite(joint + task + teacher):
            raise FloatingPointError(
                f"held-out losses are not finite: student {task / count}, teacher {teacher / count}"
            )
        self.metrics = {"output_loss": joint / count, "task_loss": task / count, "teacher_task_loss": teacher / count}


AT_ONCE = 2**26
"""Numbers that are turned into float64 at once: the logits of a batch of texts may be many."""


def square_errors(output: Tensor, other: Tensor) -> float:
    """The sum over samples of mean((output - other)^2), in float64, of as many samples at once as AT_ONCE allows."""
    part = max(1, AT_ONCE // output[0].numel())
    pairs = zip(output.split(part), other.split(part), strict=True)
    return sum(len(a) * float(a.to(torch.float64, copy=True).sub_(b).square_().mean()) for a, b in pairs)


class JointMeasure:
    """measure(names): E ||eps without all of these units - eps||^2 on fixed calibration samples, one call a plan."""

    def __init__(self, backbone: NetworkBackbone, batches: DataLoader, seed: int, device: torch.device) -> None:
        self.backbone, self.batches, self.seed, self.device = backbone.to(device).eval(), batches, seed, device

    @functools.cached_property
    @torch.no_grad()
    def dense(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Inputs and the whole network's outputs, kept from the first call on."""
        made = [self.backbone.calibration_inputs(move(batch, self.device), self.seed) for batch in self.batches]
        return [(inputs, self.backbone.predict(inputs)) for inputs in made]

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
    backbone: NetworkBackbone, units: Sequence[Unit], protocol: Any, device: torch.device
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
