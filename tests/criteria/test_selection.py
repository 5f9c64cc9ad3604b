"""The choice of units under a budget, against enumeration of every subset."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support.networks import bypasses, tiny_backbone
from support.problems import Problem, problems, window_holds

from criteria.base import Shared, Unit
from criteria.selection.base import InfeasibleBudget, Pool
from criteria.selection.given import Given
from criteria.selection.in_order import Greedy, Ranked
from criteria.selection.knapsack import Knapsack
from criteria.selection.uniform import Uniform

WAYS = [Knapsack, Ranked, Greedy]
NAMES = ["down_blocks.0.resnets.0", "mid_block.attentions.0", "up_blocks.0.resnets.0", "up_blocks.1.resnets.0"]
UNITS = [Unit(name, "resnet", 10, 10) for name in NAMES]
SCORES = dict(zip(NAMES, [0.0, 1.0, 2.0, 3.0], strict=True))
POOL = Pool(UNITS, {"params": 40, "macs": 40})
thoroughly = settings(derandomize=True, database=None, deadline=None, max_examples=100)


# The knapsack


@thoroughly
@given(problems())
def test_the_knapsack_finds_a_set_exactly_if_one_exists(problem):
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


@thoroughly
@given(problems())
@example(Problem([6609880, 3575637, 9346131, 4624044], [4.0, 2.0, 4.0, -2.0], 43336388, 15 / 64, 32 / 64))
@example(Problem([50286620252, 71706993425, 78828035969], [0.0] * 3, 2 * 10**11, 0.5, 20 / 64))
@example(
    Problem([4905482, 2253960, 4793250, 639086, 1400849, 9302506, 3852896, 6497675], [0.0] * 8, 3 * 10**7, 0.5, 0.125)
)
def test_the_knapsack_breaks_ties_by_the_least_overshoot(problem):
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


def test_units_with_negative_scores_are_taken_up_to_the_tolerance():
    problem = Problem([10, 10, 10, 10], [-1.0, -1.0, -1.0, -1.0], 40, 0.25, 0.25)
    assert problem.spent(problem.solved(Knapsack)) == 20


# Every way


@pytest.mark.parametrize("way", WAYS)
@thoroughly
@given(problem=problems())
@pytest.mark.slow
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
    assert Knapsack(ratio, tolerance).select(Pool(units, {"params": 100}), {"fits": 1.0, "rest": 0.0}) == ["fits"]


@pytest.mark.parametrize("way", WAYS)
@settings(thoroughly, max_examples=50)
@given(
    costs=st.lists(st.integers(1, 40), min_size=1, max_size=7),
    ratio=st.integers(1, 99).map(lambda n: n / 100),
    tolerance=st.sampled_from([0.0, 0.01, 0.07, 0.2]),
)
def test_the_removed_cost_lies_in_the_window_exactly(way, costs, ratio, tolerance):
    problem = Problem(costs, [float(i % 3) for i in range(len(costs))], 100, ratio, tolerance)
    assert (problem.solved(way) is not None) == bool(problem.subsets())
    assert problem.solved(way) in [*problem.subsets(), None]


@pytest.mark.parametrize("way", WAYS)
def test_names_come_in_the_order_of_the_forward_pass(way):
    units = [Unit(name, "resnet", 10, 0) for name in ("z", "a", "m")]
    pool, scores = Pool(units, {"params": 30}), {"z": 2.0, "a": 1.0, "m": 0.0}
    assert way(0.6, 0.1).select(pool, scores) == ["a", "m"]
    assert way(0.9, 0.1).select(pool, scores) == ["z", "a", "m"]


@pytest.mark.parametrize("way", WAYS)
def test_the_budget_says_which_cost_counts(way):
    units = [Unit("wide", "resnet", 90, 10), Unit("deep", "resnet", 10, 90)]
    pool = Pool(units, {"params": 100, "macs": 100, "latency": 1000}, savings={"wide": 100, "deep": 900})
    scores = {"wide": 1.0, "deep": 1.0}
    assert way(0.85, 0.1, budget="params").select(pool, scores) == ["wide"]
    assert way(0.85, 0.1, budget="macs").select(pool, scores) == ["deep"]
    assert way(0.85, 0.1, budget="latency").select(pool, scores) == ["deep"]


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_says_how_each_unit_goes(way):
    units = [Unit("a", "conv", 10, 0, change="replace"), Unit("b", "resnet", 10, 0), Unit("c", "resnet", 10, 0)]
    changes = way(0.6, 0.1).changes(Pool(units, {"params": 30}), {"a": 0.0, "b": 1.0, "c": 2.0})
    assert changes == [{"unit": "a", "kind": "replace"}, {"unit": "b", "kind": "bypass"}]


# Latency


@pytest.mark.parametrize("way", WAYS)
def test_a_removal_that_saves_no_time_counts_nothing(way):
    units = [Unit(name, "resnet", 10, 10) for name in ("slower", "faster", "fast")]
    savings = {"slower": -500, "faster": 300, "fast": 100}
    pool, scores = Pool(units, {"latency": 1000}, savings=savings), {"slower": 9.0, "faster": 1.0, "fast": 2.0}
    assert way(0.25, 0.05, budget="latency").select(pool, scores) == ["faster"]
    with pytest.raises(InfeasibleBudget, match=r"of latency .* ratio is 0\.400, the nearest achievable 0\.4000"):
        way(0.45, 0.05, budget="latency").check(pool)


def test_a_shared_part_saves_the_time_that_was_measured_for_it():
    units = [Unit("a", "resnet", 10, 10), Unit("b", "resnet", 10, 10)]
    shared, savings = [Shared("c", ("a", "b"), 10, 10)], {"a": 100, "b": 100}
    for measured, ratio in (({}, 0.2), ({"c": 50}, 0.25), ({"c": -50}, 0.2)):
        pool = Pool(units, {"latency": 1000}, shared, savings | measured)
        assert Knapsack(ratio, 0.0, "latency").select(pool, {"a": 1.0, "b": 1.0}) == ["a", "b"]


@pytest.mark.parametrize("savings", [None, {}, {NAMES[0]: 100}])
def test_a_latency_budget_needs_the_saving_of_every_unit(savings):
    with pytest.raises(ValueError, match=r"selection\.budget='latency' needs a measured saving of every unit"):
        Knapsack(0.5, budget="latency").select(Pool(UNITS, {"latency": 1000}, savings=savings), {})


def test_a_budget_that_was_not_measured_lists_those_that_were():
    pool = Pool(UNITS, {"params": 40, "macs": 40}, savings=dict.fromkeys(NAMES, 10))
    with pytest.raises(ValueError, match=r"selection\.budget='latency' has no total .*choose one of: params, macs"):
        Knapsack(0.5, budget="latency").check(pool)


@pytest.mark.parametrize("way", [*WAYS, Uniform])
def test_flops_of_a_network_that_has_none_lists_what_it_has(way):
    with pytest.raises(ValueError, match=r"selection\.budget='flops' has no total .*choose one of: params, macs"):
        way(0.5, budget="flops").check(POOL)


# What is to be left


@pytest.mark.parametrize("way", WAYS)
@settings(thoroughly, max_examples=50)
@given(problem=problems())
def test_a_target_is_the_ratio_that_leaves_it(way, problem):
    target = problem.total - problem.ratio * problem.total  # a multiple of 1/64
    assert problem.solved(way, ratio=None, target=target) == problem.solved(way)


@pytest.mark.parametrize("way", WAYS)
def test_at_most_the_target_is_left_and_at_least_the_tolerance_below_it(way):
    def removed(target: float, tolerance: float) -> list[str]:
        return way(target=target, tolerance=tolerance).select(POOL, SCORES)

    assert removed(30, 0.0) == NAMES[:1] and removed(20, 0.0) == NAMES[:2]
    for target, tolerance in ((29.5, 0.2375), (29, 0.225), (21, 0.025)):
        assert removed(target, tolerance) == NAMES[:2]
        with pytest.raises(InfeasibleBudget):
            removed(target, tolerance - 0.001)


def test_an_infeasible_target_names_the_nearest_and_the_smallest_cost():
    message = (
        "selection.target=25 (tolerance 0.1) of macs cannot be had: the smallest cost that can be had is 10 of 40, "
    )
    with pytest.raises(
        InfeasibleBudget, match=re.escape(message + "the nearest achievable 30 and 20, with 1 of 4 units")
    ):
        Knapsack(target=25, tolerance=0.1, budget="macs", protected=NAMES[:1]).check(POOL)
    units = [Unit("a", "resnet", 4_000_000, 0), Unit("b", "resnet", 1_000_000, 0)]
    with pytest.raises(
        InfeasibleBudget, match=r"selection\.target=1,500,000\.0 .* 3,000,000 of 8,000,000, .* 3,000,000$"
    ):
        Ranked(target=1.5e6).check(Pool(units, {"params": 8_000_000}))


@pytest.mark.parametrize("target", [40, 40.0, 1e9, 0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("way", WAYS)
def test_a_target_that_is_no_part_of_the_whole_names_it(way, target):
    with pytest.raises(
        ValueError, match=r"selection\.target=.* the whole network has 40 params; choose 0 < target < 40"
    ):
        way(target=target).check(POOL)


@pytest.mark.parametrize("given", [{}, {"ratio": 0.5, "target": 20}])
@pytest.mark.parametrize("way", WAYS)
def test_either_a_ratio_or_a_target_is_given(way, given):
    with pytest.raises(ValueError, match=r"selection\.ratio=.*, selection\.target=.*: give exactly one of the two"):
        way(**given)


def test_a_target_of_latency_is_refused():
    with pytest.raises(ValueError, match=r"selection\.target=100: of the budget latency choose a ratio"):
        Knapsack(target=100, budget="latency")


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
def test_greedy_takes_the_lowest_feasible_scores_per_cost(problem):
    assume(problem.subsets())
    order = sorted(range(len(problem.costs)), key=lambda i: (problem.scores[i] / problem.costs[i], i))
    assert problem.solved(Greedy) == in_order(problem, order)


@given(st.permutations(range(6)), st.integers(1, 6))
@settings(derandomize=True, database=None, deadline=None, max_examples=30)
def test_ranked_takes_units_of_equal_cost_in_order_of_their_scores(scores, count):
    problem = Problem([10] * 6, [float(score) for score in scores], 64, 10 * count / 64, 0.0)
    assert problem.solved(Ranked) == tuple(i for i in range(6) if scores[i] < count)


# Protected and given units


@pytest.mark.parametrize("way", WAYS)
def test_a_protected_unit_stays_even_where_it_is_the_cheapest(way):
    assert way(0.5, 0.0).select(POOL, SCORES) == NAMES[:2]
    assert way(0.5, 0.0, protected=NAMES[:1]).select(POOL, SCORES) == NAMES[1:3]
    assert way(0.5, 0.0, protected=NAMES[:2]).select(POOL, SCORES) == NAMES[2:]


@pytest.mark.parametrize("way", WAYS)
@settings(thoroughly, max_examples=40)
@given(problem=problems(), data=st.data())
def test_protected_units_leave_the_choice_among_the_others(way, problem, data):
    protected = data.draw(st.sets(st.sampled_from([unit.name for unit in problem.pool.units])))
    others = [unit for unit in problem.pool.units if unit.name not in protected]
    found = []
    for pool, names in ((problem.pool, protected), (replace(problem.pool, units=others), [])):
        try:
            budget = way(problem.ratio, problem.tolerance, protected=sorted(names))
            found.append(budget.select(pool, problem.named_scores))
        except InfeasibleBudget:
            found.append(None)
    assert found[0] == found[1]
    assert found[0] is None or not protected & set(found[0])


def test_an_unknown_protected_unit_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=re.escape("selection.protected: 'mid_block.attention.0'")) as caught:
        Knapsack(0.5, 0.0, protected=["mid_block.attention.0"]).select(POOL, SCORES)
    assert "the nearest are: mid_block.attentions.0" in str(caught.value)


def test_given_units_are_taken_whatever_they_come_to():
    assert Given([NAMES[3], NAMES[0]]).select(POOL, {}) == [NAMES[0], NAMES[3]]
    assert Given(NAMES).select(POOL, {}) == NAMES


def test_an_unknown_given_unit_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=re.escape("selection.units: 'up_block.0.resnet.0'")) as caught:
        Given([NAMES[0], "up_block.0.resnet.0"]).check(POOL)
    assert "the nearest are: up_blocks.0.resnets.0" in str(caught.value)


def test_giving_no_unit_at_all_is_an_error():
    with pytest.raises(ValueError, match=r"selection\.units is empty"):
        Given([]).check(POOL)


def test_given_units_that_contain_one_another_are_refused():
    units = [Unit("outer", "attention", 10, 10), Unit("inner", "conv", 5, 5, inside="outer")]
    assert Given(["inner"]).select(Pool(units, {"params": 20}), {}) == ["inner"]
    with pytest.raises(ValueError, match=r"'inner' is inside 'outer'; list only one of the two"):
        Given(["inner", "outer"]).check(Pool(units, {"params": 20}))


def test_given_units_refuse_a_budget_that_the_network_lacks():
    assert Given(NAMES[:1], budget="latency").select(POOL, {}) == NAMES[:1]  # measured at the end
    with pytest.raises(
        ValueError, match=r"selection\.budget='flops' has no total in this pool; choose .*: params, macs"
    ):
        Given(NAMES[:1], budget="flops").check(POOL)
    with pytest.raises(ValueError, match=r"selection\.budget='flop' is unknown"):
        Given(NAMES[:1], budget="flop")


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
        way(problem.ratio, problem.tolerance).select(problem.pool, problem.named_scores)
    sums = {problem.spent(chosen) for chosen in problem.allowed() if chosen}
    near = [max((s for s in sums if s < problem.ratio * problem.total), default=None)]
    near += [min((s for s in sums if s > (problem.ratio + problem.tolerance) * problem.total), default=None)]
    nearest = " and ".join(f"{s / problem.total:.4f}" for s in near if s is not None)
    assert f"the largest achievable ratio is {max(sums) / problem.total:.3f}, " in str(caught.value)
    assert f"the nearest achievable {nearest}" in str(caught.value)
    assert f"selection.ratio={problem.ratio} (tolerance {problem.tolerance})" in str(caught.value)


def test_an_infeasible_budget_says_how_many_units_are_protected():
    with pytest.raises(InfeasibleBudget, match=r"largest achievable ratio is 0\.250.*with 3 of \d+ units protected"):
        Knapsack(0.5, 0.1, protected=NAMES[1:]).select(POOL, SCORES)
    with pytest.raises(InfeasibleBudget, match=r"largest achievable ratio is 0\.000, the nearest achievable none"):
        Knapsack(0.5, 0.1, protected=NAMES).select(POOL, SCORES)


# Values out of range


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ratio", [0, 1, 0.0, 1.0, -0.1, 1.5, 50, math.nan, math.inf, -math.inf])
def test_a_ratio_outside_0_to_1_is_refused(way, ratio):
    with pytest.raises(ValueError, match=re.escape(f"selection.ratio={ratio} is out of range; choose 0 < ratio < 1")):
        way(ratio)


def test_a_percentage_is_refused_with_the_matching_fraction():
    with pytest.raises(ValueError, match=re.escape("(a fraction, not a percentage: 0.5?)")):
        Knapsack(50)


@pytest.mark.parametrize("tolerance", [-0.1, 1, 1.5, math.nan, math.inf])
def test_a_tolerance_outside_0_to_1_is_refused(tolerance):
    message = f"selection.tolerance={tolerance} is out of range; choose 0 <= tolerance < 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        Knapsack(0.5, tolerance)


@pytest.mark.parametrize("budget", ["flop", "", "Params"])
def test_an_unknown_budget_lists_those_there_are(budget):
    message = f"selection.budget={budget!r} is unknown; choose one of: params, macs, flops, latency"
    with pytest.raises(ValueError, match=re.escape(message)):
        Knapsack(0.5, budget=budget)


# On a network


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("way", WAYS)
def test_the_student_that_is_built_is_smaller_by_exactly_what_was_chosen(way, budget):
    def cost(network) -> int:
        return network.params() if budget == "params" else network.macs().linear

    teacher = tiny_backbone("UNet2DModel")
    units = teacher.units()
    scores = {unit.name: float(i % 4) for i, unit in enumerate(units)}
    pool = Pool(units, {budget: cost(teacher)}, teacher.shared())
    removed = way(0.4, 0.1, budget=budget).select(pool, scores)
    freed = cost(teacher) - cost(teacher.pruned(bypasses(removed)))
    assert freed == sum(getattr(unit, budget) for unit in units if unit.name in removed)
    assert window_holds(0.4, 0.1, freed, cost(teacher))
