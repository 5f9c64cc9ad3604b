"""Find the set of units with the least total score whose cost lies in a window: exactly, in whole numbers."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

Window = tuple[int, int]
"""The least and the greatest cost, both included."""

MAX_BITS = 2**27
"""The costs of all sets are enumerated up to this many possible values: as bits of one integer of 16 MiB."""


@dataclass(frozen=True)
class Program:
    """The costs that sets of units free, and the pairs of units that cannot be removed together.

    A unit is given by its index in `costs`.
    """

    costs: Sequence[int]
    """the cost that each unit frees by itself"""
    shared: Sequence[tuple[frozenset[int], int]] = ()
    """shared parts: (units, cost); the cost is freed exactly when all of these units are removed"""
    exclusive: Sequence[tuple[int, int]] = ()
    """pairs of units that cannot be removed together, such as a block and a part of it"""

    @cached_property
    def shared_by_unit(self) -> dict[int, list[tuple[frozenset[int], int]]]:
        """The shared parts that each unit belongs to; units without any are left out."""
        parts = defaultdict(list)
        for units, cost in self.shared:
            for i in units:
                parts[i].append((units, cost))
        return dict(parts)

    @cached_property
    def exclusive_by_unit(self) -> dict[int, set[int]]:
        """The units that each unit excludes; units without any are left out."""
        excluded = defaultdict(set)
        for a, b in self.exclusive:
            excluded[a].add(b)
            excluded[b].add(a)
        return dict(excluded)

    @cached_property
    def all_costs(self) -> list[int]:
        """The costs of the units, then those of the shared parts."""
        return [*self.costs, *(cost for _, cost in self.shared)]

    def cost(self, chosen: Collection[int]) -> int:
        """Return the cost that the removal of a set of units frees."""
        return sum(self.all_costs[i] for i in self.removed_items(chosen))

    def removed_items(self, chosen: Collection[int]) -> list[int]:
        """Return the chosen units and the shared parts that are freed with them, as indices into `all_costs`."""
        removed, count = set(chosen), len(self.costs)
        return [*chosen, *(count + s for s, (units, _) in enumerate(self.shared) if units <= removed)]

    def marginal_cost(self, i: int, chosen: set[int]) -> int:
        """Return the cost that unit `i` frees in addition to a set of units that does not contain it."""
        return self.costs[i] + sum(cost for units, cost in self.shared_by_unit.get(i, ()) if units - {i} <= chosen)

    def allows(self, i: int, chosen: set[int]) -> bool:
        """Return whether unit `i` may be removed together with a set of units."""
        return not self.exclusive_by_unit.get(i, set()) & chosen

    def remaining(self, taken: set[int], left: Collection[int]) -> "Program":
        """Return the program of what is still to be decided among `left`, by index, once `taken` are removed."""
        kept = [i for i in sorted(left) if self.allows(i, taken)]
        index = {i: k for k, i in enumerate(kept)}
        return Program(
            [self.costs[i] for i in kept],
            [
                (frozenset(index[i] for i in units - taken), cost)
                for units, cost in self.shared
                if not units <= taken and units - taken <= index.keys()
            ],
            [(index[a], index[b]) for a, b in self.exclusive if a in index and b in index],
        )


Limit = tuple[Program, Window]
"""The costs of sets of units, and the window that the cost of the removed ones has to lie in."""


def total_harm(scores: Sequence[float], chosen: Collection[int]) -> float:
    """Return the sum of the scores of a set of units."""
    return math.fsum(scores[i] for i in chosen)


def is_reachable(program: Program, window: Window) -> bool:
    """Return whether some set of units has a cost within the window (low, high), both ends included."""
    low, high = max(window[0], 0), window[1]
    if low > high or low > sum(program.all_costs):
        return False
    if greedy_cost(program, high) >= low:
        return True
    if is_enumerable(program):
        least = least_cost(program, low)
        return least is not None and least <= high
    return solve(program, [0.0] * len(program.costs), (low, high)) is not None


def greedy_cost(program: Program, high: int) -> int:
    """Return the cost of the greedy set of at most `high`: every unit that still fits, the costliest first."""
    chosen: set[int] = set()
    spent = 0
    for i in sorted(range(len(program.costs)), key=lambda i: -program.costs[i]):
        more = program.marginal_cost(i, chosen)
        if spent + more <= high and program.allows(i, chosen):
            spent += more
            chosen.add(i)
    return spent


def least_cost(program: Program, low: int) -> int | None:
    """Return the least cost among the sets that cost `low` or more; None where there is no such set."""
    if is_enumerable(program):
        unit, start = common_divisor(program), -(-max(low, 0) // common_divisor(program))
        above = enumerate_costs(program) >> start
        return unit * (start + (above & -above).bit_length() - 1) if above else None
    cheapest = solve(program, program.all_costs, (low, sum(program.all_costs)))
    return None if cheapest is None else program.cost(cheapest)


def greatest_cost(program: Program, high: int) -> int:
    """Return the greatest cost among the sets that cost `high` or less; `high` is not negative."""
    if is_enumerable(program):
        unit = common_divisor(program)
        return unit * ((enumerate_costs(program) & ((1 << (high // unit + 1)) - 1)).bit_length() - 1)
    costliest = solve(program, [-cost for cost in program.all_costs], (0, high))
    assert costliest is not None  # the empty set fits
    return program.cost(costliest)


def find_extreme_cost(program: Program, window: Window, others: Sequence[Limit], largest: bool) -> int | None:
    """Return the largest or the smallest cost within a window among the sets that keep to the other limits.

    None where there is no such set.
    """
    sign = -1 if largest else 1
    chosen = solve(program, [sign * cost for cost in program.all_costs], window, others=others)
    return None if chosen is None else program.cost(chosen)


def common_divisor(program: Program) -> int:
    """Return the greatest common divisor of all costs."""
    return math.gcd(*program.all_costs) or 1


def is_enumerable(program: Program) -> bool:
    """Return whether the number of possible total costs is small enough to enumerate them all."""
    return sum(program.all_costs) // common_divisor(program) < MAX_BITS


def enumerate_costs(program: Program) -> int:
    """Return the costs of all sets as the bits of one integer: bit k is set if some set costs k common divisors.

    Dynamic programming over the units in order. The decisions so far affect later ones only through the units that are
    now excluded and the shared parts that can no longer be freed. So one integer is kept per such combination; there
    are few of them where units that depend on each other are close in the order.
    """
    count, unit = len(program.costs), common_divisor(program)
    cases = {frozenset[int](): 1}
    for i in range(count):
        parts = [(count + s, max(units), cost) for s, (units, cost) in enumerate(program.shared) if i in units]
        later = {j for j in program.exclusive_by_unit.get(i, ()) if j > i}
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
    program: Program,
    scores: Sequence[float],
    window: Window,
    limit: float | None = None,
    others: Sequence[Limit] = (),
) -> list[int] | None:
    """Return the set of units with the least total score whose cost lies within the window; None where no set does.

    Several costs of the same units can be limited at once: each adds one linear constraint to the same program.

    HiGHS keeps constraints and gap only to absolute tolerances of 1e-6. Therefore the cost of each solution is checked
    in whole numbers, and the problem is solved again with the scores rescaled to the harm of the best solution so far,
    until no better one exists. Two harms are distinguished if they differ by more than 1e-8 of the answer's harm (by
    more than 1e-9 of the largest score where some scores are negative).

    Args:
        program: the costs of sets of units.
        scores: one per unit, or one per unit and then one per shared part.
        window: the least and the greatest cost, both included.
        limit: sets with a greater total score than this need not be considered.
        others: further costs, each with its window; the units, shared parts and exclusions are those of `program`.
    """
    count, size = len(program.costs), len(program.all_costs)
    limits = [(each, clip_window(each, ends)) for each, ends in ((program, window), *others)]
    if any(low > high for _, (low, high) in limits):
        return None
    signed = min(scores, default=0) < 0
    if all(low <= 0 for _, (low, _) in limits) and not signed:
        return []
    every = [*scores, *[0.0] * (size - len(scores))]
    weights = np.array(every)
    rows = [*(cost_row(each, ends) for each, ends in limits), *linear_constraints(program)]
    best: list[int] | None = None
    allowed = np.ones(size)
    unit = float(np.abs(weights).max()) or 1.0
    while True:
        if limit is not None and not signed:
            # A unit whose score alone exceeds the limit is in no better set: leave it out, and rescale to the limit.
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
        candidate = [i for i in range(count) if result.x[i] > 0.5]
        if not fits(candidate, limits):  # within HiGHS' tolerance only: exclude this one set
            signs = np.zeros(size)
            signs[:count] = 1
            signs[candidate] = -1
            rows.append(LinearConstraint(signs, lb=1 - len(candidate)))
            continue
        reached = total_harm(every, program.removed_items(candidate))
        if best is not None and reached >= total_harm(every, program.removed_items(best)):
            return best
        best = candidate
        if signed or reached <= 0 or reached > unit / 10:
            return best
        limit = reached


def clip_window(program: Program, window: Window) -> Window:
    """Return the least and the greatest multiple of the common divisor in the window that a set can cost.

    The least is above the greatest where there is none.
    """
    common = common_divisor(program)
    low, high = max(window[0], 0), min(window[1], sum(program.all_costs))
    return common * -(-low // common), common * (high // common)


def fits(chosen: Collection[int], limits: Iterable[Limit]) -> bool:
    """Return whether the costs of a set of units lie within their windows, in whole numbers."""
    return all(low <= program.cost(chosen) <= high for program, (low, high) in limits)


def cost_row(program: Program, window: Window) -> LinearConstraint:
    """Return the constraint that the cost lies within the window, whose ends are multiples of the common divisor.

    The window is widened by a quarter of the divisor: no other set fits in, and rounding cannot exclude one that does.
    """
    common = common_divisor(program)
    costs = np.array([cost // common for cost in program.all_costs], float)
    scale = max(1.0, costs.max() / 1e5)
    low, high = window[0] // common, window[1] // common
    return LinearConstraint(costs[None] / scale, (low - 0.25) / scale, (high + 0.25) / scale)


def linear_constraints(program: Program) -> list[LinearConstraint]:
    """Return the linear constraints that couple the binary variables: units x, then shared parts y.

    x_a + x_b <= 1 for units that exclude each other; y <= x_u and y >= sum(x_u) - (n - 1) for a shared part of the
    units x_1 .. x_n, which is freed exactly when all of them are removed.
    """
    entries: list[tuple[dict[int, int], float]] = [({a: 1, b: 1}, 1) for a, b in program.exclusive]
    for part, (units, _) in enumerate(program.shared, len(program.costs)):
        entries += [({part: 1, u: -1}, 0) for u in sorted(units)]
        entries.append(({part: -1} | dict.fromkeys(sorted(units), 1), len(units) - 1))
    if not entries:
        return []
    matrix = np.zeros((len(entries), len(program.all_costs)))
    for row, (entry, _) in enumerate(entries):
        matrix[row, list(entry)] = list(entry.values())
    return [LinearConstraint(matrix, ub=[bound for _, bound in entries])]
