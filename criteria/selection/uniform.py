"""Equally many heads and channels of every layer, for networks that have one width for all layers."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from criteria.base import Unit
from criteria.selection.base import Budgeted, Measure, Pool, group


@dataclass(frozen=True)
class Kind:
    """The units of one kind, all with the same cost."""

    groups: list[list[Unit]]
    """the units of each layer, equally many in each"""
    removable: list[list[Unit]]
    """the unprotected ones among them"""
    cost: int
    """what one unit of every group frees together"""

    @property
    def size(self) -> int:
        """The number of units per group."""
        return len(self.groups[0])

    @property
    def most(self) -> int:
        """The number of units that every group can lose: one of each stays."""
        return min(self.size - 1, *(len(units) for units in self.removable))


@dataclass
class Uniform(Budgeted):
    """Removes equally many units, those with the lowest scores, from every group of one kind.

    Kinds are heads and feed-forward channels; units whose names agree up to the ':' are a group (one layer's). For each
    count of the other kinds, the kind with the most units per group loses as few as meet the budget: of a network with
    three key-value heads per layer, no head, a third or two thirds of the heads are removed, and the feed-forwards make
    up the rest. The counts whose fractions of their kinds are closest together are taken, then those that overshoot
    least. Only units of one group are compared, so that scores need no common scale. Protected units stay, and their
    groups lose other units.
    """

    def check_untimed(self, pool: Pool) -> None:
        super().check_untimed(pool)
        raise not_uniform()

    def check_budget(self, pool: Pool) -> None:
        """Raise InfeasibleBudget, or ValueError where groups differ or the network cannot be so narrow."""
        self.counts(pool)

    def select(self, pool: Pool, scores: Mapping[str, float], measure: Measure | None = None) -> list[str]:
        removed = {
            unit.name
            for kind, count in zip(self.kinds(pool), self.counts(pool), strict=True)
            for units in kind.removable
            for unit in sorted(units, key=lambda unit: scores[unit.name])[:count]
        }
        return [unit.name for unit in pool.units if unit.name in removed]

    def kinds(self, pool: Pool) -> list[Kind]:
        """Return the kinds of units, the one with the most units per group last."""
        pool.total(self.budget)
        protected = set(self.protected_units(pool.units))
        by_kind: dict[str, dict[str, list[Unit]]] = {}
        for unit in pool.units:
            by_kind.setdefault(unit.kind, {}).setdefault(group(unit.name), []).append(unit)
        kinds = []
        for by_group in by_kind.values():
            groups = list(by_group.values())
            costs = {(len(units), pool.freed(unit, self.budget)) for units in groups for unit in units}
            if pool.cost is None or len(costs) > 1:
                raise not_uniform()
            ((_, cost),) = costs
            removable = [[unit for unit in units if unit.name not in protected] for units in groups]
            kinds.append(Kind(groups, removable, cost * len(groups)))
        return sorted(kinds, key=lambda kind: kind.size)

    def counts(self, pool: Pool) -> tuple[int, ...]:
        """Return the number of units that each group loses, per kind."""
        kinds, (low, high) = self.kinds(pool), self.window(pool)

        def spent(counts: tuple[int, ...]) -> int:
            return sum(count * kind.cost for count, kind in zip(counts, kinds, strict=True))

        def unevenness(counts: tuple[int, ...]) -> float:
            fractions = [count / kind.size for count, kind in zip(counts, kinds, strict=True)]
            return max(fractions) - min(fractions)

        most, reaching = kinds[-1].most, list(least_counts(kinds, low))
        fitting = [counts for counts in reaching if counts[-1] <= most and spent(counts) <= high]
        if not fitting:
            everything = spent(tuple(kind.most for kind in kinds))
            below = max(spent((*coarse, min(fine - 1, most))) for *coarse, fine in reaching if fine > 0)
            above = min((spent(counts) for counts in reaching if counts[-1] <= most), default=None)
            raise self.infeasible(pool, everything, below, above)
        best = min(fitting, key=lambda counts: (unevenness(counts), spent(counts)))
        units = [
            unit.name for kind, n in zip(kinds, best, strict=True) for layer in kind.removable for unit in layer[:n]
        ]
        if pool.cost is None or pool.cost(units, self.budget) != spent(best):
            raise not_uniform()
        return best


def least_counts(kinds: list[Kind], low: int) -> Iterator[tuple[int, ...]]:
    """For every combination of counts of the other kinds, yield it with the smallest count of the last kind.

    It is the smallest that frees at least `low`; it may exceed what the last kind has.
    """
    *others, last = kinds
    for counts in itertools.product(*(range(kind.most + 1) for kind in others)):
        spent = sum(count * kind.cost for count, kind in zip(counts, others, strict=True))
        yield (*counts, max(-((spent - low) // last.cost), 0))


def not_uniform() -> ValueError:
    """Return the error for units that are not those of a network with equal layers."""
    return ValueError(
        "selection.name='uniform' is for the heads and channels of language models, whose layers are alike "
        "(criterion.level=channel); choose threshold for channels of other networks, knapsack for blocks"
    )
