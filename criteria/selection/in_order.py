"""Selections that remove one unit after another: by score, or by score per freed cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from criteria.selection.base import Budgeted
from criteria.selection.solver import Limit, is_reachable


@dataclass
class InOrder(Budgeted):
    """Base class: removes units in a given order, each unless the budget could then no longer be met exactly."""

    def order(self, costs: Sequence[int], scores: Sequence[float]) -> list[int]:
        """Return the indices of all units, the first to remove first."""
        raise NotImplementedError

    def choose(self, limits: Sequence[Limit], scores: Sequence[float]) -> list[int] | None:
        ((program, window),) = limits
        chosen: set[int] = set()
        spent = 0
        order = self.order(program.costs, scores)
        for position, i in enumerate(order):
            if spent >= window[0]:
                break
            if program.costs[i] == 0:  # its removal frees nothing: a 1x1 convolution that changes channels
                continue
            more = spent + program.marginal_cost(i, chosen)
            rest = program.remaining(chosen | {i}, order[position + 1 :])
            if program.allows(i, chosen) and is_reachable(rest, (window[0] - more, window[1] - more)):
                chosen.add(i)
                spent = more
        return list(chosen) if spent >= window[0] else None


@dataclass
class Ranked(InOrder):
    """Lowest score first. With `criterion=random` this is a uniformly random order."""

    def order(self, costs: Sequence[int], scores: Sequence[float]) -> list[int]:
        return sorted(range(len(costs)), key=lambda i: (scores[i], i))


@dataclass
class Greedy(InOrder):
    """Lowest score per unit of cost first: the greedy solution of the knapsack."""

    def order(self, costs: Sequence[int], scores: Sequence[float]) -> list[int]:
        return sorted(range(len(costs)), key=lambda i: (scores[i] / max(costs[i], 1), i))
