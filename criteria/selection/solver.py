"""Sets of units of least harm whose cost lies in a window, exactly, in whole numbers."""

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

MAX_BITS = 2**27
"""Up to this many costs that sets could have, all are enumerated, as the bits of one whole number of 16 MiB."""


@dataclass(frozen=True)
class Program:
    """What sets of units free when they go, and which units cannot go together; a unit is its place in `costs`.

    `shared`: the places of some units, and the cost that goes when all of them go, and exactly then.
    """

    costs: Sequence[int]
    shared: Sequence[tuple[frozenset[int], int]] = ()
    apart: Sequence[tuple[int, int]] = ()

    @cached_property
    def parts(self) -> dict[int, list[tuple[frozenset[int], int]]]:
        """The shared parts of each unit that has some."""
        found = defaultdict(list)
        for units, cost in self.shared:
            for i in units:
                found[i].append((units, cost))
        return dict(found)

    @cached_property
    def rivals(self) -> dict[int, set[int]]:
        """Of each unit that has some, those that it cannot go together with."""
        found = defaultdict(set)
        for a, b in self.apart:
            found[a].add(b)
            found[b].add(a)
        return dict(found)

    @cached_property
    def every(self) -> list[int]:
        """The costs of the units, then those of the shared parts."""
        return [*self.costs, *(cost for _, cost in self.shared)]

    def cost(self, chosen: Collection[int]) -> int:
        """What goes with this set."""
        return sum(self.every[i] for i in self.gone(chosen))

    def gone(self, chosen: Collection[int]) -> list[int]:
        """The units of this set and the shared parts that go with them, as places in `every`."""
        gone, count = set(chosen), len(self.costs)
        return [*chosen, *(count + s for s, (units, _) in enumerate(self.shared) if units <= gone)]

    def added(self, i: int, chosen: set[int]) -> int:
        """What one unit more would free."""
        return self.costs[i] + sum(cost for units, cost in self.parts.get(i, ()) if units - {i} <= chosen)

    def allows(self, i: int, chosen: set[int]) -> bool:
        """Can this unit go together with those?"""
        return not self.rivals.get(i, set()) & chosen

    def after(self, taken: set[int], left: Collection[int]) -> "Program":
        """What is still to be chosen among `left`, in the order of their places, once `taken` are gone."""
        kept = [i for i in sorted(left) if self.allows(i, taken)]
        place = {i: k for k, i in enumerate(kept)}
        return Program(
            [self.costs[i] for i in kept],
            [
                (frozenset(place[i] for i in units - taken), cost)
                for units, cost in self.shared
                if not units <= taken and units - taken <= place.keys()
            ],
            [(place[a], place[b]) for a, b in self.apart if a in place and b in place],
        )


def harm(scores: Sequence[float], chosen: Collection[int]) -> float:
    """The summed score of a set."""
    return math.fsum(scores[i] for i in chosen)


def reachable(program: Program, window: tuple[int, int]) -> bool:
    """Is there a set whose cost lies in the window?"""
    low, high = max(window[0], 0), window[1]
    if low > high or low > sum(program.every):
        return False
    if filled(program, high) >= low:
        return True
    if enumerable(program):
        least = least_cost(program, low)
        return least is not None and least <= high
    return solve(program, [0.0] * len(program.costs), (low, high)) is not None


def filled(program: Program, high: int) -> int:
    """The cost of one set of at most `high`: each unit that fits, the costly ones first."""
    chosen: set[int] = set()
    spent = 0
    for i in sorted(range(len(program.costs)), key=lambda i: -program.costs[i]):
        more = program.added(i, chosen)
        if spent + more <= high and program.allows(i, chosen):
            spent += more
            chosen.add(i)
    return spent


def least_cost(program: Program, low: int) -> int | None:
    """The least cost of a set that costs `low` or more."""
    if enumerable(program):
        unit, start = divisor(program), -(-max(low, 0) // divisor(program))
        above = sums(program) >> start
        return unit * (start + (above & -above).bit_length() - 1) if above else None
    found = solve(program, program.every, (low, sum(program.every)))
    return None if found is None else program.cost(found)


def greatest_cost(program: Program, high: int) -> int:
    """The greatest cost of a set that costs `high` or less; `high` is not negative."""
    if enumerable(program):
        unit = divisor(program)
        return unit * ((sums(program) & ((1 << (high // unit + 1)) - 1)).bit_length() - 1)
    found = solve(program, [-cost for cost in program.every], (0, high))
    assert found is not None  # the empty set fits
    return program.cost(found)


def divisor(program: Program) -> int:
    """What all costs are multiples of."""
    return math.gcd(*program.every) or 1


def enumerable(program: Program) -> bool:
    """Are the costs that sets could have few enough to go through them all?"""
    return sum(program.every) // divisor(program) < MAX_BITS


def sums(program: Program) -> int:
    """The costs of all sets, in units of the common divisor, as the bits of a whole number.

    The units are decided one by one. What they leave to the later ones is which of those (and which shared parts)
    cannot go any more, so the costs are kept apart by that: few cases, where units that belong together are near.
    """
    count, unit = len(program.costs), divisor(program)
    cases = {frozenset[int](): 1}
    for i in range(count):
        parts = [(count + s, max(units), cost) for s, (units, cost) in enumerate(program.shared) if i in units]
        later = {j for j in program.rivals.get(i, ()) if j > i}
        over = {i, *(part for part, last, _ in parts if last == i)}
        after: dict[frozenset[int], int] = defaultdict(int)
        for closed, costs in cases.items():
            after[(closed | {part for part, *_ in parts}) - over] |= costs
            if i not in closed:
                freed = program.costs[i] + sum(c for part, last, c in parts if last == i and part not in closed)
                after[(closed | later) - over] |= costs << freed // unit
        cases = after
    assert cases.keys() == {frozenset()}
    return cases[frozenset()]


def solve(
    program: Program, scores: Sequence[float], window: tuple[int, int], limit: float | None = None
) -> list[int] | None:
    """The set of least summed score whose cost lies in [low, high] (whole numbers), or None where there is none.

    `scores` is of the units, or of the units and then the shared parts. `limit`: sets of a greater harm than this are
    of no interest and may be left out.

    HiGHS keeps constraints and gap to absolute tolerances of 1e-6. So what it finds is checked in whole numbers, and
    the objective is solved again with the scores rescaled to what is left to decide, until nothing better is found:
    harms are told apart to 1e-8 of the answer's own, over the whole range of scores (to 1e-9 of the largest score
    where some are negative).
    """
    count, size, common = len(program.costs), len(program.every), divisor(program)
    low, high = max(window[0], 0), min(window[1], sum(program.every))
    if -(-low // common) > high // common:
        return None
    signed = min(scores, default=0) < 0
    if low <= 0 and not signed:
        return []
    every = [*scores, *[0.0] * (size - len(scores))]
    weights = np.array(every)
    rows = [cost_row(program, (-(-low // common), high // common)), *rules(program)]
    best: list[int] | None = None
    allowed = np.ones(size)
    unit = float(np.abs(weights).max()) or 1.0
    while True:
        if limit is not None and not signed:
            # No unit that is worse alone than the limit can be in a better set: leave those out, look closer.
            allowed, unit = (weights <= limit).astype(float), limit or 1.0
        scaled = weights / unit * 1e3
        extra = [] if limit is None else [LinearConstraint(scaled * allowed, ub=limit / unit * 1e3 + 1e-3)]
        result = milp(
            scaled,
            integrality=np.ones(size),
            bounds=Bounds(0, allowed),
            constraints=rows + extra,
            options={"mip_rel_gap": 0, "presolve": False},  # its presolve was seen to lose the optimum
        )
        if result.status == 2:  # infeasible
            return best
        assert result.x is not None, result.message
        found = [i for i in range(count) if result.x[i] > 0.5]
        if not low <= program.cost(found) <= high:  # within HiGHS' tolerance only: exclude this one set
            signs = np.zeros(size)
            signs[:count] = 1
            signs[found] = -1
            rows.append(LinearConstraint(signs, lb=1 - len(found)))
            continue
        reached = harm(every, program.gone(found))
        if best is not None and reached >= harm(every, program.gone(best)):
            return best
        best = found
        if signed or reached <= 0 or reached > unit / 10:
            return best
        limit = reached


def cost_row(program: Program, window: tuple[int, int]) -> LinearConstraint:
    """The window, in units of the common divisor; a quarter of one more or less changes no set, and rounds safely."""
    costs = np.array([cost // divisor(program) for cost in program.every], float)
    scale = max(1.0, costs.max() / 1e5)
    return LinearConstraint(costs[None] / scale, (window[0] - 0.25) / scale, (window[1] + 0.25) / scale)


def rules(program: Program) -> list[LinearConstraint]:
    """Which of the binaries (units, then shared parts) go together, and which do not.

    A shared part y of units x_1 .. x_n goes exactly when all of them do: y <= x_u, y >= sum(x_u) - (n - 1).
    """
    entries: list[tuple[dict[int, int], float]] = [({a: 1, b: 1}, 1) for a, b in program.apart]
    for part, (units, _) in enumerate(program.shared, len(program.costs)):
        entries += [({part: 1, u: -1}, 0) for u in sorted(units)]
        entries.append(({part: -1} | dict.fromkeys(sorted(units), 1), len(units) - 1))
    if not entries:
        return []
    matrix = np.zeros((len(entries), len(program.every)))
    for row, (entry, _) in enumerate(entries):
        matrix[row, list(entry)] = list(entry.values())
    return [LinearConstraint(matrix, ub=[bound for _, bound in entries])]
