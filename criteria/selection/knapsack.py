"""The exact optimum: the least summed harm of all sets of units that fit the budget."""

from collections.abc import Sequence
from dataclasses import dataclass

from criteria.selection.base import Budgeted
from criteria.selection.solver import Program, is_reachable, solve, total_harm


@dataclass
class Knapsack(Budgeted):
    """Minimises the summed harm within the budget, exactly; ties are resolved in favour of the least overshoot.

    The 0-1 knapsack of LAPTOP-Diff (arXiv 2404.11098) in its covering form: remove at least the budget at least harm.
    The upper end of the window and the rule for ties are ours.
    """

    def choose(self, program: Program, scores: Sequence[float], window: tuple[int, int]) -> list[int] | None:
        best = solve(program, scores, window)
        # Closer to the lower bound at the same harm: shrink the window from above while the harm does not grow.
        while best is not None:
            closer = (window[0], program.cost(best) - 1)
            if not is_reachable(program, closer):
                break
            cheaper = solve(program, scores, closer, limit=total_harm(scores, best))
            if cheaper is None or total_harm(scores, cheaper) > total_harm(scores, best):
                break
            best = cheaper
        return best
