"""Weights of the levels in feature distillation."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_modules.training.ranks import mean_over_ranks

NORMALIZATIONS = ("teacher_energy", "teacher_norm", "running", "initial_error", "none")

FLOOR = 0.01
"""Share of the distance of the teacher's maps from zeros that `initial_error` adds to the error of a level; ours."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""Distance of a student's map from a teacher's, a scalar."""


class LevelWeights(nn.Module):
    """Computes the weights alpha_l in sum_l alpha_l * d(f_S_l, f_T_l) from the feature maps f_S_l and f_T_l.

    `none`: 1, as in BK-SDM (arXiv 2305.15798). The few largest feature maps dominate the sum.
    `teacher_energy`: 1 / mean(f_T_l^2) over the global batch. Each term is then a relative squared error.
    `running`: like teacher_energy, with the energy averaged over batches, so that a single batch changes it little.
    `teacher_norm`: 1 / mean over samples of ||f_T_l||_2.
    `initial_error`: 1 / (d(f_S_l, f_T_l) + FLOOR * d(0, f_T_l)) of the first global batch. All levels then begin with a
    term of about 1, except those where the student hardly differs from the teacher, whose weight the floor bounds.

    LAPTOP-Diff (arXiv 2404.11098) weights "based on the L2-norms of the teacher's feature maps, ensuring that all
    feature loss terms are treated equally". Its exact formula is not known, so these choices and the default are ours.

    What is kept over batches is a buffer, so that a resumed training goes on with it.

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
        """{level: what is kept of it}, (levels,); 0 before the first batch"""
        self.register_buffer("energy", torch.zeros(levels))

    def measure(self, teacher: Tensor, error: Tensor, distance: Distance) -> Tensor:
        """Return the statistic of a batch that a level's weight depends on, a scalar.

        Args:
            teacher: the teacher's feature map, (N,...).
            error: the distance of the student's map from it.
            distance: the function that computed `error`.
        """
        if self.normalization == "none":
            return torch.ones((), device=teacher.device)
        if self.normalization == "teacher_norm":
            return teacher.flatten(1).norm(dim=1).mean()
        if self.normalization == "initial_error":
            return error.detach() + FLOOR * distance(torch.zeros_like(teacher), teacher)
        return teacher.square().mean()

    def forward(self, level: int, statistic: Tensor) -> Tensor:
        """Return the weight of a level, a scalar, for what `measure` returns for this rank's samples of a batch."""
        assert statistic.ndim == 0, "what `measure` returns, not a feature map"
        if self.normalization == "none":
            return statistic
        return 1 / self.keep(level, mean_over_ranks({"statistic": statistic})["statistic"])

    def weigh_samples(self, level: int, teacher: Sequence[Tensor], errors_N: Tensor, distance: Distance) -> Tensor:
        """Return one weight per sample, (N,), for the teacher's feature maps of N samples, each (tokens,C).

        With `running` and `initial_error` all samples have the same weight, from the mean over all samples on all
        ranks.

        Args:
            level: index of the level.
            teacher: the teacher's feature maps.
            errors_N: the distances of the student's maps from them.
            distance: the function that computed the errors.
        """
        if self.normalization == "none":
            return torch.ones(len(teacher), device=self.energy.device)
        if self.normalization == "teacher_norm":
            return torch.stack([1 / part.norm() for part in teacher]) if teacher else self.energy[:0]
        measured = [self.measure(part, error, distance) for part, error in zip(teacher, errors_N, strict=True)]
        statistics_N = torch.stack(measured) if teacher else self.energy[:0]
        if self.normalization == "teacher_energy":
            return 1 / statistics_N
        count = torch.tensor(float(len(teacher)), device=statistics_N.device)
        means = mean_over_ranks({"statistic": statistics_N.sum(), "count": count})
        if not means["count"]:
            return statistics_N
        return (1 / self.keep(level, means["statistic"] / means["count"])).expand(len(teacher))

    def keep(self, level: int, statistic: Tensor) -> Tensor:
        """Return the statistic that a level's weight is made of, given that of the newest batch.

        With `running` it is the running average, with `initial_error` the first batch's; both are kept.
        """
        if self.normalization not in ("running", "initial_error"):
            return statistic
        before = self.energy[level]
        later = before
        if self.normalization == "running":
            later = self.momentum * before + (1 - self.momentum) * statistic
        kept = torch.where(before == 0, statistic, later)
        self.energy[level] = kept.detach()
        return kept
