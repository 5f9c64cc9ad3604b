"""One threshold on the scores of all channels, at a cost that is not the sum over them."""

from collections.abc import Sequence

import pytest

from criteria.base import Unit
from criteria.selection import InfeasibleBudget, Pool, Threshold

WIDE = Pool(
    [Unit(name, "channel", 0, 0, change="slice") for name in ("a:0", "a:1", "a:2", "b:0", "b:1", "c:0")],
    {"params": 30},
    cost=lambda names, budget: len(names) * (12 - len(names)) // 2,  # 5, 10, 13 of one, two, three: less than the sum
)


def thresholded(ratio: float, scores: Sequence[float], pool: Pool = WIDE, **options: object) -> list[str]:
    names = [unit.name for unit in pool.units]
    return Threshold(ratio, **options).select(pool, dict(zip(names, scores, strict=True)))


def test_a_threshold_takes_the_lowest_scores_until_the_exact_cost_is_in_the_window():
    assert thresholded(0.15, [3.0, 1.0, 4.0, 2.0, 5.0, 0.0]) == ["a:1"]
    assert thresholded(0.3, [3.0, 1.0, 4.0, 2.0, 5.0, 0.0], tolerance=0.05) == ["a:1", "b:0"]
    assert thresholded(0.4, [3.0, 1.0, 4.0, 2.0, 5.0, 0.0], tolerance=0.05) == ["a:0", "a:1", "b:0"]


def test_of_each_group_the_unit_of_the_highest_score_stays():
    assert thresholded(0.4, [0.0, 2.0, 1.0, 8.0, 9.0, 0.0], tolerance=0.05) == ["a:0", "a:2", "b:0"]
    assert thresholded(0.4, [0.0] * 6, tolerance=0.05) == ["a:0", "a:1", "b:0"]
    assert thresholded(0.3, [0.0, 2.0, 1.0, 8.0, 9.0, 0.0], tolerance=0.05, protected=["a:0"]) == ["a:1", "a:2"]


def test_all_units_of_one_score_go_where_the_budget_has_room_for_them():
    assert thresholded(0.15, [9.0, 1.0, 9.0, 1.0, 9.0, 0.0], tolerance=0.2) == ["a:1", "b:0"]


def test_within_a_tie_units_go_one_by_one_in_the_order_of_the_forward_pass():
    assert thresholded(0.15, [1.0, 1.0, 9.0, 1.0, 9.0, 0.0]) == ["a:0"]
    assert thresholded(0.3, [1.0, 1.0, 9.0, 0.0, 9.0, 0.0], tolerance=0.05) == ["a:0", "b:0"]


def test_a_threshold_that_cannot_be_had_names_the_nearest_ratios():
    with pytest.raises(InfeasibleBudget, match=r"ratio is 0\.433, the nearest achievable 0\.1667 and 0\.3333"):
        thresholded(0.2, [1.0] * 6)
    with pytest.raises(InfeasibleBudget, match=r"ratio is 0\.433, the nearest achievable 0\.4333$"):
        thresholded(0.5, [1.0] * 6)
    with pytest.raises(InfeasibleBudget, match=r"ratio is 0\.000, the nearest.* none, with 6 of 6 units protected"):
        thresholded(0.5, [1.0] * 6, protected=[unit.name for unit in WIDE.units])


def test_a_threshold_is_bisected():
    calls = []

    def cost(names: Sequence[str], budget: str) -> int:
        calls.append(list(names))
        return len(names)

    units = [Unit(f"a:{i}", "channel", 0, 0) for i in range(1001)]
    pool = Pool(units, {"macs": 1000}, cost=cost)
    assert len(thresholded(0.25, [float(i) for i in range(1001)], pool, budget="macs")) == 250
    assert len(calls) < 20


def test_a_threshold_is_for_channels():
    with pytest.raises(ValueError, match=r"selection\.name='threshold' is for channels; .* choose one of: knapsack"):
        Threshold(0.5).check(Pool([Unit("mid_block", "resnet", 10, 10)], {"params": 40}))
