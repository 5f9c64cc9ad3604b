"""Channels by one global threshold on their scores, at a cost that is not the sum over them."""

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from criteria.selection.base import Budget, Budgeted, Measure, Pool, group

NEAR = 50_000
"""How near to a target AutoBot's bisection stops, in FLOPs; for parameters 0.001 of the whole network's (ours)."""


@dataclass
class Threshold(Budgeted):
    """Removes all channels up to one global threshold on the score (AutoBot, arXiv 2111.09635).

    Units whose names agree up to the ':' are a group (in the paper: a layer), and the unit with the highest score of
    each group stays (the last of several). The cost of a set is not the sum over its units, so the threshold is
    bisected over the scores with the pool's exact `cost`.

    With a `ratio` the cost lies in the window that all selections share: where units with equal scores would overshoot
    it, they are removed one by one in the order of the forward pass (our choice). With a `target` the set is the one
    nearest to it, on either side, among all that a threshold gives (equal scores count in the order of the forward
    pass; of two sets equally near, the one that leaves the smaller network). AutoBot bisects until it is within 50,000
    FLOPs; where no set is that near, the unit whose step is so large is printed. `tolerance` is then not used.
    """

    choice: ClassVar[str] = "threshold"
    """the file of conf/selection/ that makes this selection"""

    def check_untimed(self, pool: Pool) -> None:
        super().check_untimed(pool)
        raise for_channels_only(self.choice)

    def check_budget(self, pool: Pool) -> None:
        """Raise an error for settings that this pool cannot satisfy.

        ValueError: the units are not channels, the target is out of range, or a protected unit is unknown.
        InfeasibleBudget: all removable units together free too little. Errors of `pool.cost` are passed on, such as
        that for networks whose layers must keep equal widths.
        """
        least = self.least_removed(pool)
        order = self.order(pool, dict.fromkeys((unit.name for unit in pool.units), 0.0))
        if pool.cost is None:
            raise for_channels_only(self.choice)
        pool.cost([pool.units[0].name], self.budget)
        most = pool.cost(order, self.budget) if order else 0
        if most < least:
            raise self.infeasible(pool, most, most, None)

    def select(self, pool: Pool, scores: Mapping[str, float], measure: Measure | None = None) -> list[str]:
        order, cost = self.order(pool, scores), pool.cost
        if cost is None:
            raise for_channels_only(self.choice)

        @functools.cache
        def freed(count: int) -> int:
            return cost(order[:count], self.budget) if count else 0

        if self.target is None:
            # Where a threshold can lie: behind the last unit of each score.
            ends = [i for i in range(1, len(order) + 1) if i == len(order) or scores[order[i]] > scores[order[i - 1]]]
            count = self.count_in_window(pool, ends, freed)
        else:
            count = self.count_nearest(pool, order, freed)
        removed = set(order[:count])
        return [unit.name for unit in pool.units if unit.name in removed]

    def count_in_window(self, pool: Pool, ends: Sequence[int], freed: Callable[[int], int]) -> int:
        """Return how many units to remove, in the order of their scores: the smallest number that meets the budget.

        Units of equal score are removed together if the window allows. `ends`: for each distinct score, the number of
        units with that score or a lower one. `freed(n)`: the cost that the first n units free.
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

    def count_nearest(self, pool: Pool, order: Sequence[str], freed: Callable[[int], int]) -> int:
        """Return the number of units whose removal leaves the cost that is nearest to the target."""
        least, most = self.least_removed(pool), freed(len(order))
        above = bisect_left(range(len(order) + 1), math.ceil(least), key=freed)
        if above > len(order):
            raise self.infeasible(pool, most, most, None)
        count = above if freed(above) - least <= least - freed(above - 1) else above - 1
        near = pool.total(self.budget) / 1000 if self.budget == Budget.PARAMS else NEAR
        if abs(freed(count) - least) > near:
            name = order[above - 1]
            print(
                f"{pool.total(self.budget) - freed(count):,} {self.budget} are left: the nearest to selection.target="
                f"{self.target:,.0f} that a threshold gives, as {name} alone frees {freed(above) - freed(above - 1):,}"
            )
        return count

    def order(self, pool: Pool, scores: Mapping[str, float]) -> list[str]:
        """Return the removable units, the lowest score first, equal scores in the order of the forward pass."""
        protected = set(self.protected_units(pool.units))
        protected_groups = {group(name) for name in protected}
        names = sorted((unit.name for unit in pool.units), key=scores.__getitem__)
        last = {group(name): name for name in names}  # of each group, the unit with the highest score
        return [n for n in names if n not in protected and (last[group(n)] != n or group(n) in protected_groups)]


def for_channels_only(choice: str) -> ValueError:
    """Return the error for units that are no channels; `choice` is the selection's name."""
    return ValueError(
        f"selection.name={choice!r} is for channels; for blocks and operators choose one of: knapsack, "
        "refined, greedy, ranked, given"
    )
