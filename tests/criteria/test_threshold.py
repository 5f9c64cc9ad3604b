"""One threshold on the scores of all channels, or the same share of every group, at a cost that is no sum."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.classification import tiny_classifier
from support.networks import tiny_backbone

from conf import schema
from criteria.base import Level, Unit
from criteria.selection.base import Budgeted, InfeasibleBudget, Pool, group
from criteria.selection.equal_share import EqualShare
from criteria.selection.threshold import Threshold

WIDE = Pool(
    [Unit(name, "channel", 0, 0, change="slice") for name in ("a:0", "a:1", "a:2", "b:0", "b:1", "c:0")],
    {"params": 30},
    cost=lambda names, budget: len(names) * (12 - len(names)) // 2,  # 5, 10, 13 of one, two, three: less than the sum
)


def thresholded(ratio: float | None, scores: Sequence[float], pool: Pool = WIDE, **options: object) -> list[str]:
    names = [unit.name for unit in pool.units]
    return Threshold(ratio, **options).select(pool, dict(zip(names, scores, strict=True)))


def test_a_threshold_takes_the_lowest_scores_until_the_budget_is_met():
    assert thresholded(0.15, [3.0, 1.0, 4.0, 2.0, 5.0, 0.0]) == ["a:1"]
    assert thresholded(0.3, [3.0, 1.0, 4.0, 2.0, 5.0, 0.0], tolerance=0.05) == ["a:1", "b:0"]
    assert thresholded(0.4, [3.0, 1.0, 4.0, 2.0, 5.0, 0.0], tolerance=0.05) == ["a:0", "a:1", "b:0"]


def test_of_each_group_the_unit_of_the_highest_score_stays():
    assert thresholded(0.4, [0.0, 2.0, 1.0, 8.0, 9.0, 0.0], tolerance=0.05) == ["a:0", "a:2", "b:0"]
    assert thresholded(0.4, [0.0] * 6, tolerance=0.05) == ["a:0", "a:1", "b:0"]
    assert thresholded(0.3, [0.0, 2.0, 1.0, 8.0, 9.0, 0.0], tolerance=0.05, protected=["a:0"]) == ["a:1", "a:2"]


def test_all_units_of_one_score_go_where_the_budget_has_room_for_them():
    assert thresholded(0.15, [9.0, 1.0, 9.0, 1.0, 9.0, 0.0], tolerance=0.2) == ["a:1", "b:0"]


def test_ties_are_removed_one_by_one_in_the_order_of_the_forward_pass():
    assert thresholded(0.15, [1.0, 1.0, 9.0, 1.0, 9.0, 0.0]) == ["a:0"]
    assert thresholded(0.3, [1.0, 1.0, 9.0, 0.0, 9.0, 0.0], tolerance=0.05) == ["a:0", "b:0"]


def test_an_infeasible_threshold_names_the_nearest_ratios():
    with pytest.raises(InfeasibleBudget, match=r"ratio is 0\.433, the nearest achievable 0\.1667 and 0\.3333"):
        thresholded(0.2, [1.0] * 6)
    with pytest.raises(InfeasibleBudget, match=r"ratio is 0\.433, the nearest achievable 0\.4333$"):
        thresholded(0.5, [1.0] * 6)
    with pytest.raises(InfeasibleBudget, match=r"ratio is 0\.000, the nearest.* none, with 6 of 6 units protected"):
        thresholded(0.5, [1.0] * 6, protected=[unit.name for unit in WIDE.units])


@pytest.mark.parametrize("wanted", [{"ratio": 0.5}, {"target": 16.0}])
def test_a_budget_beyond_all_channels_is_refused_before_scoring(wanted):
    with pytest.raises(InfeasibleBudget, match="cannot be had"):
        Threshold(**wanted).check(WIDE)
    Threshold(**{name: value - 0.1 if name == "ratio" else value + 1 for name, value in wanted.items()}).check(WIDE)


def test_a_threshold_is_bisected():
    calls = []

    def cost(names: Sequence[str], budget: str) -> int:
        calls.append(list(names))
        return len(names)

    units = [Unit(f"a:{i}", "channel", 0, 0) for i in range(1001)]
    pool = Pool(units, {"macs": 1000}, cost=cost)
    assert len(thresholded(0.25, [float(i) for i in range(1001)], pool, budget="macs")) == 250
    assert len(calls) < 20


@pytest.mark.parametrize(("selection", "name"), [(Threshold, "threshold"), (EqualShare, "equal_share")])
def test_a_threshold_refuses_units_that_are_not_channels(selection, name):
    with pytest.raises(ValueError, match=rf"selection\.name='{name}' is for channels; .* choose one of: knapsack"):
        selection(0.5).check(Pool([Unit("mid_block", "resnet", 10, 10)], {"params": 40}))


# The set that is nearest to a target


def towards(target: float, scores: Sequence[float], **options: object) -> list[str]:
    return thresholded(None, scores, target=target, **options)


def test_the_threshold_nearest_to_the_target_is_taken_on_either_side():
    scores = [3.0, 1.0, 4.0, 2.0, 5.0, 0.0]  # 25, 20 and 17 of 30 can be left
    assert [towards(target, scores) for target in (29, 27.6)] == [[], []]
    for target, removed in ((27.4, ["a:1"]), (25, ["a:1"]), (22.6, ["a:1"]), (22.4, ["a:1", "b:0"])):
        assert towards(target, scores) == removed
    assert towards(18.6, scores) == ["a:1", "b:0"] and towards(18.4, scores) == ["a:0", "a:1", "b:0"]


def test_of_two_sets_equally_near_the_smaller_network_is_taken():
    assert towards(22.5, [3.0, 1.0, 4.0, 2.0, 5.0, 0.0]) == ["a:1", "b:0"]


def test_equal_scores_are_removed_in_the_order_of_the_forward_pass():
    assert [towards(target, [0.0] * 6) for target in (25, 20, 17)] == [["a:0"], ["a:0", "a:1"], ["a:0", "a:1", "b:0"]]


def test_a_target_below_one_unit_per_group_names_the_smallest_cost():
    with pytest.raises(
        InfeasibleBudget, match=r"selection\.target=16\.9 .* params .* 17 of 30, the nearest achievable 17$"
    ):
        towards(16.9, [0.0] * 6)
    with pytest.raises(InfeasibleBudget, match=r" 20 of 30, the nearest achievable 20, with 4 of 6 units protected"):
        towards(17, [0.0] * 6, protected=["a:0", "b", "c"])


def test_a_group_of_one_unit_has_none_to_lose():
    units = [Unit(name, "channel", 0, 0) for name in ("a:0", "b:0")]
    pool = Pool(units, {"params": 30}, cost=lambda names, budget: len(names))
    with pytest.raises(InfeasibleBudget, match=r" cost that can be had is 30 of 30, the nearest achievable none$"):
        thresholded(None, [0.0, 0.0], pool, target=29)


@pytest.mark.parametrize("target", [30, 31.5, 0, -1])
def test_a_target_that_is_not_below_the_whole_cost_is_refused_early(target):
    with pytest.raises(ValueError, match=r"selection\.target=.* the whole network has 30 params"):
        Threshold(target=target).check(WIDE)


def test_the_message_names_the_unit_that_jumps_over_the_target(capsys):
    freed = {"a:0": 40_000, "a:1": 30_000_000, "b:0": 10_000, "a:2": 1, "b:1": 1}
    pool = Pool(
        [Unit(name, "channel", 0, 0, change="slice") for name in ("a:0", "a:1", "a:2", "b:0", "b:1")],
        {"flops": 100_000_000},
        cost=lambda names, budget: sum(freed[name] for name in names),
    )

    def printed(target: float) -> str:
        thresholded(None, [0.0, 1.0, 5.0, 2.0, 5.0], pool, target=target, budget="flops")
        return capsys.readouterr().out

    said = "that a threshold gives, as a:1 alone frees 30,000,000\n"
    assert printed(90e6) == f"99,960,000 flops are left: the nearest to selection.target=90,000,000 {said}"
    assert printed(75e6) == f"69,960,000 flops are left: the nearest to selection.target=75,000,000 {said}"
    assert printed(69_960_000 + 50_000) == printed(69_955_000) == ""
    assert said in printed(69_960_000 + 50_001)


@dataclass(frozen=True)
class Wide:
    """Channels in groups, of which every pair that is gone frees a little less than its two units alone."""

    sizes: Sequence[int]
    costs: Sequence[int]
    scores: Sequence[float]
    protected: Sequence[str]

    @property
    def names(self) -> list[str]:
        return [f"{group}:{i}" for group, size in zip("abcd", self.sizes, strict=False) for i in range(size)]

    def cost(self, names: Sequence[str], budget: str) -> int:
        assert budget == "flops" and list(names)
        return sum(10 * self.costs[self.names.index(name)] for name in names) - len(names) * (len(names) - 1) // 2

    def left(self) -> dict[int, list[str]]:
        """{what is left: the set that is gone} of every threshold."""
        where = {name: (score, i) for i, (name, score) in enumerate(zip(self.names, self.scores, strict=True))}
        staying = {name for name in self.names if name in self.protected or name[0] in self.protected}
        whole = {name[0] for name in staying}
        best = {
            max((n for n in self.names if n[0] == g), key=where.__getitem__) for g in {n[0] for n in self.names} - whole
        }
        found = {}
        for threshold in [(float("-inf"), 0), *where.values()]:
            gone = [n for n in self.names if where[n] <= threshold and n not in staying | best]
            found[1000 - (self.cost(gone, "flops") if gone else 0)] = gone
        return found


@st.composite
def wides(draw: st.DrawFn) -> Wide:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    count = sum(sizes)
    costs = [cost for size in sizes for cost in size * [draw(st.integers(2, 6))]]  # alike in a group, as channels are
    scores = draw(st.lists(st.integers(0, 3).map(float), min_size=count, max_size=count))
    wide = Wide(sizes, costs, scores, [])
    some = st.sampled_from([*wide.names, *"abcd"[: len(sizes)]])
    return Wide(sizes, costs, scores, draw(st.lists(some, max_size=2)))


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(wides(), st.integers(1, 3999).map(lambda n: n / 4))
def test_no_other_threshold_is_nearer_to_the_target(wide, target):
    left = wide.left()
    pool = Pool([Unit(name, "channel", 0, 0) for name in wide.names], {"flops": 1000}, cost=wide.cost)
    way = Threshold(target=target, budget="flops", protected=list(wide.protected))
    scores = dict(zip(wide.names, wide.scores, strict=True))
    if target < min(left):
        with pytest.raises(InfeasibleBudget, match=rf"smallest cost that can be had is {min(left):,} of 1,000, "):
            way.select(pool, scores)
    else:
        assert way.select(pool, scores) == left[min(left, key=lambda cost: (abs(cost - target), cost))]


@pytest.mark.parametrize("budget", ["params", "macs", "flops"])
def test_the_built_student_is_within_half_a_unit_of_the_target(budget):
    teacher = tiny_classifier()
    units, total = teacher.units("channel"), teacher.totals()[budget]
    scores = {unit.name: float(i * 7 % 11) for i, unit in enumerate(units)}
    pool = Pool(units, {budget: total}, cost=teacher.cost)
    changes = Threshold(target=0.6 * total, budget=budget).changes(pool, scores)
    left = teacher.pruned(changes).totals()[budget]
    assert left == total - teacher.cost([change["unit"] for change in changes], budget)
    assert 2 * abs(left - 0.6 * total) <= max(teacher.cost([unit.name], budget) for unit in units)


# The same share of every group

SHARED = Pool(
    [
        Unit(f"{name}:{k}", "channel", 0, 0)
        for name, count in (("a", 8), ("b", 4), ("c", 2), ("d", 1))
        for k in range(count)
    ],
    {"params": 100},
    cost=lambda names, budget: len(names),
)
"""15 units of cost 1 in groups of 8, 4, 2 and 1, of a network of 100."""


def removed_by_group(selection: Budgeted, pool: Pool, scores: Sequence[float]) -> dict[str, int]:
    names = [unit.name for unit in pool.units]
    return dict(Counter(group(name) for name in selection.select(pool, dict(zip(names, scores, strict=True)))))


@pytest.mark.parametrize(
    ("ratio", "tolerance", "removed"),
    [
        (0.07, 0.0, {"a": 4, "b": 2, "c": 1}),  # half of every group but the one of a single unit, which stays
        (0.04, 0.01, {"a": 2, "b": 1, "c": 1}),  # a quarter: 2, 1 and 0.5, which is rounded up
        (0.01, 0.0, {"a": 1}),  # a sixteenth: 0.5, 0.25 and 0.125
        (0.02, 0.0, {"a": 1, "b": 1}),  # an eighth: 1, 0.5 and 0.25
        (0.11, 0.0, {"a": 7, "b": 3, "c": 1}),  # the largest share: one of each group stays
    ],
)
def test_every_group_loses_the_same_share(ratio, tolerance, removed):
    scores = [100.0 - i for i in range(15)]  # the first groups have by far the largest scores
    assert removed_by_group(EqualShare(ratio, tolerance), SHARED, scores) == removed


def test_an_equal_share_takes_the_lowest_scores_of_each_group():
    scores = {unit.name: float(i * 7 % 15) for i, unit in enumerate(SHARED.units)}
    removed = EqualShare(0.07, 0.0).select(SHARED, scores)
    for name in "abc":
        members = sorted((n for n in scores if group(n) == name), key=scores.__getitem__)
        assert {n for n in removed if group(n) == name} == set(members[: len(members) // 2])


def test_a_group_with_protected_units_loses_the_same_share_of_others():
    protected = ["a:0", "a:1", "b:0", "c"]
    removed = EqualShare(0.06, 0.0, protected=protected).select(
        SHARED, dict.fromkeys([u.name for u in SHARED.units], 0.0)
    )
    assert removed == ["a:2", "a:3", "a:4", "a:5", "b:1", "b:2"]


def test_an_infeasible_equal_share_names_the_nearest_ratios():
    with pytest.raises(InfeasibleBudget, match=r"ratio is 0\.110, the nearest achievable 0\.1100$"):
        EqualShare(0.12).check(SHARED)


def test_the_recipe_of_diff_pruning_removes_the_same_share_of_every_group(configure):
    cfg = configure("experiment=diff_pruning", "selection.tolerance=0.3")
    teacher, selection = tiny_backbone("UNet2DModel"), schema.build(cfg.selection)
    units = teacher.units(schema.build(cfg.criterion).level)
    sizes = Counter(group(unit.name) for unit in units)
    assert sorted(set(sizes.values())) == [2, 4]
    pool = Pool(units, teacher.totals(), cost=teacher.cost)
    removed = removed_by_group(selection, pool, [float(i * 7 % 11) for i in range(len(units))])
    assert removed == {name: size // 2 if size == 2 else 1 for name, size in sizes.items()}  # a share of 1/4


# Groups that stay


def test_a_group_is_protected_by_its_name():
    assert Threshold(0.5, protected=["a"]).protected_units(WIDE.units) == ["a:0", "a:1", "a:2"]
    assert Threshold(0.5, protected=["c", "a:1"]).protected_units(WIDE.units) == ["a:1", "c:0"]
    assert thresholded(0.15, [0.0, 0.0, 0.0, 1.0, 2.0, 0.0], protected=["a"]) == ["b:0"]


def test_an_unknown_unit_or_group_is_named_with_the_nearest():
    units = [Unit(f"stages.{i}.conv1:{k}", "channel", 0, 0, level=Level.CHANNEL) for i in range(3) for k in range(2)]
    near = "'stages.1.conv' is not a unit of this network; the nearest are: stages.1.conv1, stages.2.conv1, "
    with pytest.raises(ValueError, match=re.escape(f"selection.protected: {near}")):
        Threshold(0.5, protected=["stages.1.conv"]).protected_units(units)
    with pytest.raises(ValueError, match=r"'1:': slices are of blocks; name channels, or groups .* 'stages\.0\.conv1'"):
        Threshold(0.5, protected=["1:"]).protected_units(units)
