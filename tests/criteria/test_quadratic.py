"""The knapsack with measured interactions of pairs, on joint losses that are sums over units and pairs."""

import itertools
import random
from collections.abc import Sequence

import pytest

from criteria.base import Shared, Unit
from criteria.selection.base import InfeasibleBudget, Pool
from criteria.selection.knapsack import Knapsack
from criteria.selection.quadratic import Quadratic

NAMES = "abcdefgh"


class Problem:
    """Eight units of random costs, scores and interactions, and the joint loss that follows from them."""

    def __init__(self, seed: int, least_interaction: float = 0.0, shared: bool = False) -> None:
        rng = random.Random(seed)
        self.scores = {name: rng.uniform(0.1, 1) for name in NAMES}
        self.interactions = {pair: rng.uniform(least_interaction, 1) for pair in itertools.combinations(NAMES, 2)}
        units = [Unit(name, "resnet", rng.randint(1, 9), rng.randint(1, 9)) for name in NAMES]
        parts = [Shared("part", ("b", "c"), 4, 0)] if shared else []
        total = sum(unit.params for unit in units) + 4 * shared
        self.pool = Pool(units, {"params": total, "macs": sum(unit.macs for unit in units)}, shared=parts)
        self.measured: list[tuple[str, ...]] = []

    def loss(self, names: Sequence[str]) -> float:
        self.measured.append(tuple(names))
        return self.true_loss(names)

    def true_loss(self, names: Sequence[str]) -> float:
        pairs = itertools.combinations(sorted(names), 2)
        return sum(self.scores[name] for name in names) + sum(self.interactions[pair] for pair in pairs)

    def best(self, selection: Quadratic) -> float:
        """The least loss of all sets that fit the budgets."""
        limits = selection.limits(self.pool).values()
        sets = [set(c) for n in range(len(NAMES) + 1) for c in itertools.combinations(range(len(NAMES)), n)]
        fitting = [s for s in sets if all(low <= program.cost(s) <= high for program, (low, high) in limits)]
        return min(self.true_loss([NAMES[i] for i in sorted(units)]) for units in fitting)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_where_no_pair_helps_the_plan_is_the_best_of_all(seed, shared):
    """What is not measured counts as 0, so that no other plan can be better than the model says."""
    problem, selection = Problem(seed, shared=shared), Quadratic(0.5, 0.1, evaluations=1000)
    plan = selection.select(problem.pool, problem.scores, problem.loss)
    assert problem.true_loss(plan) == pytest.approx(problem.best(selection), rel=1e-9)
    assert len(problem.measured) <= len(set(problem.measured)) + 2  # plans are measured once more at the end


@pytest.mark.parametrize("seed", range(6))
def test_several_budgets_are_kept(seed):
    problem = Problem(seed)
    budgets = {"params": 0.4, "macs": 0.3}
    selection = Quadratic(ratio=None, budgets=budgets, tolerance=0.2, evaluations=1000)
    plan = selection.select(problem.pool, problem.scores, problem.loss)
    assert problem.true_loss(plan) == pytest.approx(problem.best(selection), rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_the_plan_is_never_worse_than_the_knapsacks(seed):
    """Also where pairs help one another, and where few losses may be measured."""
    for evaluations in (1, 2, 5, 20, 1000):
        problem = Problem(seed, least_interaction=-1)
        plan = Quadratic(0.5, 0.1, evaluations=evaluations).select(problem.pool, problem.scores, problem.loss)
        knapsack = Knapsack(0.5, 0.1).select(problem.pool, problem.scores)
        assert problem.true_loss(plan) <= problem.true_loss(knapsack) + 1e-12
        assert len(problem.measured) <= max(evaluations, 0)


def test_sums_of_scores_are_the_knapsack():
    problem = Problem(0)
    problem.interactions = dict.fromkeys(problem.interactions, 0.0)
    plan = Quadratic(0.5, 0.1).select(problem.pool, problem.scores, problem.loss)
    assert plan == Knapsack(0.5, 0.1).select(problem.pool, problem.scores)


def test_what_cannot_be_is_refused():
    problem = Problem(0)
    with pytest.raises(ValueError, match="nothing to measure it with is given; choose selection=knapsack"):
        Quadratic(0.5).select(problem.pool, problem.scores)
    with pytest.raises(ValueError, match=r"selection\.evaluations=0 is out of range"):
        Quadratic(0.5, evaluations=0)
    with pytest.raises(InfeasibleBudget):
        Quadratic(0.9999, 0.00001, protected=["a"]).select(problem.pool, problem.scores, problem.loss)
