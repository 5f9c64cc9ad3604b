"""A uniformly random order of the units: what every criterion has to beat."""

import torch

from criteria.base import Criterion, check_level
from datamodules.seeding import torch_rng


class Random(Criterion):
    """Uniform scores from `seed`; taken in their order (`selection=ranked`) they are a random order of the units.

    A report averages over several seeds: criterion.seed=0,1,2.
    """

    needs = "nothing"

    def __init__(self, seed: int = 0, level: str = "depth") -> None:
        self.order_seed, self.level = seed, check_level(level)

    def compute(self) -> dict[str, dict[str, float]]:
        rng = torch_rng(self.order_seed, "random criterion")
        return self.table(score=torch.rand(len(self.units), generator=rng, dtype=torch.float64))
