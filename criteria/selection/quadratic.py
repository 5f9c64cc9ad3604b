"""The knapsack with measured interactions of pairs of units: the loss of a plan is more than the sum of its scores."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from criteria.selection.base import Measure, Pool
from criteria.selection.measured import MeasuredKnapsack
from criteria.selection.solver import Limit, solve

Pair = tuple[int, int]
"""Two units by index, the smaller index first."""


@dataclass
class Quadratic(MeasuredKnapsack):
    """Minimises sum_i s_i + sum_{i<j} w_ij over the removed units within the budget, exactly for the known w_ij.

    w_ij = L(i,j) - L(i) - L(j) is the interaction of two units, with L the measured joint output loss without them. The
    knapsack is the case w = 0. Interactions are measured where they matter: those among the units of the knapsack's
    plan, then those that the plans of least predicted harm contain and that are not measured yet, until there are none
    or until `evaluations` losses have been measured. Of the knapsack's plan and the last one, the plan of less measured
    loss is taken. Scores have to be harms in the unit of L, as those of output_loss are. The method is ours;
    LAPTOP-Diff (arXiv 2404.11098) takes the sum of scores.

    Args:
        evaluations: how many losses may be measured, of single units, of pairs and of plans. Pairs of the most harmful
            units come first; a plan of n units takes n (n + 1) / 2. What is not measured counts as 0.
    """

    evaluations: int = 128

    def select(self, pool: Pool, scores: Mapping[str, float], measure: Measure | None = None) -> list[str]:
        """Return the names of the units to remove, in the order of the forward pass.

        Raises InfeasibleBudget as Knapsack does, and ValueError without a `measure`.
        """
        measure = self.require_measure(measure, "pairs of units")
        names = [unit.name for unit in self.removable_units(pool)]
        limits, harms = list(self.limits(pool).values()), [scores[name] for name in names]
        start = [names.index(name) for name in super().select(pool, scores)]
        losses = Losses(lambda units: measure([names[i] for i in units]), self.evaluations - 2)
        interactions: dict[Pair, float] = {}
        plan = start
        while missing := [pair for pair in combinations(sorted(plan), 2) if pair not in interactions]:
            missing.sort(key=lambda pair: -(harms[pair[0]] + harms[pair[1]]))
            found = {pair: w for pair in missing if (w := losses.interaction(pair)) is not None}
            if not found:
                break
            interactions |= found
            plan = solve_with_pairs(limits, harms, interactions)
        plans = [start] if sorted(plan) == sorted(start) else [start, plan]
        best = min(plans, key=lambda units: measure([names[i] for i in sorted(units)])) if len(plans) > 1 else start
        return [names[i] for i in sorted(best)]


class Losses:
    """Measured joint losses of single units and of pairs, at most `allowed` of them."""

    def __init__(self, measure: Callable[[Collection[int]], float], allowed: int) -> None:
        self.measure, self.allowed = measure, allowed
        self.known: dict[tuple[int, ...], float] = {}

    def interaction(self, pair: Pair) -> float | None:
        """Return L(i,j) - L(i) - L(j); None where that would be one measurement too many."""
        sets: list[tuple[int, ...]] = [pair, pair[:1], pair[1:]]
        missing = [units for units in sets if units not in self.known]
        if len(self.known) + len(missing) > self.allowed:
            return None
        self.known |= {units: self.measure(units) for units in missing}
        both, first, second = (self.known[units] for units in sets)
        return both - first - second


def solve_with_pairs(limits: Sequence[Limit], harms: Sequence[float], interactions: Mapping[Pair, float]) -> list[int]:
    """Return the set of units of least harm, interactions included, that keeps to the limits; there has to be one.

    A pair is a shared part without a cost: it is removed exactly when both of its units are.
    """
    pairs = [(frozenset(pair), 0) for pair in interactions]
    extended = [(replace(program, shared=[*program.shared, *pairs]), window) for program, window in limits]
    (program, window), *others = extended
    shared = len(program.shared) - len(pairs)
    chosen = solve(program, [*harms, *[0.0] * shared, *interactions.values()], window, others=others)
    assert chosen is not None, "the knapsack's plan is one"
    return chosen
