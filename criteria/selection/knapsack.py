"""The exact optimum: the least summed harm of all sets of units that fit the budget."""

from collections.abc import Sequence
from dataclasses import dataclass

from criteria.selection.base import Budgeted
from criteria.selection.solver import Program, harm, reachable, solve


@dataclass
class Knapsack(Budgeted):
    """Minimal summed harm within the budget, exactly; ties go to less overshoot.

    The 0-1 knapsack of LAPTOP-Diff in its covering form, by branch and bound (HiGHS) with no gap left.
    """

    def choose(self, program: Program, scores: Sequence[float], window: tuple[int, int]) -> list[int]:
        best = solve(program, scores, window)
        assert best is not None
        # Closer to the lower bound at the same harm: shrink the window from above while the harm does not grow.
        while True:
            closer = (window[0], program.cost(best) - 1)
            if not reachable(program, closer):
                return best
            cheaper = solve(program, scores, closer, limit=harm(scores, best))
            if cheaper is None or harm(scores, cheaper) > harm(scores, best):
                return best
            best = cheaper
