"""The whole front of one scoring: every plan that no other plan beats both in harm and in removed cost.

The plans come from one dynamic program over the units, that of Nemhauser and Ullmann (1969) for the knapsack: a list of
sets of units, extended by one unit after another, from which every beaten set is dropped at once.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from criteria.selection.base import Budget, Pool
from criteria.selection.solver import Program, total_harm

WORD = 64
"""Bits per word of the masks that hold the removed units of a set."""


@dataclass(frozen=True)
class FrontPlan:
    """A plan of the front: no other set of units removes as much at less harm, or more at as much harm."""

    units: list[str]
    """the units to remove, in the order of the forward pass"""
    harm: float
    """the sum of their scores"""
    removed: int
    """what they free of the budget: whole parameters, MACs or microseconds"""
    ratio: float
    """the same as a fraction of the whole network"""


def find_front(
    pool: Pool, scores: Mapping[str, float], budget: str = Budget.PARAMS, protected: Collection[str] = ()
) -> list[FrontPlan]:
    """Return all plans of the front, the one that removes least first; the empty plan is left out.

    A knapsack with a ratio up to that of a plan, and above that of the plan before it, chooses this plan, or one of
    equal harm.

    Args:
        pool: the units, with costs that add up over them.
        scores: the harm of removing each unit.
        budget: params | macs | latency; the latter is the sum of what single units save.
        protected: names of units that stay.
    """
    removable = [unit.name for unit in pool.units if unit.name not in protected]
    program = pool.program(budget).remaining(
        set(), [i for i, unit in enumerate(pool.units) if unit.name not in protected]
    )
    harms, total = [scores[name] for name in removable], pool.total(budget)
    plans = [(program.cost(chosen), total_harm(harms, chosen), chosen) for chosen in find_front_sets(program, harms)]
    return [
        FrontPlan([removable[i] for i in chosen], harm, cost, cost / total) for cost, harm, chosen in plans if cost > 0
    ]


@dataclass(frozen=True)
class States:
    """Sets of units by what they cost and how much harm they do, one per row."""

    costs: np.ndarray
    """(N,) int64"""
    harms: np.ndarray
    """(N,) float64"""
    masks: np.ndarray
    """(N,W) uint64: bit i of a row is set if unit i is removed"""

    def add(self, unit: int, cost: int, harm: float) -> "States":
        """Return the same sets with one more unit."""
        masks = self.masks.copy()
        masks[:, unit // WORD] |= np.uint64(1 << unit % WORD)
        return States(self.costs + cost, self.harms + harm, masks)


def find_front_sets(program: Program, scores: Sequence[float]) -> list[list[int]]:
    """Return the sets of the front as indices of units, the one of the least cost first.

    As in `enumerate_costs`, one list is kept for each combination of units that are now excluded and shared parts that
    can no longer be freed: within it, a set that costs no more and does no less harm than another can be dropped,
    whatever is decided later.
    """
    count = len(program.costs)
    words = -(-count // WORD)
    start = States(np.zeros(1, np.int64), np.zeros(1), np.zeros((1, words), np.uint64))
    cases = {frozenset[int](): start}
    for i in range(count):
        parts = [(count + s, max(units), cost) for s, (units, cost) in enumerate(program.shared) if i in units]
        later = {j for j in program.exclusive_by_unit.get(i, ()) if j > i}
        over = {i, *(part for part, last, _ in parts if last == i)}
        after: dict[frozenset[int], list[States]] = defaultdict(list)
        for closed, states in cases.items():
            after[(closed | {part for part, *_ in parts}) - over].append(states)
            if i not in closed:
                freed = program.costs[i] + sum(cost for part, last, cost in parts if last == i and part not in closed)
                after[(closed | later) - over].append(states.add(i, freed, scores[i]))
        cases = {closed: drop_beaten(lists) for closed, lists in after.items()}
    (front,) = cases.values()
    return [[i for i in range(count) if int(mask[i // WORD]) >> i % WORD & 1] for mask in front.masks]


def drop_beaten(lists: Sequence[States]) -> States:
    """Return the sets of some lists that no other one beats, the one of the least cost first.

    Of sets that are equal in both, the first is kept.
    """
    costs = np.concatenate([states.costs for states in lists])
    harms = np.concatenate([states.harms for states in lists])
    order = np.lexsort((harms, -costs))  # the costliest first, at equal cost the least harm
    least = np.minimum.accumulate(harms[order])
    better = np.concatenate([[True], harms[order][1:] < least[:-1]])
    kept = order[better][::-1]
    masks = np.concatenate([states.masks for states in lists])
    return States(costs[kept], harms[kept], masks[kept])
