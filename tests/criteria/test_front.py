"""The front of one scoring against enumeration of every subset, and against the knapsack at every ratio."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import Problem, problems

from criteria.base import Shared, Unit
from criteria.selection.base import Pool
from criteria.selection.front import find_front
from criteria.selection.knapsack import Knapsack

thoroughly = settings(derandomize=True, database=None, deadline=None, max_examples=100)


def list_unbeaten(problem: Problem) -> list[tuple[int, float]]:
    """Cost and harm of the sets that no other set beats, the one of the least cost first; without the cost 0."""
    points = sorted({(problem.spent(chosen), problem.harm(chosen)) for chosen in problem.allowed()}, reverse=True)
    unbeaten: list[tuple[int, float]] = []
    for cost, harm in sorted(points, key=lambda point: (-point[0], point[1])):
        if cost and (not unbeaten or harm < unbeaten[-1][1]):
            unbeaten.append((cost, harm))
    return unbeaten[::-1]


def with_whole_scores(problem: Problem) -> Problem:
    """The same problem with scores whose sums are exact in any order."""
    scores = [float(round(score * 8)) for score in problem.scores]
    return Problem(problem.costs, scores, problem.total, 0.5, 0.0, problem.shared, problem.inside)


@thoroughly
@given(problem=problems((4, 1_000, 10**7)).map(with_whole_scores))
def test_the_front_is_that_of_all_subsets(problem):
    front = find_front(problem.pool, problem.named_scores)
    assert [(plan.removed, plan.harm) for plan in front] == list_unbeaten(problem)
    for plan in front:
        chosen = [int(name.removeprefix("unit")) for name in plan.units]
        assert (problem.spent(chosen), problem.harm(chosen)) == (plan.removed, plan.harm)
        assert tuple(chosen) in problem.allowed() and plan.ratio == plan.removed / problem.total


@settings(thoroughly, max_examples=30)
@given(problem=problems((1_000, 10**7)), data=st.data())
def test_the_knapsack_at_the_ratio_of_a_plan_does_its_harm(problem, data):
    front = find_front(problem.pool, problem.named_scores)
    number = data.draw(st.integers(0, len(front) - 1))
    below = front[number - 1].ratio if number else 0.0
    ratio = (below + front[number].ratio) / 2
    chosen = Knapsack(ratio, tolerance=0.999).select(problem.pool, problem.named_scores)
    harm = sum(problem.named_scores[name] for name in chosen)
    assert harm == pytest.approx(front[number].harm, rel=1e-6, abs=1e-7 * max(map(abs, problem.scores)))


def test_protected_units_are_in_no_plan_and_their_shared_parts_stay():
    units = [Unit(name, "resnet", 10, 1) for name in "abc"]
    pool = Pool(units, {"params": 40, "macs": 3}, [Shared("ab", ("a", "b"), 10, 0)])
    scores = {"a": 1.0, "b": 2.0, "c": 4.0}
    every = [(plan.units, plan.removed, plan.harm) for plan in find_front(pool, scores)]
    assert every == [(["a"], 10, 1.0), (["a", "b"], 30, 3.0), (["a", "b", "c"], 40, 7.0)]
    assert [plan.units for plan in find_front(pool, scores, protected=["a"])] == [["b"], ["b", "c"]]
    assert [plan.ratio for plan in find_front(pool, scores, "macs")] == [1 / 3, 2 / 3, 1.0]


def test_a_front_of_more_units_than_one_word_holds_is_complete():
    pool = Pool([Unit(f"unit{i}", "resnet", 1, 0) for i in range(130)], {"params": 130})
    front = find_front(pool, {f"unit{i}": float(130 - i) for i in range(130)})
    assert [plan.removed for plan in front] == list(range(1, 131))
    assert all(plan.units == [f"unit{i}" for i in range(130 - plan.removed, 130)] for plan in front)
