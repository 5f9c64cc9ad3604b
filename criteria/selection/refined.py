"""The knapsack's plan, refined by swaps whose joint loss is measured: summed scores only predict that loss."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from criteria.selection.base import Measure, Pool
from criteria.selection.measured import MeasuredKnapsack
from criteria.selection.solver import Limit, Program, total_harm


@dataclass
class Refined(MeasuredKnapsack):
    """Local search that starts at the knapsack's plan (our choice, no paper's).

    A step tries swaps within the budget, the one with the least predicted harm first, and takes the first that lowers
    the measured joint loss. The result never has a higher measured loss than the knapsack's plan.

    `evaluations`: how many plans may be measured, the knapsack's included.
    """

    def select(self, pool: Pool, scores: Mapping[str, float], measure: Measure | None = None) -> list[str]:
        """Return the names of the units to remove, in the order of the forward pass.

        Raises InfeasibleBudget as Knapsack does, and ValueError without a `measure`.
        """
        measure = self.require_measure(measure, "plans")
        names = [unit.name for unit in self.removable_units(pool)]
        limits = list(self.limits(pool).values())
        best = frozenset(names.index(name) for name in super().select(pool, scores))
        harms = [scores[name] for name in names]

        def names_of(chosen: frozenset[int]) -> list[str]:
            return [names[i] for i in sorted(chosen)]

        least_loss = measure(names_of(best))
        measured, improved = {best}, True
        while improved and len(measured) < self.evaluations:
            improved = False
            for plan in neighbours(limits, harms, best):
                if plan in measured:
                    continue
                measured.add(plan)
                loss = measure(names_of(plan))
                if loss < least_loss:
                    best, least_loss, improved = plan, loss, True
                if improved or len(measured) == self.evaluations:
                    break
        return names_of(best)


def neighbours(limits: Sequence[Limit], scores: Sequence[float], chosen: frozenset[int]) -> list[frozenset[int]]:
    """Return the sets one swap away that keep to the limits, the least summed score first.

    A swap exchanges one unit for one. A unit for which the limits allow no such swap takes part in swaps of two units
    for one and of one for two.
    """
    inside, outside = sorted(chosen), [i for i in range(len(scores)) if i not in chosen]
    exchanges = list(swaps(limits, chosen, subsets(inside, 1), subsets(outside, 1)))
    stuck = {*inside, *outside}.difference(*(out | into for out, into in exchanges))
    for leaving, entering in ((1, 2), (2, 1)):
        stuck_leave = swaps(limits, chosen, subsets(inside, leaving, stuck), subsets(outside, entering))
        stuck_enter = swaps(limits, chosen, subsets(inside, leaving), subsets(outside, entering, stuck))
        exchanges += [*stuck_leave, *stuck_enter]
    exchanges.sort(key=lambda swap: (total_harm(scores, swap[1]) - total_harm(scores, swap[0]), *map(sorted, swap)))
    return [chosen - out | into for out, into in exchanges]


def subsets(units: Sequence[int], count: int, among: Collection[int] | None = None) -> list[frozenset[int]]:
    """Return all subsets of `count` units; with `among`, only those that contain at least one of these."""
    every = map(frozenset, combinations(units, count))
    return [subset for subset in every if among is None or not subset.isdisjoint(among)]


def swaps(
    limits: Sequence[Limit],
    chosen: frozenset[int],
    leaving: Sequence[frozenset[int]],
    entering: Sequence[frozenset[int]],
) -> Iterator[tuple[frozenset[int], frozenset[int]]]:
    """Yield the pairs (out, in) whose exchange is possible and keeps every cost in its window.

    `leaving` are subsets of `chosen`, the present set, that may be taken out; `entering` are sets of other units that
    may be put in.
    """
    for out in leaving if entering else ():
        rest = set(chosen - out)
        spent = [program.cost(rest) for program, _ in limits]
        for into in entering:
            more = [freed_by(program, rest, into) for program, _ in limits]
            if all(
                extra is not None and low <= cost + extra <= high
                for cost, extra, (_, (low, high)) in zip(spent, more, limits, strict=True)
            ):
                yield out, into


def freed_by(program: Program, removed: Collection[int], into: Collection[int]) -> int | None:
    """Return the cost freed by removing `into` after `removed`; None if these units cannot be removed together."""
    after, cost = set(removed), 0
    for i in into:
        if not program.allows(i, after):
            return None
        cost += program.marginal_cost(i, after)
        after.add(i)
    return cost
