"""The knapsack's plan refined by measured swaps, on joint losses that are not the sum of the scores."""

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.problems import Problem, problems

from criteria.base import Unit
from criteria.selection.base import InfeasibleBudget, Pool
from criteria.selection.knapsack import Knapsack
from criteria.selection.refined import Refined, neighbours
from criteria.selection.solver import Program

thoroughly = settings(derandomize=True, database=None, deadline=None, max_examples=60)


def pool_of(costs: dict[str, int], total: int) -> Pool:
    return Pool([Unit(name, "resnet", cost, 0) for name, cost in costs.items()], {"params": total})


def recorded(measure: Callable[[Sequence[str]], float]) -> tuple[Callable[[Sequence[str]], float], list[list[str]]]:
    """The measure, and the plans that it was asked for."""
    plans: list[list[str]] = []

    def call(names: Sequence[str]) -> float:
        plans.append(list(names))
        return measure(names)

    return call, plans


EQUAL = pool_of(dict.fromkeys("abcd", 10), 40)
SCORES = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 5.0}


def together_worse(names: Sequence[str]) -> float:
    """The two units of the lowest scores stand in for one another: without both, much is lost."""
    return sum(SCORES[name] for name in names) + 10 * ({"a", "b"} <= set(names))


def test_a_plan_that_only_the_sum_of_scores_likes_is_left():
    assert Knapsack(0.5, 0.0).select(EQUAL, SCORES) == ["a", "b"]
    measure, plans = recorded(together_worse)
    assert Refined(0.5, 0.0).select(EQUAL, SCORES, measure) == ["a", "c"]
    assert plans[:2] == [["a", "b"], ["a", "c"]]  # the swap of the least predicted harm is the first
    assert len(plans) == len({tuple(plan) for plan in plans})


def test_the_search_goes_on_from_what_it_found():
    """No single swap leads from the knapsack's plan to the best one."""
    losses = {("a", "b"): 9.0, ("b", "c"): 5.0, ("c", "d"): 1.0}
    assert Refined(0.5, 0.0).select(EQUAL, SCORES, lambda names: losses.get(tuple(names), 10.0)) == ["c", "d"]


def test_no_more_plans_are_measured_than_allowed():
    for evaluations, found in ((1, ["a", "b"]), (2, ["a", "c"]), (64, ["a", "c"])):
        measure, plans = recorded(together_worse)
        assert Refined(0.5, 0.0, evaluations=evaluations).select(EQUAL, SCORES, measure) == found
        assert len(plans) <= evaluations


def test_the_knapsacks_plan_stays_where_nothing_measures_better():
    measure, plans = recorded(lambda names: 1.0)
    assert Refined(0.5, 0.0).select(EQUAL, SCORES, measure) == ["a", "b"]
    assert len(plans) == 5  # itself, and each of its four neighbours once


def test_a_loss_that_is_not_a_number_is_not_better():
    assert Refined(0.5, 0.0).select(EQUAL, SCORES, lambda names: 1.0 if "b" in names else math.nan) == ["a", "b"]


@pytest.mark.parametrize(("scores", "start", "best"), [((1.0, 2.0, 9.0), "ab", "c"), ((9.0, 9.0, 1.0), "c", "ab")])
def test_units_that_no_other_can_replace_are_swapped_two_for_one(scores, start, best):
    pool, flat = pool_of({"a": 10, "b": 10, "c": 20}, 40), dict(zip("abc", scores, strict=True))
    assert Knapsack(0.5, 0.0).select(pool, flat) == list(start)
    assert Refined(0.5, 0.0).select(pool, flat, lambda names: float(list(names) != list(best))) == list(best)


def test_single_swaps_are_enough_where_the_budget_allows_them():
    program = Program([10, 10, 10, 20])
    assert set(neighbours([(program, (10, 20))], [0.0] * 4, frozenset({0, 1}))) == {
        frozenset({0, 2}),
        frozenset({1, 2}),
        frozenset({3}),
    }
    assert set(neighbours([(program, (20, 30))], [0.0] * 4, frozenset({0, 1}))) == {
        *(frozenset({i, j}) for i, j in ((0, 2), (1, 2), (0, 3), (1, 3)))
    }


@thoroughly
@given(problem=problems())
def test_neighbours_fit_the_budget_and_keep_the_rules(problem):
    fitting = {frozenset(chosen) for chosen in problem.subsets()}
    assume(fitting)
    chosen = frozenset(problem.solved(Knapsack))
    window = Knapsack(problem.ratio, problem.tolerance).window(problem.pool)
    found = neighbours([(problem.program, window)], problem.scores, chosen)
    assert {*found} <= fitting
    singles = {plan for plan in fitting if len(plan - chosen) == len(chosen - plan) == 1}
    assert singles <= {*found}
    assert all(len(plan - chosen) + len(chosen - plan) == 3 for plan in {*found} - singles)


@thoroughly
@given(problem=problems(), data=st.data())
@pytest.mark.slow
def test_refinement_is_repeatable_and_never_worse_than_the_knapsack(problem, data):
    assume(problem.subsets())
    count = len(problem.costs)
    pair = st.floats(-2, 2, allow_subnormal=False)
    joint = data.draw(st.lists(st.lists(pair, min_size=count, max_size=count), min_size=count, max_size=count))
    evaluations = data.draw(st.integers(1, 12))

    def measure(names: Sequence[str]) -> float:
        places = [int(name.removeprefix("unit")) for name in names]
        return problem.harm(places) + math.fsum(joint[i][j] for i in places for j in places if i < j)

    def found() -> list[str]:
        return way.select(problem.pool, problem.named_scores, measure)

    way = Refined(problem.ratio, problem.tolerance, evaluations=evaluations)
    start = Knapsack(problem.ratio, problem.tolerance).select(problem.pool, problem.named_scores)
    assert measure(found()) <= measure(start)
    assert found() == found()
    assert tuple(int(name.removeprefix("unit")) for name in found()) in problem.subsets()


def test_protected_units_stay():
    measure, plans = recorded(together_worse)
    assert Refined(0.5, 0.0, protected=["c"]).select(EQUAL, SCORES, measure) == ["a", "d"]
    assert not any("c" in plan for plan in plans)


def test_nothing_to_measure_with_is_an_error():
    with pytest.raises(ValueError, match=r"selection\.name='refined' measures .* choose selection=knapsack"):
        Refined(0.5, 0.0).select(EQUAL, SCORES)


@pytest.mark.parametrize("evaluations", [0, -1])
def test_too_few_evaluations_are_refused(evaluations):
    with pytest.raises(ValueError, match=f"selection.evaluations={evaluations} is out of range; choose 1 or more"):
        Refined(0.5, evaluations=evaluations)
    with pytest.raises(ValueError, match=r"selection\.ratio=50 is out of range"):
        Refined(50)


def test_an_infeasible_budget_has_the_knapsacks_message():
    with pytest.raises(InfeasibleBudget, match=r"the nearest achievable 0\.2500 and 0\.5000"):
        Refined(0.3, 0.0).select(EQUAL, SCORES, together_worse)


def test_a_shared_part_counts_in_swaps():
    """The first two units come to 30 with the part that they share; the last one comes to 30 with either of them."""
    problem = Problem([10, 10, 10, 20], [1.0, 1.0, 5.0, 5.0], 60, 0.5, 0.0, [(frozenset({0, 1}), 10)])
    names = Refined(0.5, 0.0).select(problem.pool, problem.named_scores, lambda names: float("unit3" not in names))
    assert problem.solved(Knapsack) == (0, 1)
    assert names == ["unit1", "unit3"]
