"""What sets of units cost, and whether one costs what is wanted, against enumeration of every subset."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import Problem, problems

from criteria.base import Shared, Unit
from criteria.selection import solver
from criteria.selection.base import InfeasibleBudget, Pool
from criteria.selection.in_order import Greedy, Ranked
from criteria.selection.knapsack import Knapsack
from criteria.selection.solver import (
    Program,
    enumerate_costs,
    greatest_cost,
    is_enumerable,
    is_reachable,
    least_cost,
    solve,
)

thoroughly = settings(derandomize=True, database=None, deadline=None, max_examples=100)
SMALL = (4, 1_000, 10**5)


def test_a_shared_part_goes_with_the_last_of_its_units():
    program = Program([5, 7, 11], [(frozenset({0, 2}), 100)], [(0, 1)])
    assert [program.cost(chosen) for chosen in ([], [0], [2], [0, 2], [1, 2])] == [0, 5, 11, 116, 18]
    assert (program.marginal_cost(2, {0}), program.marginal_cost(2, {1}), program.marginal_cost(0, {2})) == (
        111,
        11,
        105,
    )
    assert program.allows(0, {2}) and not program.allows(0, {1, 2})


@thoroughly
@given(problem=problems(SMALL))
def test_enumerated_costs_are_those_of_all_subsets(problem):
    unit = solver.common_divisor(problem.program)
    bits = sum(1 << cost // unit for cost in {problem.spent(chosen) for chosen in problem.allowed()})
    assert enumerate_costs(problem.program) == bits


@pytest.mark.parametrize("bits", [solver.MAX_BITS, 0])
@settings(thoroughly, max_examples=60)
@given(problem=problems(SMALL), low=st.integers(-10, 10**6), width=st.integers(-1, 10**5))
def test_the_nearest_costs_are_found_with_and_without_enumeration(bits, problem, low, width):
    program, costs = problem.program, {problem.spent(chosen) for chosen in problem.allowed()}
    low %= sum(program.all_costs) + 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "MAX_BITS", bits)
        assert is_enumerable(program) == (bits > 0)
        assert least_cost(program, low) == min((cost for cost in costs if cost >= low), default=None)
        assert greatest_cost(program, low) == max(cost for cost in costs if cost <= low)
        assert is_reachable(program, (low, low + width)) == any(low <= cost <= low + width for cost in costs)


@thoroughly
@given(problem=problems(SMALL), data=st.data())
def test_removed_and_remaining_costs_add_up_to_the_whole(problem, data):
    taken = set(data.draw(st.sampled_from(problem.allowed())))
    left = data.draw(st.sets(st.sampled_from(sorted({*range(len(problem.costs))} - taken) or [0]))) - taken
    rest = problem.program.remaining(taken, left)
    after = {problem.spent(s) - problem.spent([*taken]) for s in problem.allowed() if taken <= {*s} <= taken | left}
    unit = solver.common_divisor(rest)
    assert enumerate_costs(rest) == sum(1 << cost // unit for cost in after)


def test_the_optimum_is_found_where_presolve_misses_it():
    """HiGHS' presolve gives [1, 2], of harm 6, as the optimum of this program; [0, 3] fits too, and its harm is 2."""
    program, scores = Program([6609880, 3575637, 9346131, 4624044]), [4.0, 2.0, 4.0, -2.0]
    assert solve(program, scores, (10156967, 13970174)) == [0, 3]


@thoroughly
@given(problem=problems())
def test_a_limit_leaves_out_only_what_is_worse(problem):
    window = (problem.total // 4, problem.total // 2)
    fitting = [s for s in problem.allowed() if window[0] <= problem.spent(s) <= window[1]]
    for least in sorted(map(problem.harm, fitting))[:1]:
        found = solve(problem.program, problem.scores, window, limit=least)
        assert problem.harm(found) == least


# SDXL

RESNETS = {
    "down_blocks.0": [2_255_040, 2_255_040],
    "down_blocks.1": [6_352_640, 8_196_480],
    "down_blocks.2": [23_764_480, 31_138_560],
    "mid_block": [31_138_560, 31_138_560],
    "up_blocks.0": [45_886_720, 45_886_720, 38_512_640],
    "up_blocks.1": [15_571_840, 11_884_160, 10_040_320],
    "up_blocks.2": [4_099_520, 3_177_280, 3_177_280],
}
"""What removing each ResNet block frees, in parameters; a block that changes channels keeps its 1x1 shortcut."""
TRANSFORMERS = {"down_blocks.1": 2, "down_blocks.2": 2, "mid_block": 1, "up_blocks.0": 3, "up_blocks.1": 3}
"""How many Transformer2D of 2 (640 channels) or 10 (1280) basic blocks."""


def sdxl() -> Pool:
    units, shared = [], []
    for stage, resnets in RESNETS.items():
        units += [Unit(f"{stage}.resnets.{i}", "resnet", params, 0) for i, params in enumerate(resnets)]
        narrow = stage.endswith("blocks.1")
        for i in range(TRANSFORMERS.get(stage, 0)):
            name = f"{stage}.attentions.{i}"
            blocks = [f"{name}.transformer_blocks.{j}" for j in range(2 if narrow else 10)]
            units += [Unit(block, "block", 10_005_120 if narrow else 34_755_840, 0) for block in blocks]
            shared.append(Shared(name, tuple(blocks), 821_760 if narrow else 3_281_920, 0))
    return Pool(units, {"params": 2_567_463_684}, shared)


def test_all_units_of_sdxl_free_its_transformers_projections_too():
    pool = sdxl()
    program = pool.program("params")
    assert (len(pool.units), len(pool.shared), sum(part.params for part in pool.shared)) == (87, 11, 23_800_320)
    assert sum(program.costs) / 2_567_463_684 == pytest.approx(0.974, abs=5e-4)
    assert greatest_cost(program, 2_567_463_684) == program.cost(range(87)) == sum(program.costs) + 23_800_320


@pytest.mark.parametrize("spread", [0.3, 1.5])
def test_the_knapsack_of_sdxl_is_exact(spread):
    pool = sdxl()
    rng = np.random.default_rng(0)
    scores = {unit.name: unit.params * float(np.exp(rng.normal(0, spread))) for unit in pool.units}
    for ratio in (0.3, 0.5, 0.7, 0.9):
        harm = {}
        for way in (Knapsack, Greedy, Ranked):
            removed = way(ratio).select(pool, scores)
            spent = sum(unit.params for unit in pool.units if unit.name in removed)
            spent += sum(part.params for part in pool.shared if {*part.units} <= {*removed})
            assert ratio <= spent / 2_567_463_684 <= ratio + 0.02
            harm[way] = sum(scores[name] for name in removed)
        assert harm[Knapsack] <= min(harm.values()) * (1 + 1e-12)


def test_ratios_that_sdxl_cannot_have_are_answered_at_once():
    """These are subset sums of 87 numbers, over which branch and bound would take minutes."""
    with pytest.raises(InfeasibleBudget, match=r"largest achievable ratio is 0\.983, the nearest achievable 0\.9829$"):
        Knapsack(0.99, 0.005).check(sdxl())
    with pytest.raises(InfeasibleBudget, match=r"the nearest achievable 0\.5000 and 0\.5000"):
        Knapsack(0.5, 0.0).check(sdxl())


def test_a_problem_is_its_program():
    """The pools of the other tests hold what the programs here do."""
    problem = Problem([5, 7, 11], [0.0] * 3, 100, 0.5, 0.1, [(frozenset({0, 2}), 100)], [(0, 1)])
    program = problem.pool.program("params")
    assert (program.costs, list(program.shared), list(program.exclusive)) == ([5, 7, 11], problem.shared, [(1, 0)])
