"""Channels by one global threshold on their scores, at a cost that is not the sum over them."""

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from criteria.selection.base import Budgeted, Measure, Pool, group

NEAR = 50_000
"""How near to a target AutoBot's bisection stops, in FLOPs; for parameters 0.001 of the whole network's (ours)."""


@dataclass
class Threshold(Budgeted):
    """Channels by one global threshold: every unit of this score or less goes (AutoBot, arXiv 2111.09635).

    A group is what stands before the ':' of a unit's name (the paper: a layer), and its unit of the highest score stays
    (the last one where several have it). What a set frees is not the sum over its units, so the threshold is bisected
    over the scores that there are with the pool's exact `cost`.

    With a `ratio` the set lies in the window of every budget: where the scores that lie at one threshold jump over it,
    they go one by one in the order of the forward pass (our choice). With a `target` the set is the one nearest to it,
    on either side, among all that a threshold gives (scores that are equal count in the order of the forward pass; of
    two that are equally near the smaller network); AutoBot bisects until it is within 50,000 FLOPs, and where no set is
    that near, it is printed which unit's step is so large. `tolerance` has no say in it.
    """

    def check(self, pool: Pool) -> None:
        """Raises ValueError for a pool that is not of channels, a target out of range and an unknown protected unit.

        InfeasibleBudget where all that may go is too little (units of a group free alike). Also what the pool's `cost`
        raises for a single unit, where layers can only lose alike.
        """
        if self.needs_savings:
            self.check_untimed(pool)
        least = self.least(pool)
        order = self.order(pool, dict.fromkeys((unit.name for unit in pool.units), 0.0))
        if pool.cost is None:
            raise ValueError(
                "selection.name='threshold' is for channels; for blocks and operators choose one of: knapsack, "
                "refined, greedy, ranked, given"
            )
        pool.cost([pool.units[0].name], self.budget)  # raises for networks whose layers have to lose alike
        most = pool.cost(order, self.budget) if order else 0
        if most < least:
            raise self.infeasible(pool, most, most, None)

    def select(self, pool: Pool, scores: Mapping[str, float], measure: Measure | None = None) -> list[str]:
        self.check(pool)
        order, cost = self.order(pool, scores), pool.cost
        assert cost is not None

        @functools.cache
        def freed(count: int) -> int:
            return cost(order[:count], self.budget) if count else 0

        if self.target is None:
            # Where a threshold can lie: behind the last unit of each score.
            ends = [i for i in range(1, len(order) + 1) if i == len(order) or scores[order[i]] > scores[order[i - 1]]]
            count = self.in_window(pool, ends, freed)
        else:
            count = self.nearest(pool, order, freed)
        gone = set(order[:count])
        return [unit.name for unit in pool.units if unit.name in gone]

    def in_window(self, pool: Pool, ends: Sequence[int], freed: Callable[[int], int]) -> int:
        """How many units go: as few as free what the budget asks for, the units of one score together where they can.

        `ends`: the numbers of units of each score or less.
        """
        low, high = self.window(pool)
        tie = bisect_left(ends, low, key=freed)
        most = freed(ends[-1]) if ends else 0
        if tie == len(ends):
            raise self.infeasible(pool, most, most, None)
        count = ends[tie]
        if freed(count) > high:
            start = ends[tie - 1] if tie else 0
            count = bisect_left(range(count), low, lo=start, key=freed)
        if freed(count) > high:
            raise self.infeasible(pool, most, freed(count - 1), freed(count))
        return count

    def nearest(self, pool: Pool, order: Sequence[str], freed: Callable[[int], int]) -> int:
        """How many units go so that what is left is nearest to the target."""
        least, most = self.least(pool), freed(len(order))
        above = bisect_left(range(len(order) + 1), math.ceil(least), key=freed)
        if above > len(order):
            raise self.infeasible(pool, most, most, None)
        count = above if freed(above) - least <= least - freed(above - 1) else above - 1
        near = pool.total(self.budget) / 1000 if self.budget == "params" else NEAR
        if abs(freed(count) - least) > near:
            name = order[above - 1]
            print(
                f"{pool.total(self.budget) - freed(count):,} {self.budget} are left: the nearest to selection.target="
                f"{self.target:,.0f} that a threshold gives, as {name} alone frees {freed(above) - freed(above - 1):,}"
            )
        return count

    def order(self, pool: Pool, scores: Mapping[str, float]) -> list[str]:
        """The units that may go, the lowest score first, then in the order of the forward pass."""
        protected = set(self.protected_units(pool.units))
        staying = {group(name) for name in protected}
        names = sorted((unit.name for unit in pool.units), key=scores.__getitem__)
        last = {group(name): name for name in names}  # of each group, the one of the highest score
        return [n for n in names if n not in protected and (last[group(n)] != n or group(n) in staying)]
