"""The units that the user names."""

from collections.abc import Mapping
from dataclasses import dataclass

from criteria.base import parse_choice
from criteria.selection.base import Budget, Measure, Pool, Selection, check_names


@dataclass
class Given(Selection):
    """Removes exactly the listed units, whatever ratio they add up to; `budget` is the cost the ratio is stated in."""

    units: list[str]
    budget: str = Budget.PARAMS.value

    def __post_init__(self) -> None:
        self.budget = parse_choice(Budget, "selection.budget", self.budget)

    def check(self, pool: Pool) -> None:
        """Raise ValueError for an empty list, an unknown unit (naming the nearest), or a unit inside another one.

        ValueError as well for a budget that this network does not have.
        """
        if self.budget != Budget.LATENCY:  # latency is measured in the end
            pool.total(self.budget)
        if not self.units:
            raise ValueError("selection.units is empty; list at least one unit to remove")
        check_names(self.units, pool.units, "selection.units")
        for unit in pool.units:
            if unit.name in self.units and unit.inside in self.units:
                raise ValueError(f"selection.units: {unit.name!r} is inside {unit.inside!r}; list only one of the two")

    def select(self, pool: Pool, scores: Mapping[str, float], measure: Measure | None = None) -> list[str]:
        return [unit.name for unit in pool.units if unit.name in self.units]
