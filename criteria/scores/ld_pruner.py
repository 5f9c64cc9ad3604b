"""LD-Pruner: how far the statistics of generated latents move without one operator (arXiv 2404.11936)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from criteria.base import Batch, Criterion, Level, Needs, Scores, Unit, parse_level, zeros
from criteria.protocols import Generative
from criteria.scores.shared.generation import Generation, check_seeds, explain_no_samples

DIVERGED = 10.0
"""The score of a unit whose removal makes latents not finite, in multiples of the largest finite score (ours)."""


class LDPruner(Criterion[Generative]):
    """s_i = || mean(z) - mean(z_i) ||_2 + || std(z) - std(z_i) ||_2 over sets z, z_i of latents from the same seeds.

    z_i is generated with unit i removed; mean and standard deviation are taken element by element over the set. Ours:
    the unsquared norms (summaries of the paper disagree; see `squared`), the population's standard deviation (as in
    Hybrid-SD's reimplementation, which takes 50 seeds; the paper's count is unknown), and the score of a unit whose
    removal makes some latent not finite: DIVERGED times the largest finite score (and 1 in the column `diverged`),
    since every score must be finite and no other unit may be worse.

    Args:
        sampler: makes the diffusers scheduler that generates.
        steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 is none.
        level: operator, as in the paper, or depth.
        seeds: how many samples are generated per unit.
        squared: whether each of the two norms is squared.
    """

    needs = Needs.SEEDS

    def __init__(
        self,
        sampler: Callable[..., Any],
        steps: int,
        guidance: float = 1.0,
        level: str = "operator",
        seeds: int = 50,
        squared: bool = False,
    ) -> None:
        self.level = parse_level(level, [Level.DEPTH, Level.OPERATOR])
        self.seeds, self.squared = check_seeds(seeds), squared
        self.generation = Generation(sampler, steps, guidance)

    def supports(self, backbone: Generative) -> str | None:
        """Return why a network cannot be scored, or None. Networks that generate no samples cannot."""
        return explain_no_samples(backbone) or super().supports(backbone)

    def start(self, backbone: Generative, units: Sequence[Unit], seed: int) -> None:
        """Begin with zeros; the first batch adds "sum" and "square", (1 + units, elements), the dense network first."""
        super().start(backbone, units, seed)
        self.states = {"count": zeros(1), "diverged": zeros(len(self.units))}

    def update(self, batch: Batch) -> None:
        dense = self.generation.generate(self.backbone, batch)
        self.states["count"] += len(dense)
        self.add(0, dense)
        for i, unit in enumerate(self.units):
            latents = self.generation.generate_without(self.backbone, batch, unit.name)
            if latents is None:
                self.states["diverged"][i] += 1
            else:
                self.add(1 + i, latents)

    def add(self, row: int, latents: Tensor) -> None:
        """Add the latents of the dense network (row 0), or of the network without unit i (row 1 + i), to the sums."""
        latents_NE = latents.detach().double().cpu().flatten(1)
        for key, value_E in {"sum": latents_NE.sum(0), "square": latents_NE.square().sum(0)}.items():
            if key not in self.states:
                self.states[key] = torch.zeros(1 + len(self.units), len(value_E), dtype=torch.float64)
            self.states[key][row] += value_E

    def compute(self) -> Scores:
        mean = self.states["sum"] / self.states["count"]
        std = (self.states["square"] / self.states["count"] - mean.square()).clamp_min(0).sqrt()
        power = 2 if self.squared else 1
        score = sum((s[1:] - s[0]).norm(dim=1) ** power for s in (mean, std))
        assert isinstance(score, Tensor)
        diverged = self.states["diverged"] > 0
        largest = float(score[~diverged].max()) if not diverged.all() else 0.0
        return self.table(score=score.where(~diverged, DIVERGED * (largest or 1.0)), diverged=diverged)
