"""An exact choice of the units to remove under a budget.

The budget is the fraction of a cost (parameters or MACs) to remove; what is achieved lies in [ratio, ratio +
tolerance]. That is a constraint of the program, not a stopping rule: scores may be negative, and minimal harm alone
would then remove without limit.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from criteria.base import Unit


class InfeasibleBudget(ValueError):
    """No set of units fits the budget; the message names the nearest ratios that can be had, and the largest."""


@dataclass
class Selection:
    """What every way of choosing shares; subclasses order or solve.

    `ratio`: fraction of the backbone's `budget` (params | macs) to remove. `protected`: units that stay.
    """

    ratio: float
    tolerance: float = 0.02
    budget: str = "params"
    protected: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            percent = f" (a fraction, not a percentage: {self.ratio / 100:g}?)" if 1 <= self.ratio < 100 else ""
            raise ValueError(f"selection.ratio={self.ratio} is out of range; choose 0 < ratio < 1{percent}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"selection.tolerance={self.tolerance} is out of range; choose 0 <= tolerance < 1")
        if self.budget not in ("params", "macs"):
            raise ValueError(f"selection.budget={self.budget!r} is unknown; choose one of: params, macs")

    def check(self, units: Sequence[Unit], total: int) -> None:
        """Can this budget be met by these units at all? Needs no scores, so it is asked before they are made.

        `total` is the backbone's cost in the same measure as the budget. Raises InfeasibleBudget, and ValueError for
        an unknown protected unit, naming the nearest.
        """
        known(self.protected, units, "selection.protected")
        costs = [getattr(unit, self.budget) for unit in self.free(units)]
        if not reachable(costs, self.window(total)):
            raise InfeasibleBudget(self.explain(costs, self.window(total), total))

    def select(self, units: Sequence[Unit], scores: Mapping[str, float], total: int) -> list[str]:
        """The names of the units to remove, in the order of the forward pass; raises what `check` raises."""
        self.check(units, total)
        free, window = self.free(units), self.window(total)
        costs = [getattr(unit, self.budget) for unit in free]
        chosen = sorted(self.choose(costs, [scores[unit.name] for unit in free], window))
        assert window[0] <= sum(costs[i] for i in chosen) <= window[1]
        return [free[i].name for i in chosen]

    def free(self, units: Sequence[Unit]) -> list[Unit]:
        """The units that may go."""
        return [unit for unit in units if unit.name not in self.protected]

    def window(self, total: int) -> tuple[int, int]:
        """The least and the greatest cost to remove, in whole parameters or MACs."""
        ratio, tolerance = Fraction(str(self.ratio)), Fraction(str(self.tolerance))  # as written, not as rounded
        return math.ceil(ratio * total), math.floor((ratio + tolerance) * total)

    def choose(self, costs: Sequence[int], scores: Sequence[float], window: tuple[int, int]) -> list[int]:
        raise NotImplementedError

    def explain(self, costs: Sequence[int], window: tuple[int, int], total: int) -> str:
        largest = sum(costs)
        near = []
        below = solve(costs, [-cost for cost in costs], (0, window[0] - 1))
        above = solve(costs, costs, (window[1] + 1, largest))
        for found in (below, above):
            if found:
                near.append(f"{sum(costs[i] for i in found) / total:.4f}")
        return (
            f"selection.ratio={self.ratio} (tolerance {self.tolerance}) of {self.budget} cannot be had: the largest "
            f"achievable ratio is {largest / total:.3f}, the nearest achievable {' and '.join(near) or 'none'}"
            + (f", with {len(self.protected)} units protected" if self.protected else "")
        )


@dataclass
class Knapsack(Selection):
    """Minimal summed harm within the budget, exactly; ties go to less overshoot.

    The 0-1 knapsack of LAPTOP-Diff in its covering form, by branch and bound (HiGHS) with no gap left.
    """

    def choose(self, costs: Sequence[int], scores: Sequence[float], window: tuple[int, int]) -> list[int]:
        best = solve(costs, scores, window)
        assert best is not None
        # Closer to the lower bound at the same harm: shrink the window from above while the harm does not grow.
        while True:
            spent = sum(costs[i] for i in best)
            cheaper = solve(costs, scores, (window[0], spent - 1)) if spent > window[0] else None
            if cheaper is None or harm(scores, cheaper) > harm(scores, best):
                return best
            best = cheaper


@dataclass
class InOrder(Selection):
    """Units in a given order, each taken unless the budget could then no longer be met exactly."""

    def order(self, costs: Sequence[int], scores: Sequence[float]) -> list[int]:
        raise NotImplementedError

    def choose(self, costs: Sequence[int], scores: Sequence[float], window: tuple[int, int]) -> list[int]:
        taken: list[int] = []
        order = self.order(costs, scores)
        for place, i in enumerate(order):
            spent = sum(costs[j] for j in taken)
            if spent >= window[0]:
                break
            left = spent + costs[i]
            if reachable([costs[j] for j in order[place + 1 :]], (window[0] - left, window[1] - left)):
                taken.append(i)
        return taken


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


@dataclass
class Given:
    """Exactly the units that are listed, at whatever ratio they come to."""

    units: list[str]
    budget: str = "params"

    def check(self, units: Sequence[Unit], total: int) -> None:
        """Raises ValueError for an empty list and for an unknown unit, naming the nearest."""
        if not self.units:
            raise ValueError("selection.units is empty; list at least one unit to remove")
        known(self.units, units, "selection.units")

    def select(self, units: Sequence[Unit], scores: Mapping[str, float], total: int) -> list[str]:
        """The listed units in the order of the forward pass."""
        self.check(units, total)
        return [unit.name for unit in units if unit.name in self.units]


def known(names: Iterable[str], units: Sequence[Unit], field_name: str) -> None:
    """Raise ValueError for a name that is no unit, with the nearest that are."""
    there = [unit.name for unit in units]
    for name in names:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=3, cutoff=0.3) or there[:3]
            raise ValueError(
                f"{field_name}: {name!r} is not a unit of this network; the nearest are: {', '.join(near)}"
            )


def harm(scores: Sequence[float], chosen: Sequence[int]) -> float:
    return math.fsum(scores[i] for i in chosen)


def reachable(costs: Sequence[int], window: tuple[int, int]) -> bool:
    """Is there a subset whose summed cost lies in the window?"""
    return solve(costs, [0.0] * len(costs), window) is not None


def solve(costs: Sequence[int], scores: Sequence[float], window: tuple[int, int]) -> list[int] | None:
    """The subset of least summed score whose cost lies in [low, high] (whole numbers), or None where there is none.

    HiGHS keeps constraints and gap to absolute tolerances of 1e-6. So what it finds is checked in whole numbers, and
    the objective is solved again with the scores rescaled to what is left to decide, until nothing better is found:
    harms are told apart to 1e-8 of the answer's own, over the whole range of scores (to 1e-9 of the largest score
    where some are negative).
    """
    low, high = max(window[0], 0), min(window[1], sum(costs))
    if low > high:
        return None
    if low <= 0 and all(score >= 0 for score in scores):
        return []
    count = len(costs)
    scale = max(1.0, max(costs) / 1e5)
    rows = [LinearConstraint(np.array([costs]) / scale, (low - 0.25) / scale, (high + 0.25) / scale)]
    best: list[int] | None = None
    allowed = np.ones(count)
    unit = max((abs(score) for score in scores), default=0.0) or 1.0
    while True:
        result = milp(
            np.array(scores, float) / unit * 1e3,
            integrality=np.ones(count),
            bounds=Bounds(0, allowed),
            constraints=rows,
            options={"mip_rel_gap": 0, "presolve": False},  # its presolve was seen to lose the optimum
        )
        if result.status == 2:  # infeasible
            return best
        assert result.x is not None, result.message
        found = [i for i in range(count) if result.x[i] > 0.5]
        if not low <= sum(costs[i] for i in found) <= high:  # within HiGHS' tolerance only: exclude this one set
            signs = np.ones(count)
            signs[found] = -1
            rows.append(LinearConstraint(signs, lb=1 - len(found)))
            continue
        if best is not None and harm(scores, found) >= harm(scores, best):
            return best
        best = found
        bound = harm(scores, best)
        if min(scores) < 0 or bound <= 0 or bound > unit / 10:
            return best
        # No unit that is worse alone than this whole set can be in a better one: leave those out, look closer.
        allowed = np.array([float(score <= bound) for score in scores])
        unit = bound
