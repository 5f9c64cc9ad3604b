"""Several budgets at once, against enumeration of every subset."""

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.problems import Problem, problems, window_holds

from criteria.base import Unit
from criteria.selection.base import InfeasibleBudget, Pool
from criteria.selection.in_order import Greedy, Ranked
from criteria.selection.knapsack import Knapsack
from criteria.selection.refined import Refined
from criteria.selection.threshold import Threshold
from criteria.selection.uniform import Uniform

thoroughly = settings(derandomize=True, database=None, deadline=None, max_examples=100)
UNITS = [Unit("wide", "resnet", 60, 10), Unit("deep", "resnet", 10, 60), Unit("both", "resnet", 30, 30)]
POOL = Pool(UNITS, {"params": 100, "macs": 100})
SCORES = {"wide": 1.0, "deep": 1.0, "both": 3.0}


@dataclass(frozen=True)
class Costlier:
    """A problem whose units have a second cost, with a ratio and a tolerance of its own."""

    first: Problem
    macs: list[int]
    total: int
    ratio: float
    tolerance: float

    @property
    def pool(self) -> Pool:
        pool = self.first.pool
        units = [
            Unit(unit.name, unit.kind, unit.params, macs, inside=unit.inside)
            for unit, macs in zip(pool.units, self.macs, strict=True)
        ]
        return Pool(units, {"params": self.first.total, "macs": self.total}, pool.shared)

    def spent(self, chosen: tuple[int, ...]) -> int:
        return sum(self.macs[i] for i in chosen)

    def subsets(self) -> list[tuple[int, ...]]:
        """The subsets that fit both budgets."""
        return [
            chosen
            for chosen in self.first.subsets()
            if window_holds(self.ratio, self.tolerance, self.spent(chosen), self.total)
        ]

    def selection(self, way: type[Knapsack] = Knapsack) -> Knapsack:
        budgets = {"params": self.first.ratio, "macs": self.ratio}
        return way(budgets=budgets, tolerance={"params": self.first.tolerance, "macs": self.tolerance})

    def places(self, names: list[str]) -> tuple[int, ...]:
        return tuple(int(name.removeprefix("unit")) for name in names)


@st.composite
def costlier(draw: st.DrawFn) -> Costlier:
    """Both windows are around the costs of one subset, or of two different ones, so that many problems are feasible."""
    first = draw(problems((4, 1_000, 10**7)))
    count = len(first.costs)
    macs = draw(st.lists(st.integers(1, draw(st.sampled_from([4, 10**6]))), min_size=count, max_size=count))
    total = sum(macs) + draw(st.integers(0, sum(macs)))
    one = draw(st.sampled_from(first.allowed()))
    other = draw(st.sampled_from([one, one, one, draw(st.sampled_from(first.allowed()))]))
    spent = (first.spent(one), sum(macs[i] for i in other))
    ratios = [min(max(64 * cost // whole, 1), 63) / 64 for cost, whole in zip(spent, (first.total, total), strict=True)]
    tolerances = [draw(st.sampled_from([1, 8, 16])) / 64 for _ in ratios]
    return Costlier(replace(first, ratio=ratios[0], tolerance=tolerances[0]), macs, total, ratios[1], tolerances[1])


@thoroughly
@given(problem=costlier())
def test_two_budgets_are_met_at_the_least_harm_of_all_subsets(problem):
    subsets = problem.subsets()
    assume(subsets)
    chosen = problem.places(problem.selection().select(problem.pool, problem.first.named_scores))
    assert chosen in subsets
    least = min(map(problem.first.harm, subsets))
    assert problem.first.harm(chosen) == least
    ties = [subset for subset in subsets if problem.first.harm(subset) == least]
    spent = [(problem.first.spent(subset), problem.spent(subset)) for subset in ties]
    assert (problem.first.spent(chosen), problem.spent(chosen)) == min(spent)


@thoroughly
@given(problem=costlier())
def test_two_budgets_are_infeasible_exactly_if_no_subset_fits(problem):
    feasible = bool(problem.subsets())
    for call in (problem.selection().check, lambda pool: problem.selection().select(pool, problem.first.named_scores)):
        if feasible:
            call(problem.pool)
        else:
            with pytest.raises(InfeasibleBudget, match=r"selection\.budgets.* cannot be had"):
                call(problem.pool)


@settings(thoroughly, max_examples=20)
@given(problem=problems((1_000, 10**7)))
def test_one_entry_of_budgets_is_the_single_budget(problem):
    assume(problem.subsets())
    several = Knapsack(budgets={"params": problem.ratio}, tolerance=problem.tolerance)
    chosen = several.select(problem.pool, problem.named_scores)
    assert tuple(int(name.removeprefix("unit")) for name in chosen) == problem.solved(Knapsack)


@settings(thoroughly, max_examples=20)
@given(problem=costlier())
def test_refined_plans_keep_to_both_budgets(problem):
    assume(problem.subsets())
    measured = []

    def measure(names):
        measured.append(problem.places(list(names)))
        return -float(len(measured))

    problem.selection(Refined).select(problem.pool, problem.first.named_scores, measure)
    assert set(measured) <= set(problem.subsets())


@pytest.mark.parametrize(
    ("budgets", "removed"),
    [
        ({"params": 0.6}, ["wide"]),
        ({"params": 0.6, "macs": 0.6}, ["wide", "deep"]),
        ({"params": 0.6, "macs": 0.3}, ["wide", "both"]),
        ({"macs": 0.6}, ["deep"]),
    ],
)
def test_a_second_budget_changes_the_plan(budgets, removed):
    selection = Knapsack(budgets=budgets, budget=next(iter(budgets)), tolerance=0.3)
    assert selection.select(POOL, SCORES) == removed


def test_a_latency_among_the_budgets_waits_for_its_measurement():
    selection = Knapsack(budgets={"params": 0.7, "latency": 0.5}, tolerance={"params": 0.3, "latency": 0.5})
    assert selection.needs_savings and not Knapsack(budgets={"params": 0.7, "macs": 0.5}).needs_savings
    selection.check(POOL)
    with pytest.raises(InfeasibleBudget, match=r"selection\.budgets\.params=0\.99 .* ratio is 0\.700"):
        Knapsack(budgets={"params": 0.99, "latency": 0.5}).check(Pool(UNITS[:2], POOL.totals))
    savings = {"wide": 100, "deep": 500, "both": -10}
    timed = Pool(UNITS, {**POOL.totals, "latency": 1000}, savings=savings)
    assert selection.select(timed, SCORES) == ["wide", "deep"]


def test_budgets_that_exclude_each_other_name_what_can_be_had():
    message = (
        "selection.budgets={params: 0.6, macs: 0.5} (tolerance 0.05) cannot be had together: with the other budgets "
        "met, the nearest achievable ratio of params is 0.1000 (the largest 0.1000), the nearest achievable ratio of "
        "macs is 0.1000 (the largest 0.1000); choose other ratios or a larger selection.tolerance"
    )
    units = [UNITS[0], Unit("deep", "resnet", 10, 50), Unit("odd", "resnet", 30, 90)]
    pool = Pool(units, {"params": 100, "macs": 100})
    with pytest.raises(InfeasibleBudget) as caught:
        Knapsack(budgets={"params": 0.6, "macs": 0.5}, tolerance=0.05).check(pool)
    assert str(caught.value) == message


@pytest.mark.parametrize("way", [Ranked, Greedy, Threshold, Uniform])
def test_other_selections_refuse_several_budgets_by_name(way):
    message = f"selection.budgets={{params: 0.5, macs: 0.3}}: {way.__name__} meets one budget only; choose selection="
    with pytest.raises(ValueError, match=re.escape(message)):
        way(budgets={"params": 0.5, "macs": 0.3})


TWO = {"params": 0.5, "macs": 0.3}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"budgets": TWO, "ratio": 0.4},
            "selection.ratio=0.4 differs from the first of selection.budgets={params:",
        ),
        ({"budgets": TWO, "budget": "macs"}, "selection.budget=macs differs from the first of selection.budgets={"),
        ({"budgets": TWO, "target": 10}, "selection.target=10: several budgets are given as ratios"),
        ({"budgets": {}}, "selection.budgets={} has no budgets; give the ratio of each"),
        ({"budgets": 0.5}, "selection.budgets=0.5 has no budgets"),
        (
            {"budgets": {"size": 0.5}},
            "selection.budgets='size' is unknown; choose one of: params, macs, flops",
        ),
        ({"budgets": {"params": 50}}, "selection.budgets.params=50 is out of range; choose 0 < ratio < 1 (a fraction"),
        ({"budgets": TWO, "tolerance": {"params": 0.1}}, "selection.tolerance={params: 0.1}: choose one number, or a"),
        ({"budgets": TWO, "tolerance": {"params": 0.1, "macs": 2}}, "selection.tolerance.macs=2 is out of range"),
    ],
)
def test_wrong_fields_of_several_budgets_are_named(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Knapsack(**fields)


@pytest.mark.parametrize("count", [38, 87])
def test_two_budgets_of_a_large_network_are_met(count):
    """As many units as SD 1.x and SDXL have, of nine sizes, at resolutions that make MACs no function of parameters."""
    rng = np.random.default_rng(count)
    sizes, positions = rng.integers(10**6, 5 * 10**7, 9), [64, 256, 1024, 4096]
    units = []
    for i in range(count):
        params = int(rng.choice(sizes))
        units.append(Unit(f"unit{i}", "block", params, params * int(rng.choice(positions))))
    totals = {"params": sum(unit.params for unit in units), "macs": sum(unit.macs for unit in units)}
    scores = {unit.name: unit.params * float(np.exp(rng.normal(0, 1.5))) for unit in units}
    removed = set(Knapsack(budgets={"params": 0.5, "macs": 0.4}).select(Pool(units, totals), scores))
    for budget, ratio in (("params", 0.5), ("macs", 0.4)):
        freed = sum(getattr(unit, budget) for unit in units if unit.name in removed)
        assert ratio <= freed / totals[budget] <= ratio + 0.02
