"""Weights of the levels in feature distillation, and the feature maps that are compared."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.backbones.base import hidden
from lightning_modules.training.ranks import mean_over_ranks

NORMALIZATIONS = ("teacher_energy", "teacher_norm", "running", "none")


class LevelWeights(nn.Module):
    """The weights alpha_l in  sum_l alpha_l * d(f_S_l, f_T_l),  from the teacher's feature maps f_T_l.

    `none`: 1, which is BK-SDM's loss (arXiv 2305.15798); the few largest feature maps dominate it.
    `teacher_energy`: 1 / mean(f_T_l^2) over the batch of all ranks; each term is then a relative squared error.
    `running`: the same with the energy averaged over batches (momentum 0.99), so that one batch moves it little.
    `teacher_norm`: 1 / mean over samples of ||f_T_l||_2.

    LAPTOP-Diff (arXiv 2404.11098) re-weights "based on the L2-norms of the teacher's feature maps, ensuring that all
    feature loss terms are treated equally"; its exact form is not known, so the choice and the default are ours.
    """

    def __init__(self, normalization: str, levels: int, momentum: float = 0.99) -> None:
        super().__init__()
        if normalization not in NORMALIZATIONS:
            raise ValueError(
                f"distillation.normalization={normalization!r} is unknown; choose one of: {', '.join(NORMALIZATIONS)}"
            )
        self.normalization, self.momentum = normalization, momentum
        self.energy: Tensor
        self.register_buffer("energy", torch.zeros(levels))

    def forward(self, level: int, teacher: Tensor) -> Tensor:
        """Return the weight of a level, a scalar, for the teacher's feature map of a batch, of any shape (N,...)."""
        if self.normalization == "none":
            return torch.ones((), device=teacher.device)
        size = mean_over_ranks({"size": self.size(teacher)})["size"]
        return 1 / (self.update_running(level, size) if self.normalization == "running" else size)

    def weigh_samples(self, level: int, teacher: Sequence[Tensor]) -> Tensor:
        """Return the weights of a level, (N,), for the teacher's feature maps of N samples, each (tokens,C).

        Each sample has a weight of its own, whatever is in the same batch; with `running` all have the weight of the
        averaged energy of samples.
        """
        if self.normalization == "none":
            return self.energy.new_ones(len(teacher))
        sizes_N = torch.stack([self.size(sample[None]) for sample in teacher]) if teacher else self.energy.new_zeros(0)
        if self.normalization != "running":
            return 1 / sizes_N
        sums = {"sizes": sizes_N.sum(), "samples": sizes_N.new_tensor(len(sizes_N))}
        means = mean_over_ranks(sums)  # their quotient is the mean over the samples of all ranks
        energy = self.update_running(level, means["sizes"] / means["samples"].clamp_min(1e-9))
        return (1 / energy).expand(len(sizes_N))

    def size(self, teacher: Tensor) -> Tensor:
        """Return what a weight is the inverse of: the mean norm of a sample with `teacher_norm`, else the energy."""
        if self.normalization == "teacher_norm":
            return teacher.flatten(1).norm(dim=1).mean()
        return teacher.square().mean()

    def update_running(self, level: int, energy: Tensor) -> Tensor:
        """Return the running energy of a level after a batch of the given energy, and keep it."""
        before = self.energy[level]
        energy = torch.where(before == 0, energy, self.momentum * before + (1 - self.momentum) * energy)
        self.energy[level] = energy.detach()
        return energy


@contextlib.contextmanager
def features(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that forward passes inside the context fill with the feature maps of some modules, by name.

    Where a module returns several values, its feature map is kept. Modules are referred to as objects, since their
    names may change under DDP.
    """
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            maps[name] = hidden(output)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
