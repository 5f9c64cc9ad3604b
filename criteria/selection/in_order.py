"""Selections that take one unit after another: by score, or by score per freed cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from criteria.selection.base import Budgeted
from criteria.selection.solver import Program, reachable


@dataclass
class InOrder(Budgeted):
    """Units in a given order, each taken unless the budget could then no longer be met exactly."""

    def order(self, costs: Sequence[int], scores: Sequence[float]) -> list[int]:
        raise NotImplementedError

    def choose(self, program: Program, scores: Sequence[float], window: tuple[int, int]) -> list[int]:
        taken: set[int] = set()
        spent = 0
        order = self.order(program.costs, scores)
        for place, i in enumerate(order):
            if spent >= window[0]:
                break
            if program.costs[i] == 0:  # its removal frees nothing: a 1x1 convolution that changes channels
                continue
            more = spent + program.added(i, taken)
            rest = program.after(taken | {i}, order[place + 1 :])
            if program.allows(i, taken) and reachable(rest, (window[0] - more, window[1] - more)):
                taken.add(i)
                spent = more
        return list(taken)


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
