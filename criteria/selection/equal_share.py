"""The same share of the channels of every group, at a cost that is not the sum over them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from criteria.selection.base import Measure, Pool, group
from criteria.selection.threshold import Threshold


@dataclass
class EqualShare(Threshold):
    """Removes the same share of the channels of every group, those with the lowest scores.

    Diff-Pruning (arXiv 2305.10924) removes channels so, by torch-pruning's local pruning: scores of different groups
    are never compared. Units whose names agree up to the ':' are a group. At a share s a group of n units loses s * n
    of them, rounded to the nearest whole number (ours: torch-pruning rounds up, by single channels), and one of each
    group stays.

    In the paper the share is given; here it follows from the budget, which is exact. A share that would overshoot the
    window of a `ratio` is used for the first groups of the forward pass only (our choice): a group then has at most one
    unit more or fewer than s * n, rounded. With a `target` the set nearest to it is taken, as Threshold does. Protected
    units stay, and their groups lose other units.
    """

    choice: ClassVar[str] = "equal_share"

    def select(self, pool: Pool, scores: Mapping[str, float], measure: Measure | None = None) -> list[str]:
        return super().select(pool, self.removing_shares(pool, scores))

    def removing_shares(self, pool: Pool, scores: Mapping[str, float]) -> dict[str, float]:
        """Return for each unit the share from which on it is removed.

        The unit of rank k (0 has the lowest score) among the n units of its group is removed from (k + 1/2) / n on,
        where s * n is rounded up to k + 1. Protected units are ranked last.
        """
        protected = set(self.protected_units(pool.units))
        groups: dict[str, list[str]] = {}
        for unit in pool.units:
            groups.setdefault(group(unit.name), []).append(unit.name)
        return {
            name: (rank + 0.5) / len(names)
            for names in groups.values()
            for rank, name in enumerate(sorted(names, key=lambda name: (name in protected, scores[name])))
        }
