"""The units that the user names."""

from collections.abc import Mapping
from dataclasses import dataclass

from criteria.selection.base import Measure, Pool, Selection, check_budget, known


@dataclass
class Given(Selection):
    """Exactly the units that are listed, at whatever ratio they come to."""

    units: list[str]
    budget: str = "params"

    def __post_init__(self) -> None:
        check_budget(self.budget)

    def check(self, pool: Pool) -> None:
        """Raises ValueError for an empty list, for an unknown unit (naming the nearest) and for one inside another.

        ValueError as well for a budget that this network has not.
        """
        if self.budget != "latency":  # that is measured at the end
            pool.total(self.budget)
        if not self.units:
            raise ValueError("selection.units is empty; list at least one unit to remove")
        known(self.units, pool.units, "selection.units")
        for unit in pool.units:
            if unit.name in self.units and unit.inside in self.units:
                raise ValueError(f"selection.units: {unit.name!r} is inside {unit.inside!r}; list only one of the two")

    def select(self, pool: Pool, scores: Mapping[str, float], measure: Measure | None = None) -> list[str]:
        self.check(pool)
        return [unit.name for unit in pool.units if unit.name in self.units]
