"""Equally many heads and channels of every layer, for networks that have one width for all layers."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from criteria.base import Unit
from criteria.selection.base import Budgeted, Measure, Pool, group


@dataclass(frozen=True)
class Kind:
    """The units of one kind, all of the same cost."""

    groups: list[list[Unit]]
    """those of each layer, as many in each"""
    free: list[list[Unit]]
    """those of them that may go"""
    cost: int
    """what one unit of every group frees together"""

    @property
    def size(self) -> int:
        return len(self.groups[0])

    @property
    def most(self) -> int:
        """How many units every group can lose: one of each stays."""
        return min(self.size - 1, *(len(units) for units in self.free))


@dataclass
class Uniform(Budgeted):
    """Every group of channels of one kind (heads, feed-forward channels) loses equally many units, the lowest scores.

    A group is what stands before the ':' of a unit's name. Of the kind with the most units a group as few go as meet
    the budget, for each number of the others: of a network with three key-value heads a layer, no head, a third or two
    thirds of them go, and the feed-forwards make up the rest. Taken are those counts whose fractions of their kinds are
    closest together, then those that overshoot least. Only units of one group are compared, so that scores need no
    common scale. Protected units stay, and their groups lose others.
    """

    def check(self, pool: Pool) -> None:
        """Raises InfeasibleBudget, and ValueError where groups are not alike, or a network cannot be so narrow."""
        if self.needs_savings:
            self.check_untimed(pool)
        self.counts(pool)

    def select(self, pool: Pool, scores: Mapping[str, float], measure: Measure | None = None) -> list[str]:
        gone = {
            unit.name
            for kind, count in zip(self.kinds(pool), self.counts(pool), strict=True)
            for units in kind.free
            for unit in sorted(units, key=lambda unit: scores[unit.name])[:count]
        }
        return [unit.name for unit in pool.units if unit.name in gone]

    def kinds(self, pool: Pool) -> list[Kind]:
        """The kinds, the one with the most units a group last."""
        pool.total(self.budget)
        staying = set(self.protected_units(pool.units))
        found: dict[str, dict[str, list[Unit]]] = {}
        for unit in pool.units:
            found.setdefault(unit.kind, {}).setdefault(group(unit.name), []).append(unit)
        kinds = []
        for groups in found.values():
            units = list(groups.values())
            costs = {(len(some), pool.freed(unit, self.budget)) for some in units for unit in some}
            if pool.cost is None or len(costs) > 1:
                raise unlike()
            ((_, cost),) = costs
            free = [[unit for unit in some if unit.name not in staying] for some in units]
            kinds.append(Kind(units, free, cost * len(units)))
        return sorted(kinds, key=lambda kind: kind.size)

    def counts(self, pool: Pool) -> tuple[int, ...]:
        """How many units each group of each kind loses."""
        kinds, (low, high) = self.kinds(pool), self.window(pool)

        def spent(counts: tuple[int, ...]) -> int:
            return sum(count * kind.cost for count, kind in zip(counts, kinds, strict=True))

        def uneven(counts: tuple[int, ...]) -> float:
            fractions = [count / kind.size for count, kind in zip(counts, kinds, strict=True)]
            return max(fractions) - min(fractions)

        most, reaching = kinds[-1].most, list(least(kinds, low))
        met = [counts for counts in reaching if counts[-1] <= most and spent(counts) <= high]
        if not met:
            everything = spent(tuple(kind.most for kind in kinds))
            below = max(spent((*coarse, min(fine - 1, most))) for *coarse, fine in reaching if fine > 0)
            above = min((spent(counts) for counts in reaching if counts[-1] <= most), default=None)
            raise self.infeasible(pool, everything, below, above)
        best = min(met, key=lambda counts: (uneven(counts), spent(counts)))
        units = [unit.name for kind, n in zip(kinds, best, strict=True) for some in kind.free for unit in some[:n]]
        if pool.cost is None or pool.cost(units, self.budget) != spent(best):
            raise unlike()
        return best


def least(kinds: list[Kind], low: int) -> Iterator[tuple[int, ...]]:
    """For all counts of the other kinds, the fewest units of the last (perhaps too many) with which `low` is freed."""
    *others, last = kinds
    for counts in itertools.product(*(range(kind.most + 1) for kind in others)):
        spent = sum(count * kind.cost for count, kind in zip(counts, others, strict=True))
        yield (*counts, max(-((spent - low) // last.cost), 0))


def unlike() -> ValueError:
    return ValueError(
        "selection.name='uniform' is for the heads and channels of language models, whose layers are alike "
        "(criterion.level=channel); choose threshold for channels of other networks, knapsack for blocks"
    )
