"""The choice of units under a budget, against enumeration of every subset."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from criteria.base import Unit
from criteria.selection import Given, Greedy, InfeasibleBudget, Knapsack, Ranked, Selection, solve

WAYS = [Knapsack, Ranked, Greedy]
thoroughly = settings(derandomize=True, database=None, deadline=None, max_examples=100)


@dataclass(frozen=True)
class Problem:
    """Units by cost and score, and a budget in 64ths, which floating point holds exactly."""

    costs: Sequence[int]
    scores: Sequence[float]
    total: int
    ratio: float
    tolerance: float

    @property
    def units(self) -> list[Unit]:
        return [Unit(f"unit{i}", "resnet", cost, 0) for i, cost in enumerate(self.costs)]

    @property
    def named_scores(self) -> dict[str, float]:
        return {f"unit{i}": score for i, score in enumerate(self.scores)}

    def fits(self, spent: int) -> bool:
        return window_holds(self.ratio, self.tolerance, spent, self.total)

    def subsets(self) -> list[tuple[int, ...]]:
        """Every subset that fits the budget, as places in order."""
        places = range(len(self.costs))
        every = itertools.chain.from_iterable(itertools.combinations(places, n) for n in range(len(self.costs) + 1))
        return [chosen for chosen in every if self.fits(self.spent(chosen))]

    def spent(self, chosen: Sequence[int]) -> int:
        return sum(self.costs[i] for i in chosen)

    def harm(self, chosen: Sequence[int]) -> float:
        return math.fsum(self.scores[i] for i in chosen)

    def solved(self, way: type[Selection], **changed: float) -> tuple[int, ...] | None:
        """The places of the chosen units, None where the budget was called infeasible."""
        budget = {"ratio": self.ratio, "tolerance": self.tolerance} | changed
        try:
            names = way(**budget).select(self.units, self.named_scores, self.total)
        except InfeasibleBudget:
            return None
        return tuple(int(name.removeprefix("unit")) for name in names)


def window_holds(ratio: float, tolerance: float, spent: int, total: int) -> bool:
    """ratio <= spent / total <= ratio + tolerance, for the decimal numbers that a person wrote."""
    low, width = Fraction(str(ratio)), Fraction(str(tolerance))
    return low * total <= spent <= (low + width) * total


SIGNED_WHOLE = st.integers(-4, 4).map(float)
TIES = st.sampled_from([0.0, 1.0, 2.0])
UNIT = st.floats(-1, 1, allow_subnormal=False)
DECADES = st.floats(-9, 3).map(lambda power: 10**power)
SIGNED_DECADES = st.tuples(st.sampled_from([1, -1]), st.floats(-6, 1)).map(lambda pair: pair[0] * 10 ** pair[1])
ZERO = st.just(0.0)


@st.composite
def problems(draw: st.DrawFn, largest: Sequence[int] = (4, 1_000, 10**7, 10**10), least_ratio: int = 1) -> Problem:
    count = draw(st.integers(1, 9))
    cost = st.integers(1, draw(st.sampled_from(largest)))
    score = draw(st.sampled_from([SIGNED_WHOLE, TIES, UNIT, DECADES, SIGNED_DECADES, ZERO]))
    costs = draw(st.lists(cost, min_size=count, max_size=count))
    scores = draw(st.lists(score, min_size=count, max_size=count))
    total = sum(costs) + draw(st.integers(0, sum(costs)))
    ratio = draw(st.integers(least_ratio, 63)) / 64
    return Problem(costs, scores, total, ratio, draw(st.sampled_from([0, 1, 4, 16, 32])) / 64)


# The knapsack


@thoroughly
@given(problems())
def test_the_knapsack_finds_a_set_where_there_is_one_and_none_where_there_is_none(problem):
    chosen = problem.solved(Knapsack)
    assert (chosen is not None) == bool(problem.subsets())
    assert chosen is None or chosen in problem.subsets()


@thoroughly
@given(problems())
@example(Problem([5, 4, 3], [-1.0, -2.0, -3.0], 12, 1 / 64, 63 / 64))
@example(Problem([5, 4, 3], [1e-9, 1e3, 1e-9], 16, 30 / 64, 16 / 64))
def test_the_knapsack_does_the_least_harm_that_any_set_does(problem):
    subsets = problem.subsets()
    assume(subsets)
    assert problem.harm(problem.solved(Knapsack)) == min(map(problem.harm, subsets))


def test_a_set_of_less_harm_is_not_lost_in_the_solvers_simplifications():
    """HiGHS' presolve gives [1, 2], of harm 6, as the optimum of this program; [0, 3] fits too, and its harm is 2."""
    costs, scores = [6609880, 3575637, 9346131, 4624044], [4.0, 2.0, 4.0, -2.0]
    assert solve(costs, scores, (10156967, 13970174)) == [0, 3]


@thoroughly
@given(problems())
@example(Problem([6609880, 3575637, 9346131, 4624044], [4.0, 2.0, 4.0, -2.0], 43336388, 15 / 64, 32 / 64))
@example(Problem([50286620252, 71706993425, 78828035969], [0.0] * 3, 2 * 10**11, 0.5, 20 / 64))
@example(
    Problem([4905482, 2253960, 4793250, 639086, 1400849, 9302506, 3852896, 6497675], [0.0] * 8, 3 * 10**7, 0.5, 0.125)
)
def test_of_sets_that_do_the_same_harm_the_knapsack_takes_the_one_that_overshoots_least(problem):
    subsets = problem.subsets()
    assume(subsets)
    chosen = problem.solved(Knapsack)
    assert problem.spent(chosen) == min(
        map(problem.spent, (s for s in subsets if problem.harm(s) == problem.harm(chosen)))
    )


@settings(thoroughly, max_examples=60)
@given(problems(), st.integers(1, 62), st.integers(1, 62))
def test_more_to_remove_never_does_less_harm(problem, one, other):
    """Budgets that share their upper end: every set that meets the larger ratio meets the smaller one."""
    smaller, larger = (
        problem.solved(Knapsack, ratio=ratio / 64, tolerance=(63 - ratio) / 64) for ratio in sorted((one, other))
    )
    assume(larger is not None)
    assert problem.harm(smaller) <= problem.harm(larger)


@settings(thoroughly, max_examples=60)
@given(problems())
def test_no_other_way_of_choosing_does_less_harm_than_the_knapsack(problem):
    assume(problem.subsets())
    least = problem.harm(problem.solved(Knapsack))
    assert least <= problem.harm(problem.solved(Greedy)) and least <= problem.harm(problem.solved(Ranked))


def test_units_whose_removal_helps_are_taken_up_to_the_tolerance_and_no_further():
    problem = Problem([10, 10, 10, 10], [-1.0, -1.0, -1.0, -1.0], 40, 0.25, 0.25)
    assert problem.spent(problem.solved(Knapsack)) == 20


# Every way


@pytest.mark.parametrize("way", WAYS)
@thoroughly
@given(problem=problems())
def test_a_budget_that_some_set_meets_is_met(way, problem):
    subsets = problem.subsets()
    assume(subsets)
    assert problem.solved(way) in subsets


@pytest.mark.parametrize("way", WAYS)
@settings(thoroughly, max_examples=30)
@given(problem=problems())
def test_the_same_problem_has_the_same_answer(way, problem):
    first = problem.solved(way)
    assert [problem.solved(way) for _ in range(3)] == [first] * 3


@pytest.mark.parametrize(
    ("ratio", "tolerance", "spent"), [(0.07, 0.0, 7), (0.55, 0.0, 55), (0.5, 0.08, 58), (0.3, 0.0, 30)]
)
def test_the_ends_of_the_window_are_those_of_the_decimal_numbers(ratio, tolerance, spent):
    """0.55 * 100 is 55.00000000000001 in floating point, (0.5 + 0.08) * 100 is 57.99999999999999."""
    units = [Unit("fits", "resnet", spent, 0), Unit("rest", "resnet", 99, 0)]
    assert window_holds(ratio, tolerance, spent, 100)
    assert Knapsack(ratio, tolerance).select(units, {"fits": 1.0, "rest": 0.0}, 100) == ["fits"]


@pytest.mark.parametrize("way", WAYS)
@thoroughly
@given(
    costs=st.lists(st.integers(1, 40), min_size=1, max_size=7),
    ratio=st.integers(1, 99).map(lambda n: n / 100),
    tolerance=st.sampled_from([0.0, 0.01, 0.07, 0.2]),
)
def test_what_is_removed_lies_in_the_window_in_exact_arithmetic(way, costs, ratio, tolerance):
    problem = Problem(costs, [float(i % 3) for i in range(len(costs))], 100, ratio, tolerance)
    assert (problem.solved(way) is not None) == bool(problem.subsets())
    assert problem.solved(way) in [*problem.subsets(), None]


@pytest.mark.parametrize("way", WAYS)
def test_names_come_in_the_order_of_the_forward_pass(way):
    units = [Unit(name, "resnet", 10, 0) for name in ("z", "a", "m")]
    assert way(0.6, 0.1).select(units, {"z": 2.0, "a": 1.0, "m": 0.0}, 30) == ["a", "m"]
    assert way(0.9, 0.1).select(units, {"z": 2.0, "a": 1.0, "m": 0.0}, 30) == ["z", "a", "m"]


@pytest.mark.parametrize("way", WAYS)
def test_the_budget_says_which_cost_counts(way):
    units = [Unit("wide", "resnet", 90, 10), Unit("deep", "resnet", 10, 90)]
    scores = {"wide": 1.0, "deep": 1.0}
    assert way(0.85, 0.1, budget="params").select(units, scores, 100) == ["wide"]
    assert way(0.85, 0.1, budget="macs").select(units, scores, 100) == ["deep"]


# Ranked and greedy


def in_order(problem: Problem, order: Sequence[int]) -> tuple[int, ...]:
    """Of the sets that fit, the one that has the earliest units of the order, up to where the budget is met."""
    best = max(problem.subsets(), key=lambda chosen: [i in chosen for i in order])
    taken: list[int] = []
    for i in order:
        if i in best and not problem.fits(problem.spent(taken)):
            taken.append(i)
    return tuple(sorted(taken))


@thoroughly
@given(problems())
def test_ranked_takes_the_lowest_scores_that_can_still_meet_the_budget(problem):
    assume(problem.subsets())
    order = sorted(range(len(problem.costs)), key=lambda i: (problem.scores[i], i))
    assert problem.solved(Ranked) == in_order(problem, order)


@thoroughly
@given(problems())
def test_greedy_takes_the_lowest_scores_per_cost_that_can_still_meet_the_budget(problem):
    assume(problem.subsets())
    order = sorted(range(len(problem.costs)), key=lambda i: (problem.scores[i] / problem.costs[i], i))
    assert problem.solved(Greedy) == in_order(problem, order)


@given(st.permutations(range(6)), st.integers(1, 6))
@settings(derandomize=True, database=None, deadline=None, max_examples=30)
def test_ranked_takes_units_of_equal_cost_in_order_of_their_scores(scores, count):
    problem = Problem([10] * 6, [float(score) for score in scores], 64, 10 * count / 64, 0.0)
    assert problem.solved(Ranked) == tuple(i for i in range(6) if scores[i] < count)


# Protected and given units

NAMES = ["down_blocks.0.resnets.0", "mid_block.attentions.0", "up_blocks.0.resnets.0", "up_blocks.1.resnets.0"]
UNITS = [Unit(name, "resnet", 10, 10) for name in NAMES]
SCORES = dict(zip(NAMES, [0.0, 1.0, 2.0, 3.0], strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_protected_unit_stays_even_where_it_is_the_cheapest(way):
    assert way(0.5, 0.0).select(UNITS, SCORES, 40) == NAMES[:2]
    assert way(0.5, 0.0, protected=NAMES[:1]).select(UNITS, SCORES, 40) == NAMES[1:3]
    assert way(0.5, 0.0, protected=NAMES[:2]).select(UNITS, SCORES, 40) == NAMES[2:]


@pytest.mark.parametrize("way", WAYS)
@settings(thoroughly, max_examples=40)
@given(problem=problems(), data=st.data())
def test_choosing_beside_protected_units_is_choosing_among_the_others(way, problem, data):
    protected = data.draw(st.sets(st.sampled_from([unit.name for unit in problem.units])))
    others = [unit for unit in problem.units if unit.name not in protected]
    found = []
    for units, names in ((problem.units, protected), (others, [])):
        try:
            budget = way(problem.ratio, problem.tolerance, protected=sorted(names))
            found.append(budget.select(units, problem.named_scores, problem.total))
        except InfeasibleBudget:
            found.append(None)
    assert found[0] == found[1]
    assert found[0] is None or not protected & set(found[0])


def test_a_protected_unit_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=re.escape("selection.protected: 'mid_block.attention.0'")) as caught:
        Knapsack(0.5, 0.0, protected=["mid_block.attention.0"]).select(UNITS, SCORES, 40)
    assert "the nearest are: mid_block.attentions.0" in str(caught.value)


def test_given_units_are_taken_whatever_they_come_to():
    assert Given([NAMES[3], NAMES[0]]).select(UNITS, {}, 40) == [NAMES[0], NAMES[3]]
    assert Given(NAMES).select(UNITS, {}, 40) == NAMES


def test_a_given_unit_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=re.escape("selection.units: 'up_block.0.resnet.0'")) as caught:
        Given([NAMES[0], "up_block.0.resnet.0"]).select(UNITS, SCORES, 40)
    assert "the nearest are: up_blocks.0.resnets.0" in str(caught.value)


def test_giving_no_unit_at_all_is_an_error():
    with pytest.raises(ValueError, match=r"selection\.units is empty"):
        Given([]).select(UNITS, SCORES, 40)


# Budgets that cannot be met


@pytest.mark.parametrize("way", WAYS)
@thoroughly
@given(problem=problems(largest=(4, 1_000, 10**7)))
@example(problem=Problem([30, 30], [1.0, 1.0], 100, 0.25, 0.0))
@example(problem=Problem([30, 30], [1.0, 1.0], 100, 0.5, 1 / 64))
@example(problem=Problem([30, 30], [1.0, 1.0], 100, 0.75, 0.25))
def test_an_infeasible_budget_names_the_nearest_ratios_and_the_largest(way, problem):
    assume(not problem.subsets())
    with pytest.raises(InfeasibleBudget) as caught:
        way(problem.ratio, problem.tolerance).select(problem.units, problem.named_scores, problem.total)
    places = range(len(problem.costs))
    sums = {problem.spent(s) for n in places for s in itertools.combinations(places, n + 1)}
    near = [max((s for s in sums if s < problem.ratio * problem.total), default=None)]
    near += [min((s for s in sums if s > (problem.ratio + problem.tolerance) * problem.total), default=None)]
    nearest = " and ".join(f"{s / problem.total:.4f}" for s in near if s is not None)
    assert f"the largest achievable ratio is {max(sums) / problem.total:.3f}, " in str(caught.value)
    assert f"the nearest achievable {nearest}" in str(caught.value)
    assert f"selection.ratio={problem.ratio} (tolerance {problem.tolerance})" in str(caught.value)


def test_an_infeasible_budget_says_how_many_units_are_protected():
    with pytest.raises(InfeasibleBudget, match=r"largest achievable ratio is 0\.250.*with 3 units protected"):
        Knapsack(0.5, 0.1, protected=NAMES[1:]).select(UNITS, SCORES, 40)
    with pytest.raises(InfeasibleBudget, match=r"largest achievable ratio is 0\.000, the nearest achievable none"):
        Knapsack(0.5, 0.1, protected=NAMES).select(UNITS, SCORES, 40)


# Values out of range


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ratio", [0, 1, 0.0, 1.0, -0.1, 1.5, 50, math.nan, math.inf, -math.inf])
def test_a_ratio_outside_0_to_1_is_refused(way, ratio):
    with pytest.raises(ValueError, match=re.escape(f"selection.ratio={ratio} is out of range; choose 0 < ratio < 1")):
        way(ratio)


def test_a_percentage_is_answered_with_the_fraction_it_stands_for():
    with pytest.raises(ValueError, match=re.escape("(a fraction, not a percentage: 0.5?)")):
        Knapsack(50)


@pytest.mark.parametrize("tolerance", [-0.1, 1, 1.5, math.nan, math.inf])
def test_a_tolerance_outside_0_to_1_is_refused(tolerance):
    message = f"selection.tolerance={tolerance} is out of range; choose 0 <= tolerance < 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        Knapsack(0.5, tolerance)


@pytest.mark.parametrize("budget", ["flops", "", "Params"])
def test_an_unknown_budget_lists_those_there_are(budget):
    message = f"selection.budget={budget!r} is unknown; choose one of: params, macs"
    with pytest.raises(ValueError, match=re.escape(message)):
        Knapsack(0.5, budget=budget)


# On a network


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("way", WAYS)
def test_the_student_that_is_built_is_smaller_by_exactly_what_was_chosen(teacher, way, budget):
    def cost(network) -> int:
        return network.params() if budget == "params" else network.macs().linear

    units = teacher.units()
    scores = {unit.name: float(i % 4) for i, unit in enumerate(units)}
    removed = way(0.4, 0.1, budget=budget).select(units, scores, cost(teacher))
    freed = cost(teacher) - cost(teacher.pruned(removed))
    assert freed == sum(getattr(unit, budget) for unit in units if unit.name in removed)
    assert window_holds(0.4, 0.1, freed, cost(teacher))
