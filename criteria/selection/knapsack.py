"""The exact optimum: the least summed harm of all sets of units that fit the budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from criteria.selection.base import Budgeted
from criteria.selection.solver import Limit, is_reachable, solve, total_harm


@dataclass
class Knapsack(Budgeted):
    """Minimises the summed harm within the budget, exactly; ties are resolved in favour of the least overshoot.

    The 0-1 knapsack of LAPTOP-Diff (arXiv 2404.11098) in its covering form: remove at least the budget at least harm.
    The upper end of the window and the rule for ties are ours. Several budgets are windows of the same program; then
    the overshoot of the first budget counts before that of the second.
    """

    takes_several_budgets: ClassVar[bool] = True
    chooses_least_harm: ClassVar[bool] = True

    def choose(self, limits: Sequence[Limit], scores: Sequence[float]) -> list[int] | None:
        limits = list(limits)
        (program, window), *others = limits
        best = solve(program, scores, window, others=others)
        # Closer to the lower bound at the same harm: shrink the windows from above while the harm does not grow.
        for number, (program, window) in enumerate(limits):
            while best is not None:
                closer = (window[0], program.cost(best) - 1)
                if not is_reachable(program, closer):
                    break
                others = limits[:number] + limits[number + 1 :]
                cheaper = solve(program, scores, closer, limit=total_harm(scores, best), others=others)
                if cheaper is None or total_harm(scores, cheaper) > total_harm(scores, best):
                    break
                best = cheaper
            if best is not None:
                limits[number] = (program, (window[0], program.cost(best)))
        return best
