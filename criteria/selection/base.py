"""An exact choice of the units to remove under a budget.

The budget is the fraction of a cost (parameters, MACs, FLOPs or measured latency) to remove, or how much of that cost
is to be left; the achieved fraction lies in [ratio, ratio + tolerance]. That is a constraint of the program, not a
stopping rule: scores may be negative, and minimal harm alone would then remove without limit. Several costs can be
limited at once, each with a ratio of its own.
"""

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

from criteria.base import Choice, Level, Shared, Unit, parse_choice
from criteria.selection.several import (
    check_budgets,
    check_ratio,
    check_single_budget,
    check_tolerance,
    describe_nearest,
    format_mapping,
)
from criteria.selection.solver import Limit, Program, Window, fits, greatest_cost, is_reachable, least_cost, solve


class Budget(Choice):
    """A cost of networks that a selection can limit."""

    PARAMS = "params"
    """parameters"""
    MACS = "macs"
    """multiply-accumulates of one forward pass at batch size 1"""
    FLOPS = "flops"
    """of image classifiers, counted as AutoBot counts them"""
    LATENCY = "latency"
    """measured, in microseconds"""


SLICE = re.compile(r"(-?\d+)?:(-?\d+)?")

Measure = Callable[[Sequence[str]], float]
"""The measured loss of the network without a set of units: their joint harm, not the sum of their scores."""


class InfeasibleBudget(ValueError):
    """No set of units fits the budget; the message names the nearest achievable ratios and the largest one."""


@dataclass(frozen=True)
class Pool:
    """The units to choose from, and their costs."""

    units: Sequence[Unit]
    """in the order of the forward pass"""
    totals: Mapping[str, int]
    """{budget: the whole backbone's cost}: params, macs, of classifiers flops, if measured latency in microseconds"""
    shared: Sequence[Shared] = ()
    savings: Mapping[str, int] | None = None
    """{unit or shared part: microseconds saved by its removal alone}; measured, so that they may be negative"""
    cost: Callable[[Sequence[str], str], int] | None = None
    """cost(names, budget): what a set of units frees, where that is not the sum over units (channels)"""

    def total(self, budget: str) -> int:
        """Return the whole backbone's cost; ValueError where this network has no such cost, or it was not measured."""
        if budget not in self.totals:
            raise ValueError(
                f"selection.budget={budget!r} has no total in this pool; choose one of: {', '.join(self.totals)}"
            )
        return self.totals[budget]

    def program(self, budget: str) -> Program:
        """Return the costs of sets of these units; ValueError for a latency budget where savings were not measured."""
        index = {unit.name: i for i, unit in enumerate(self.units)}
        if budget == Budget.LATENCY and not index.keys() <= (self.savings or {}).keys():
            raise ValueError(
                "selection.budget='latency' needs a measured saving of every unit, and this pool has "
                f"{'some' if self.savings else 'none'}; measure them, or choose one of: params, macs"
            )
        shared = [part for part in self.shared if set(part.units) <= index.keys()]
        return Program(
            [self.freed(unit, budget) for unit in self.units],
            [(frozenset(index[name] for name in part.units), self.freed(part, budget)) for part in shared],
            [(index[unit.inside], i) for i, unit in enumerate(self.units) if unit.inside in index],
        )

    def count_freed(self, names: Collection[str], budget: str) -> int:
        """Return the cost that the removal of a set of units frees; of latency, the sum of what single units save."""
        if self.cost is not None:
            return self.cost(list(names), budget) if names else 0
        return self.program(budget).cost([i for i, unit in enumerate(self.units) if unit.name in names])

    def freed(self, part: Unit | Shared, budget: str) -> int:
        """Return the cost that the removal of one part frees; 0 where it was measured to save nothing, or less."""
        if budget == Budget.LATENCY:
            return max((self.savings or {}).get(part.name, 0), 0)
        if budget == Budget.FLOPS:  # only classifiers have FLOPs, and their units are channels
            assert self.cost is not None
            return self.cost([part.name], budget)
        return part.params if budget == Budget.PARAMS else part.macs


class Selection:
    """A way to choose which units are removed, and how.

    `check` is called once, before anything is scored or timed; `changes` once, with the scores.
    """

    needs_scores = True
    """whether `changes` reads the scores"""
    needs_joint_loss = False
    """whether `changes` measures the joint loss of sets of units"""
    budget: str = Budget.PARAMS
    """the cost in which the achieved ratio is stated"""
    budgets: dict[str, float] | None = None
    """{budget: ratio} where several costs are limited at once, `budget` first; None for a single budget"""
    pareto: bool = False
    """whether the whole front of plans is made besides"""

    @property
    def needs_savings(self) -> bool:
        """Whether the measured latency that the removal of each unit saves is needed."""
        return self.pareto or Budget.LATENCY in (self.budgets or [self.budget])

    def protected_units(self, units: Sequence[Unit]) -> list[str]:
        """Return the names of the units that stay whatever their scores."""
        return []

    def check(self, pool: Pool) -> None:
        """Raise ValueError for a choice that this pool does not allow, whatever the scores.

        Of a latency budget the pool has no savings yet (None): then only what needs no measurement is checked.
        """

    def select(self, pool: Pool, scores: Mapping[str, float], measure: Measure | None = None) -> list[str]:
        """Return the names of the units to remove, in the order of the forward pass.

        Raises InfeasibleBudget where no set of units fits the budget.
        """
        raise NotImplementedError

    def changes(self, pool: Pool, scores: Mapping[str, float], measure: Measure | None = None) -> list[dict[str, str]]:
        """Return the changes of a plan: {"unit": name, "kind": how it is removed} for each removed unit."""
        kinds = {unit.name: unit.change for unit in pool.units}
        return [{"unit": name, "kind": kinds[name]} for name in self.select(pool, scores, measure)]


@dataclass
class Budgeted(Selection):
    """Base class of selections that meet a budget; subclasses implement `choose`, or `check_budget` and `select`.

    Args:
        ratio: the fraction of the backbone's `budget` to remove.
        tolerance: how much more may be removed, as a fraction of the whole backbone's cost; of several budgets one
            number for all, or {budget: tolerance}.
        budget: params | macs | flops | latency.
        protected: units that stay: by name, as slices of the units in the order of the forward pass (":4" the first
            four, "-2:" the last two), or all channels of a group by the group's name.
        target: the most that may be left of the cost, in parameters, MACs or FLOPs; given instead of `ratio`, which is
            then None.
        budgets: {budget: ratio} to limit several costs at once; `budget` and `ratio` are then its first entry.
        pareto: whether all plans on the front of harm and removed cost are wanted besides the chosen one; only where
            the selection `chooses_least_harm`.
    """

    ratio: float | None = None
    tolerance: float | dict[str, float] = 0.02
    budget: str = Budget.PARAMS.value
    protected: list[str] = field(default_factory=list)
    target: float | None = None
    budgets: dict[str, float] | None = None
    pareto: bool = False

    takes_several_budgets: ClassVar[bool] = False
    chooses_least_harm: ClassVar[bool] = False
    """whether it chooses the plan of least summed scores, as the plans of the front are"""

    def __post_init__(self) -> None:
        if self.pareto and not self.chooses_least_harm:
            raise ValueError(
                "selection.pareto=true: the front has the plans that selection=knapsack chooses, and "
                f"{type(self).__name__} chooses by another rule; choose selection=knapsack, or selection.pareto=false"
            )
        if self.budgets is not None:
            check_budgets(self.budgets, [str(budget) for budget in Budget])
            if not self.takes_several_budgets:
                raise ValueError(
                    f"selection.budgets={format_mapping(self.budgets)}: {type(self).__name__} meets one budget only; "
                    "choose selection=knapsack, refined or quadratic, or selection.budgets=null"
                )
            check_single_budget(self.budgets, self.budget, self.ratio, self.target)
            self.ratio = next(iter(self.budgets.values()))
        if (self.ratio is None) == (self.target is None):
            raise ValueError(
                f"selection.ratio={self.ratio}, selection.target={self.target}: give exactly one of the two (the "
                "fraction to remove, or what is to be left), and say null for the other"
            )
        if self.ratio is not None:
            check_ratio("selection.ratio", self.ratio)
        check_tolerance(self.tolerance, list(self.budgets or [self.budget]))
        self.budget = parse_choice(Budget, "selection.budget", self.budget)
        if self.target is not None and self.budget == Budget.LATENCY:
            raise ValueError(
                f"selection.target={self.target}: of the budget latency choose a ratio, or for a target one of: "
                "params, macs, flops"
            )

    def get_tolerance(self, budget: str) -> float:
        """Return how much more than the ratio may be removed of one budget, as a fraction of the whole."""
        return self.tolerance[budget] if isinstance(self.tolerance, Mapping) else self.tolerance

    def check(self, pool: Pool) -> None:
        """Raise an error for settings that this pool cannot satisfy.

        InfeasibleBudget: no set of units meets the budget, or the budgets together. ValueError: an invalid budget or
        target, a front of units whose costs do not add up, or an unknown protected unit (the message names the nearest
        one).
        """
        if self.pareto and pool.cost is not None:
            raise ValueError(
                "selection.pareto=true is for blocks and operators: these units are channels, whose costs do not add "
                "up; choose false"
            )
        budgets = self.budgets or [self.budget]
        untimed = Budget.LATENCY in budgets and pool.savings is None  # units are timed after they are scored
        if untimed:
            self.check_untimed(pool)
        if not untimed or len(budgets) > 1:
            self.check_budget(pool)

    def check_untimed(self, pool: Pool) -> None:
        """Raise ValueError for what is wrong with a latency budget whatever the measured times."""
        self.protected_units(pool.units)
        if pool.cost is not None:
            raise ValueError(
                "selection.budget='latency' is for blocks and operators; of channels choose params, macs, or for "
                "image classifiers flops"
            )

    def check_budget(self, pool: Pool) -> None:
        """Raise InfeasibleBudget where no set of units fits the budget, or those of the budgets that are known."""
        timed = pool.savings is not None
        limits = self.limits(pool, [name for name in self.budgets or [self.budget] if timed or name != Budget.LATENCY])
        for budget, (program, window) in limits.items():
            if not is_reachable(program, window):
                raise self.infeasible_window(pool, program, window, budget)
        (program, window), *others = limits.values()
        if others and solve(program, [0.0] * len(program.costs), window, others=others) is None:
            raise self.infeasible_together(pool, limits)

    def select(self, pool: Pool, scores: Mapping[str, float], measure: Measure | None = None) -> list[str]:
        limits, removable = self.limits(pool), self.removable_units(pool)
        chosen = self.choose(list(limits.values()), [scores[unit.name] for unit in removable])
        if chosen is None:
            self.check_budget(pool)
        assert chosen is not None and fits(chosen, limits.values())
        return [removable[i].name for i in sorted(chosen)]

    def choose(self, limits: Sequence[Limit], scores: Sequence[float]) -> list[int] | None:
        """Return the indices (into the unprotected units) of the units to remove; None where no set fits the limits.

        There is one limit, unless the selection `takes_several_budgets`.
        """
        raise NotImplementedError

    def limits(self, pool: Pool, budgets: Iterable[str] | None = None) -> dict[str, Limit]:
        """Return {budget: (costs of sets of unprotected units, window)} of all budgets, or of some."""
        names = (self.budgets or [self.budget]) if budgets is None else budgets
        windows = {name: self.window(pool, name) for name in names}  # first: an error for a budget of other networks
        return {name: (self.program(pool, name), window) for name, window in windows.items()}

    def removable_units(self, pool: Pool) -> list[Unit]:
        """Return the unprotected units."""
        protected = self.protected_units(pool.units)
        return [unit for unit in pool.units if unit.name not in protected]

    def protected_units(self, units: Sequence[Unit]) -> list[str]:
        """Return the names of the protected units; raises ValueError for an unknown one, naming the nearest."""
        names = [unit.name for unit in units]
        protected: set[str] = set()
        for entry in self.protected:
            ends = SLICE.fullmatch(entry)
            if ends and any(unit.level == Level.CHANNEL for unit in units):
                raise ValueError(
                    f"selection.protected={entry!r}: slices are of blocks; name channels, or groups of them, such as "
                    f"{group(names[0])!r}"
                )
            if ends:
                protected.update(names[slice(*(int(end) if end else None for end in ends.groups()))])
            else:
                protected.update([name for name in names if entry in (name, group(name))] or [entry])
        check_names(protected, units, "selection.protected", [group(name) for name in names])
        return [name for name in names if name in protected]

    def program(self, pool: Pool, budget: str | None = None) -> Program:
        """Return the costs of sets of unprotected units, in `budget` or another one.

        Raises ValueError where these are no sums over the units.
        """
        if pool.cost is not None:
            raise ValueError(
                "these units are channels, whose costs do not add up; choose selection=uniform for a language model, "
                "selection=threshold for other networks"
            )
        protected = self.protected_units(pool.units)
        return pool.program(budget or self.budget).remaining(
            set(), [i for i, unit in enumerate(pool.units) if unit.name not in protected]
        )

    def window(self, pool: Pool, budget: str | None = None) -> Window:
        """Return the least and the greatest cost to remove, in whole parameters, MACs, FLOPs or microseconds."""
        budget = budget or self.budget
        least, tolerance = self.least_removed(pool, budget), Fraction(str(self.get_tolerance(budget)))
        return math.ceil(least), math.floor(least + tolerance * pool.total(budget))

    def least_removed(self, pool: Pool, budget: str | None = None) -> Fraction:
        """Return the least cost to remove; raises ValueError for a target that is not below the network's cost."""
        budget = budget or self.budget
        total = pool.total(budget)
        if self.target is None:
            ratio = self.ratio if self.budgets is None else self.budgets[budget]
            return Fraction(str(ratio)) * total  # the decimal number as written, not as rounded to binary
        if not 0 < self.target < total:
            raise ValueError(
                f"selection.target={self.target:,} is out of range: the whole network has {total:,} {self.budget}; "
                f"choose 0 < target < {total:,}"
            )
        return total - Fraction(str(self.target))

    def infeasible_window(self, pool: Pool, program: Program, window: Window, budget: str) -> InfeasibleBudget:
        """Return the error for a window in which no set of units costs."""
        largest = greatest_cost(program, sum(program.all_costs))
        below, above = greatest_cost(program, window[0] - 1), least_cost(program, window[1] + 1)
        return self.infeasible(pool, largest, below, above, budget)

    def infeasible(
        self, pool: Pool, largest: int, below: int, above: int | None, budget: str | None = None
    ) -> InfeasibleBudget:
        """Return the error that names the largest removable cost, and the nearest below and above the window.

        Args:
            pool: the units.
            largest: the cost of all removable units.
            below: the greatest cost below the window.
            above: the least cost above the window, None where there is none.
            budget: the cost that is meant; None is `self.budget`.
        """
        budget = budget or self.budget
        total, near = pool.total(budget), [cost for cost in (below, above) if cost]
        if self.target is None:
            asked, most = f"selection.ratio={self.ratio}", f"the largest achievable ratio is {largest / total:.3f}"
            if self.budgets is not None:
                asked = f"selection.budgets.{budget}={self.budgets[budget]}"
            nearest = [f"{cost / total:.4f}" for cost in near]
        else:
            asked = f"selection.target={self.target:,}"
            most = f"the smallest cost that can be had is {total - largest:,} of {total:,}"
            nearest = [f"{total - cost:,}" for cost in near]
        return InfeasibleBudget(
            f"{asked} (tolerance {self.get_tolerance(budget)}) of {budget} cannot be had: {most}, the nearest "
            f"achievable {' and '.join(nearest) or 'none'}{self.describe_protected(pool)}"
        )

    def infeasible_together(self, pool: Pool, limits: Mapping[str, Limit]) -> InfeasibleBudget:
        """Return the error for budgets that can be met one by one, but not all at once."""
        nearest = describe_nearest(limits, pool.totals)
        tolerance = format_mapping(self.tolerance) if isinstance(self.tolerance, Mapping) else self.tolerance
        return InfeasibleBudget(
            f"selection.budgets={format_mapping(self.budgets or {})} (tolerance {tolerance}) cannot be had together: "
            f"with the other budgets met, {nearest}{self.describe_protected(pool)}; choose other ratios or a "
            "larger selection.tolerance"
        )

    def describe_protected(self, pool: Pool) -> str:
        """Return the end of a message: how many units are protected; empty where none is."""
        protected = len(self.protected_units(pool.units)) if self.protected else 0
        return f", with {protected} of {len(pool.units)} units protected (selection.protected)" if protected else ""


def group(name: str) -> str:
    """Return the group of a unit, by name: "a" for the channel "a:3", the name itself for other units."""
    return name.partition(":")[0]


def check_names(names: Iterable[str], units: Sequence[Unit], field_name: str, groups: Sequence[str] = ()) -> None:
    """Raise ValueError for a name that is no unit, with the nearest units, or the nearest `groups` where given."""
    known = dict.fromkeys(unit.name for unit in units)
    for name in names:
        if name not in known:
            choices = list(dict.fromkeys(groups if groups and ":" not in name else known))
            near = difflib.get_close_matches(name, choices, n=3, cutoff=0.3) or choices[:3]
            raise ValueError(
                f"{field_name}: {name!r} is not a unit of this network; the nearest are: {', '.join(near)}"
            )
