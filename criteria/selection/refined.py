"""The knapsack's plan, refined by swaps whose joint loss is measured: summed scores are only a prediction of it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from criteria.selection.base import Measure, Pool
from criteria.selection.knapsack import Knapsack
from criteria.selection.solver import Program, harm


@dataclass
class Refined(Knapsack):
    """Local search from the knapsack's plan (our choice, no paper's).

    A step swaps units inside the budget, the one of the least predicted harm first, and the first that lowers the
    measured joint loss is taken. `evaluations`: how many plans may be measured, the knapsack's own among them. The
    answer never measures worse than the knapsack's.
    """

    evaluations: int = 64

    needs_joint_loss = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluations < 1:
            raise ValueError(f"selection.evaluations={self.evaluations} is out of range; choose 1 or more")

    def select(self, pool: Pool, scores: Mapping[str, float], measure: Measure | None = None) -> list[str]:
        """The names of the units to remove, in the order of the forward pass.

        Raises what Knapsack raises, and ValueError where there is nothing to measure joint losses with.
        """
        if measure is None:
            raise ValueError(
                "selection.name='refined' measures the joint loss of plans, and nothing to measure it with is given; "
                "choose selection=knapsack"
            )
        names = [unit.name for unit in self.free(pool)]
        program, window = self.program(pool), self.window(pool)
        best = frozenset(names.index(name) for name in super().select(pool, scores))
        flat = [scores[name] for name in names]

        def named(chosen: frozenset[int]) -> list[str]:
            return [names[i] for i in sorted(chosen)]

        least = measure(named(best))
        seen, improved = {best}, True
        while improved and len(seen) < self.evaluations:
            improved = False
            for plan in neighbours(program, flat, window, best):
                if plan in seen:
                    continue
                seen.add(plan)
                loss = measure(named(plan))
                if loss < least:
                    best, least, improved = plan, loss, True
                if improved or len(seen) == self.evaluations:
                    break
        return named(best)


def neighbours(
    program: Program, scores: Sequence[float], window: tuple[int, int], chosen: frozenset[int]
) -> list[frozenset[int]]:
    """The sets one swap away whose cost lies in the window, the least summed score first.

    One unit for one. A unit for which the budget allows no such swap takes part in those of two for one, and of one
    for two.
    """
    inside, outside = sorted(chosen), [i for i in range(len(scores)) if i not in chosen]
    found = list(swaps(program, window, chosen, tuples(inside, 1), tuples(outside, 1)))
    stuck = {*inside, *outside}.difference(*(out | into for out, into in found))
    for leaving, entering in ((1, 2), (2, 1)):
        stuck_leave = swaps(program, window, chosen, tuples(inside, leaving, stuck), tuples(outside, entering))
        stuck_enter = swaps(program, window, chosen, tuples(inside, leaving), tuples(outside, entering, stuck))
        found += [*stuck_leave, *stuck_enter]
    found.sort(key=lambda swap: (harm(scores, swap[1]) - harm(scores, swap[0]), *map(sorted, swap)))
    return [chosen - out | into for out, into in found]


def tuples(units: Sequence[int], count: int, among: Collection[int] | None = None) -> list[frozenset[int]]:
    """Every set of `count` units, or those that hold one of a few."""
    every = map(frozenset, combinations(units, count))
    return [some for some in every if among is None or not some.isdisjoint(among)]


def swaps(
    program: Program,
    window: tuple[int, int],
    chosen: frozenset[int],
    leaving: Sequence[frozenset[int]],
    entering: Sequence[frozenset[int]],
) -> Iterator[tuple[frozenset[int], frozenset[int]]]:
    """The (out, in) that can be, and that keep the cost in the window."""
    for out in leaving if entering else ():
        rest = set(chosen - out)
        spent = program.cost(rest)
        for into in entering:
            more = freed(program, rest, into)
            if more is not None and window[0] <= spent + more <= window[1]:
                yield out, into


def freed(program: Program, gone: Collection[int], into: Collection[int]) -> int | None:
    """What some units free after others have gone, None where they cannot go together."""
    after, cost = set(gone), 0
    for i in into:
        if not program.allows(i, after):
            return None
        cost += program.added(i, after)
        after.add(i)
    return cost
