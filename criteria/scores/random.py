"""A uniformly random order of the units, which every criterion has to beat."""

import torch

from criteria.base import Backbone, Criterion, Needs, Scores, parse_level
from datamodules.seeding import torch_rng


class Random(Criterion[Backbone]):
    """Uniform scores from `seed`, which are an order of the units and no harms: `selection=ranked` takes them as one.

    Average over several seeds: criterion.seed=0,1,2.
    """

    needs = Needs.NOTHING

    def __init__(self, seed: int = 0, level: str = "depth") -> None:
        self.order_seed, self.level = seed, parse_level(level)

    def compute(self) -> Scores:
        rng = torch_rng(self.order_seed, "random criterion")
        return self.table(score=torch.rand(len(self.units), generator=rng, dtype=torch.float64))
