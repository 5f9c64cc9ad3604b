"""Small problems of choosing units under a budget, of which every subset can be looked at."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from hypothesis import strategies as st

from criteria.base import Shared, Unit
from criteria.selection.base import Budgeted, InfeasibleBudget, Pool
from criteria.selection.solver import Program


@dataclass(frozen=True)
class Problem:
    """Units by cost and score, and a budget in 64ths, which floating point holds exactly.

    `shared`: the places of units, and the cost that goes with all of them. `inside`: (a unit, the one it is in).
    """

    costs: Sequence[int]
    scores: Sequence[float]
    total: int
    ratio: float
    tolerance: float
    shared: Sequence[tuple[frozenset[int], int]] = ()
    inside: Sequence[tuple[int, int]] = ()

    @property
    def pool(self) -> Pool:
        parents = {child: f"unit{parent}" for child, parent in self.inside}
        units = [Unit(f"unit{i}", "resnet", cost, 0, inside=parents.get(i)) for i, cost in enumerate(self.costs)]
        parts = [
            Shared(f"part{i}", tuple(f"unit{j}" for j in sorted(places)), cost, 0)
            for i, (places, cost) in enumerate(self.shared)
        ]
        return Pool(units, {"params": self.total}, parts)

    @property
    def program(self) -> Program:
        return Program(self.costs, self.shared, self.inside)

    @property
    def named_scores(self) -> dict[str, float]:
        return {f"unit{i}": score for i, score in enumerate(self.scores)}

    def fits(self, spent: int) -> bool:
        return window_holds(self.ratio, self.tolerance, spent, self.total)

    def allowed(self) -> list[tuple[int, ...]]:
        """Every subset that does not hold both a unit and the one it is in, as places in order."""
        places = range(len(self.costs))
        every = itertools.chain.from_iterable(itertools.combinations(places, n) for n in range(len(self.costs) + 1))
        return [chosen for chosen in every if not any({*pair} <= {*chosen} for pair in self.inside)]

    def subsets(self) -> list[tuple[int, ...]]:
        """Those of them that fit the budget."""
        return [chosen for chosen in self.allowed() if self.fits(self.spent(chosen))]

    def spent(self, chosen: Sequence[int]) -> int:
        gone = [cost for places, cost in self.shared if all(i in chosen for i in places)]
        return sum(self.costs[i] for i in chosen) + sum(gone)

    def harm(self, chosen: Sequence[int]) -> float:
        return math.fsum(self.scores[i] for i in chosen)

    def solved(self, way: type[Budgeted], **changed: float) -> tuple[int, ...] | None:
        """The places of the chosen units, None where the budget was called infeasible."""
        budget = {"ratio": self.ratio, "tolerance": self.tolerance} | changed
        try:
            names = way(**budget).select(self.pool, self.named_scores)
        except InfeasibleBudget:
            return None
        return tuple(int(name.removeprefix("unit")) for name in names)


def window_holds(ratio: float, tolerance: float, spent: int, total: int) -> bool:
    """ratio <= spent / total <= ratio + tolerance, for the decimal numbers that a person wrote."""
    low, width = Fraction(str(ratio)), Fraction(str(tolerance))
    return low * total <= spent <= (low + width) * total


SIGNED_WHOLE = st.integers(-4, 4).map(float)
TIES = st.sampled_from([0.0, 1.0, 2.0])
UNIT = st.integers(-(2**20), 2**20).map(lambda n: n / 2**20)
DECADES = st.floats(-9, 3).map(lambda power: 10**power)
SIGNED_DECADES = st.tuples(st.sampled_from([1, -1]), st.floats(-6, 1)).map(lambda pair: pair[0] * 10 ** pair[1])
ZERO = st.just(0.0)


@st.composite
def problems(draw: st.DrawFn, largest: Sequence[int] = (4, 1_000, 10**7, 10**10)) -> Problem:
    """Up to nine units; in half of the problems some of them are inside another, or share a part."""
    count = draw(st.integers(1, 9))
    cost = st.integers(1, draw(st.sampled_from(largest)))
    score = draw(st.sampled_from([SIGNED_WHOLE, TIES, UNIT, DECADES, SIGNED_DECADES, ZERO]))
    costs = draw(st.lists(cost, min_size=count, max_size=count))
    scores = draw(st.lists(score, min_size=count, max_size=count))
    shared: list[tuple[frozenset[int], int]] = []
    inside: list[tuple[int, int]] = []
    if draw(st.booleans()):
        place = st.integers(0, count - 1)
        shared = draw(st.lists(st.tuples(st.frozensets(place, min_size=1, max_size=4), cost), max_size=3))
        pairs = st.tuples(place, place).filter(lambda pair: pair[0] != pair[1])
        if count > 1:
            inside = draw(st.lists(pairs, max_size=3, unique_by=lambda pair: pair[0]))
    every = sum(costs) + sum(part for _, part in shared)
    total = every + draw(st.integers(0, every))
    ratio, tolerance = draw(st.integers(1, 63)) / 64, draw(st.sampled_from([0, 1, 4, 16, 32])) / 64
    return Problem(costs, scores, total, ratio, tolerance, shared, inside)
