"""Weights of the levels in feature distillation, and the feature maps that are compared."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.backbones.removal import get_feature_map
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
        """Return the weight of a level, a scalar, for the teacher's feature map of a batch (of all ranks)."""
        if self.normalization == "none":
            return torch.ones((), device=teacher.device)
        if self.normalization == "teacher_norm":
            return 1 / mean_over_ranks({"norm": teacher.flatten(1).norm(dim=1).mean()})["norm"]
        energy = mean_over_ranks({"energy": teacher.square().mean()})["energy"]
        return 1 / (self.smooth(level, energy) if self.normalization == "running" else energy)

    def for_samples(self, level: int, teacher: Sequence[Tensor]) -> Tensor:
        """Return a weight per sample (N,) of the teacher's feature maps of N samples, (tokens,C) each.

        With `running` all of them have the weight of the mean energy over the samples of all ranks.
        """
        if self.normalization == "none":
            return torch.ones(len(teacher), device=self.energy.device)
        if self.normalization == "teacher_norm":
            return torch.stack([1 / part.norm() for part in teacher]) if teacher else self.energy[:0]
        energies = torch.stack([part.square().mean() for part in teacher]) if teacher else self.energy[:0]
        if self.normalization == "teacher_energy":
            return 1 / energies
        count = torch.tensor(float(len(teacher)), device=energies.device)
        means = mean_over_ranks({"energy": energies.sum(), "count": count})
        if not means["count"]:
            return energies
        return (1 / self.smooth(level, means["energy"] / means["count"])).expand(len(teacher))

    def smooth(self, level: int, energy: Tensor) -> Tensor:
        """Return the average of a level's energy over the batches so far, this one included."""
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
            maps[name] = get_feature_map(output)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
