"""An exact choice of the units to remove under a budget.

The budget is the fraction of a cost (parameters, MACs, FLOPs or measured latency) to remove, or how much of it is to be
left; the fraction that is achieved lies in [ratio, ratio + tolerance]. That is a constraint of the program, not a
stopping rule: scores may be negative, and minimal harm alone would then remove without limit.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from criteria.base import Shared, Unit
from criteria.selection.solver import Program, greatest_cost, least_cost, reachable

BUDGETS = ("params", "macs", "flops", "latency")
SLICE = re.compile(r"(-?\d+)?:(-?\d+)?")

Measure = Callable[[Sequence[str]], float]
"""The measured loss of the network without a set of units: their joint harm, not the sum of their scores."""


class InfeasibleBudget(ValueError):
    """No set of units fits the budget; the message names the nearest ratios that can be had, and the largest."""


@dataclass(frozen=True)
class Pool:
    """What there is to choose from, and what it costs."""

    units: Sequence[Unit]
    """in the order of the forward pass"""
    totals: Mapping[str, int]
    """{budget: the whole backbone's cost}: params, macs, of classifiers flops, if measured latency in microseconds"""
    shared: Sequence[Shared] = ()
    savings: Mapping[str, int] | None = None
    """{unit, or shared part: microseconds that its removal alone saves}; measured, and so perhaps below zero"""
    cost: Callable[[Sequence[str], str], int] | None = None
    """cost(names, budget): what a set of units frees, where that is not the sum over units (channels)"""

    def total(self, budget: str) -> int:
        """The whole backbone's cost; ValueError where this network has none such, or it was not measured."""
        if budget not in self.totals:
            raise ValueError(
                f"selection.budget={budget!r} has no total in this pool; choose one of: {', '.join(self.totals)}"
            )
        return self.totals[budget]

    def program(self, budget: str) -> Program:
        """The costs of sets of these units; ValueError for the budget latency where savings were not measured."""
        place = {unit.name: i for i, unit in enumerate(self.units)}
        if budget == "latency" and not place.keys() <= (self.savings or {}).keys():
            raise ValueError(
                "selection.budget='latency' needs a measured saving of every unit, and this pool has "
                f"{'some' if self.savings else 'none'}; measure them, or choose one of: params, macs"
            )
        shared = [part for part in self.shared if set(part.units) <= place.keys()]
        return Program(
            [self.freed(unit, budget) for unit in self.units],
            [(frozenset(place[name] for name in part.units), self.freed(part, budget)) for part in shared],
            [(place[unit.inside], i) for i, unit in enumerate(self.units) if unit.inside in place],
        )

    def freed(self, part: Unit | Shared, budget: str) -> int:
        """What one part frees; a removal that was measured to save nothing, or less, frees 0."""
        if budget == "latency":
            return max((self.savings or {}).get(part.name, 0), 0)
        if budget == "flops":  # only classifiers have them, and of those only channels go
            assert self.cost is not None
            return self.cost([part.name], budget)
        return part.params if budget == "params" else part.macs


class Selection:
    """A way to choose what is removed, and how."""

    needs_scores = True
    needs_joint_loss = False
    """does it measure the joint loss of sets of units?"""
    budget = "params"
    """the cost in which the achieved ratio is stated"""

    @property
    def needs_savings(self) -> bool:
        """Is the latency that each unit saves to be measured?"""
        return self.budget == "latency"

    def protected_units(self, units: Sequence[Unit]) -> list[str]:
        """Return the names of the units that stay whatever their scores."""
        return []

    def check(self, pool: Pool) -> None:
        """Raise ValueError for what cannot be had from this pool; asked once, before anything is scored or timed."""

    def select(self, pool: Pool, scores: Mapping[str, float], measure: Measure | None = None) -> list[str]:
        """Return the names of the units to remove, in the order of the forward pass.

        Raises InfeasibleBudget where no set of units fits the budget.
        """
        raise NotImplementedError

    def changes(self, pool: Pool, scores: Mapping[str, float], measure: Measure | None = None) -> list[dict[str, str]]:
        """The changes of a plan: {"unit": name, "kind": how it is removed} of each unit that goes."""
        kinds = {unit.name: unit.change for unit in pool.units}
        return [{"unit": name, "kind": kinds[name]} for name in self.select(pool, scores, measure)]


@dataclass
class Budgeted(Selection):
    """What every way of meeting a budget shares; subclasses give `choose`, or a `check` and `select` of their own.

    `ratio`: fraction of the backbone's `budget` (params | macs | flops | latency) to remove. `target`: what is to be
    left of it at most, in parameters, MACs or FLOPs, instead of `ratio`, which is then None. `tolerance`: how much more
    may go, as a fraction of the whole backbone's cost. `protected`: units that stay, by name, as slices of the units in
    the order of the forward pass (":4" the first four, "-2:" the last two), or all channels of a group by its name.
    """

    ratio: float | None = None
    tolerance: float = 0.02
    budget: str = "params"
    protected: list[str] = field(default_factory=list)
    target: float | None = None

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.target is None):
            raise ValueError(
                f"selection.ratio={self.ratio}, selection.target={self.target}: give exactly one of the two (the "
                "fraction to remove, or what is to be left), and say null for the other"
            )
        if self.ratio is not None and not 0 < self.ratio < 1:
            percent = f" (a fraction, not a percentage: {self.ratio / 100:g}?)" if 1 <= self.ratio < 100 else ""
            raise ValueError(f"selection.ratio={self.ratio} is out of range; choose 0 < ratio < 1{percent}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"selection.tolerance={self.tolerance} is out of range; choose 0 <= tolerance < 1")
        check_budget(self.budget)
        if self.target is not None and self.budget == "latency":
            raise ValueError(
                f"selection.target={self.target}: of the budget latency choose a ratio, or for a target one of: "
                "params, macs, flops"
            )

    def check(self, pool: Pool) -> None:
        """Raises InfeasibleBudget, and ValueError for a budget or a target that this network cannot have.

        ValueError as well for an unknown protected unit, naming the nearest.
        """
        if self.needs_savings and pool.savings is None:  # units are timed after they are scored
            self.check_untimed(pool)
        else:
            self.check_budget(pool)

    def check_untimed(self, pool: Pool) -> None:
        """Raise ValueError for what can be told of a latency budget before units are timed."""
        self.protected_units(pool.units)
        if pool.cost is not None:
            raise ValueError(
                "selection.budget='latency' is for blocks and operators; of channels choose params, macs, or for "
                "image classifiers flops"
            )

    def check_budget(self, pool: Pool) -> None:
        """Raise InfeasibleBudget where no set of units fits the budget."""
        window, program = self.window(pool), self.program(pool)
        if not reachable(program, window):
            largest = greatest_cost(program, sum(program.every))
            below, above = greatest_cost(program, window[0] - 1), least_cost(program, window[1] + 1)
            raise self.infeasible(pool, largest, below, above)

    def select(self, pool: Pool, scores: Mapping[str, float], measure: Measure | None = None) -> list[str]:
        self.check_budget(pool)
        free, program, window = self.free(pool), self.program(pool), self.window(pool)
        chosen = sorted(self.choose(program, [scores[unit.name] for unit in free], window))
        assert window[0] <= program.cost(chosen) <= window[1]
        return [free[i].name for i in chosen]

    def choose(self, program: Program, scores: Sequence[float], window: tuple[int, int]) -> list[int]:
        """The places, among the units that may go, of those that do."""
        raise NotImplementedError

    def free(self, pool: Pool) -> list[Unit]:
        """The units that may go."""
        staying = self.protected_units(pool.units)
        return [unit for unit in pool.units if unit.name not in staying]

    def protected_units(self, units: Sequence[Unit]) -> list[str]:
        """The names of the protected units; raises ValueError for an unknown one, naming the nearest."""
        names = [unit.name for unit in units]
        found: set[str] = set()
        for entry in self.protected:
            part = SLICE.fullmatch(entry)
            if part and any(":" in name for name in names):
                raise ValueError(
                    f"selection.protected={entry!r}: slices are of blocks; name channels, or groups of them, such as "
                    f"{group(names[0])!r}"
                )
            named = [name for name in names if entry in (name, group(name))] or [entry]
            found.update(names[slice(*(int(end) if end else None for end in part.groups()))] if part else named)
        known(found, units, "selection.protected", [group(name) for name in names])
        return [name for name in names if name in found]

    def program(self, pool: Pool) -> Program:
        """The costs of sets of the units that may go; ValueError where they are no sums over the units."""
        if pool.cost is not None:
            raise ValueError(
                "these units are channels, whose costs do not add up; choose selection=uniform for a language model, "
                "selection=threshold for other networks"
            )
        staying = self.protected_units(pool.units)
        free = [i for i, unit in enumerate(pool.units) if unit.name not in staying]
        return pool.program(self.budget).after(set(), free)

    def window(self, pool: Pool) -> tuple[int, int]:
        """The least and the greatest cost to remove, in whole parameters, MACs, FLOPs or microseconds."""
        least, tolerance = self.least(pool), Fraction(str(self.tolerance))
        return math.ceil(least), math.floor(least + tolerance * pool.total(self.budget))

    def least(self, pool: Pool) -> Fraction:
        """The least cost to remove; raises ValueError for a target that is not below the whole network's cost."""
        total = pool.total(self.budget)
        if self.target is None:
            return Fraction(str(self.ratio)) * total  # as written, not as rounded
        if not 0 < self.target < total:
            raise ValueError(
                f"selection.target={self.target:,} is out of range: the whole network has {total:,} {self.budget}; "
                f"choose 0 < target < {total:,}"
            )
        return total - Fraction(str(self.target))

    def infeasible(self, pool: Pool, largest: int, below: int, above: int | None) -> InfeasibleBudget:
        """The error that names the largest cost that can be removed, and the nearest below and above the window."""
        total, near = pool.total(self.budget), [cost for cost in (below, above) if cost]
        if self.target is None:
            asked, most = f"selection.ratio={self.ratio}", f"the largest achievable ratio is {largest / total:.3f}"
            nearest = [f"{cost / total:.4f}" for cost in near]
        else:
            asked = f"selection.target={self.target:,}"
            most = f"the smallest cost that can be had is {total - largest:,} of {total:,}"
            nearest = [f"{total - cost:,}" for cost in near]
        protected = len(self.protected_units(pool.units)) if self.protected else 0
        return InfeasibleBudget(
            f"{asked} (tolerance {self.tolerance}) of {self.budget} cannot be had: {most}, the nearest achievable "
            + (" and ".join(nearest) or "none")
            + (f", with {protected} of {len(pool.units)} units protected (selection.protected)" if protected else "")
        )


def group(name: str) -> str:
    """The group of channels that a unit belongs to."""
    return name.partition(":")[0]


def check_budget(budget: str) -> None:
    """Raise ValueError for what is none of BUDGETS."""
    if budget not in BUDGETS:
        raise ValueError(f"selection.budget={budget!r} is unknown; choose one of: {', '.join(BUDGETS)}")


def known(names: Iterable[str], units: Sequence[Unit], field_name: str, groups: Sequence[str] = ()) -> None:
    """Raise ValueError for a name that is no unit, with the nearest that are, or the nearest `groups` where given."""
    there = dict.fromkeys(unit.name for unit in units)
    for name in names:
        if name not in there:
            choices = list(dict.fromkeys(groups if groups and ":" not in name else there))
            near = difflib.get_close_matches(name, choices, n=3, cutoff=0.3) or choices[:3]
            raise ValueError(
                f"{field_name}: {name!r} is not a unit of this network; the nearest are: {', '.join(near)}"
            )
