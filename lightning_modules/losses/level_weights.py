"""Weights of the levels in feature distillation."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_modules.training.ranks import mean_over_ranks

NORMALIZATIONS = ("teacher_energy", "teacher_norm", "running", "none")


class LevelWeights(nn.Module):
    """Computes the weights alpha_l in sum_l alpha_l * d(f_S_l, f_T_l) from the teacher's feature maps f_T_l.

    `none`: 1, as in BK-SDM (arXiv 2305.15798). The few largest feature maps dominate the sum.
    `teacher_energy`: 1 / mean(f_T_l^2) over the global batch. Each term is then a relative squared error.
    `running`: like teacher_energy, with the energy averaged over batches, so that a single batch changes it little.
    `teacher_norm`: 1 / mean over samples of ||f_T_l||_2.

    LAPTOP-Diff (arXiv 2404.11098) weights "based on the L2-norms of the teacher's feature maps, ensuring that all
    feature loss terms are treated equally". Its exact formula is not known, so these choices and the default are ours.

    Args:
        normalization: one of NORMALIZATIONS.
        levels: number of levels.
        momentum: share of the energy of the batches before in the average of `running`.
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

    def measure(self, teacher: Tensor) -> Tensor:
        """Return the statistic of the teacher's feature map (N,...) of a batch that its weight depends on, a scalar."""
        if self.normalization == "none":
            return torch.ones((), device=teacher.device)
        if self.normalization == "teacher_norm":
            return teacher.flatten(1).norm(dim=1).mean()
        return teacher.square().mean()

    def forward(self, level: int, statistic: Tensor) -> Tensor:
        """Return the weight of a level, a scalar, for what `measure` returns for this rank's samples of a batch."""
        assert statistic.ndim == 0, "what `measure` returns, not a feature map"
        if self.normalization == "none":
            return statistic
        mean = mean_over_ranks({"statistic": statistic})["statistic"]
        return 1 / (self.update_running(level, mean) if self.normalization == "running" else mean)

    def weigh_samples(self, level: int, teacher: Sequence[Tensor]) -> Tensor:
        """Return one weight per sample, (N,), for the teacher's feature maps of N samples, each (tokens,C).

        With `running` all samples have the same weight, from the mean energy of all samples on all ranks.
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
        return (1 / self.update_running(level, means["energy"] / means["count"])).expand(len(teacher))

    def update_running(self, level: int, energy: Tensor) -> Tensor:
        """Return the running average of a level's energy after a batch of this energy, and keep it."""
        before = self.energy[level]
        energy = torch.where(before == 0, energy, self.momentum * before + (1 - self.momentum) * energy)
        self.energy[level] = energy.detach()
        return energy
