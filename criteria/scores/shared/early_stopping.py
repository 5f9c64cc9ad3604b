"""Early stopping: scoring ends once further batches no longer change what would be removed."""

import math
from collections.abc import Mapping, Sequence

from criteria.base import Unit
from criteria.selection.base import InfeasibleBudget, Pool
from criteria.selection.knapsack import Knapsack

TOLERANCE = 0.02
"""Tolerance of the knapsacks on the grid; fixed, so that scores do not depend on the selection of a job."""


class Stopping:
    """Scoring has settled when the exact knapsack's plans did not change over the last `stable_for` batches.

    This is our choice, no paper's. `ratios` is a fixed grid and not the ratio of a job, so that all jobs of a sweep
    share the scores. A ratio that no set of units meets is left out; where none can be met, scoring never settles. The
    ratios are fractions of the parameters of all units together (a unit inside another counts as well), not of the
    network's: to compare plans this is enough.

    `stable_for`: a number of batches; None: scoring never settles. `batches_at_least`: it does not settle before so
    many. Raises ValueError for a value out of range.
    """

    def __init__(self, batches_at_least: int, stable_for: int | None, ratios: Sequence[float] | None) -> None:
        for field, value in {"batches_at_least": batches_at_least, "stable_for": stable_for}.items():
            if value is not None and value < 1:
                raise ValueError(f"criterion.{field}={value} is out of range; choose a whole number of 1 or more")
        wrong = [ratio for ratio in ratios or () if not 0 < ratio < 1]
        if wrong or (stable_for is not None and not ratios):
            raise ValueError(
                f"criterion.ratios={wrong or ratios} cannot be a grid to stop on; "
                "choose ratios between 0 and 1, or criterion.stable_for=null"
            )
        self.batches_at_least, self.stable_for, self.ratios = batches_at_least, stable_for, ratios or ()

    def start(self, units: Sequence[Unit]) -> None:
        """Begin a measurement, before the first batch."""
        self.pool = Pool(units=list(units), totals={"params": sum(unit.params for unit in units)})
        self.knapsacks = [Knapsack(ratio=ratio, tolerance=TOLERANCE) for ratio in self.ratios]
        self.batches = self.unchanged = 0
        self.plans: list[object] = []

    def observe(self, scores: Mapping[str, float]) -> None:
        """Compare the plans of the scores after one more batch; scores that are not finite never settle."""
        if self.stable_for is None:
            return
        self.batches += 1
        plans = self.solve_grid(scores) if all(map(math.isfinite, scores.values())) else []
        self.unchanged = self.unchanged + 1 if plans and plans == self.plans else 0
        self.plans = plans

    def solve_grid(self, scores: Mapping[str, float]) -> list[object]:
        """Return the changes of the knapsack at each ratio of the grid that can be met."""
        plans: list[object] = []
        for knapsack in list(self.knapsacks):
            try:
                plans.append(knapsack.changes(self.pool, scores))
            except InfeasibleBudget:  # which depends on the units' sizes alone: so it is after every batch
                self.knapsacks.remove(knapsack)
        return plans

    def settled(self) -> bool:
        """Return True once enough batches were seen and the last `stable_for` of them changed no plan."""
        return (
            self.stable_for is not None and self.batches >= self.batches_at_least and self.unchanged >= self.stable_for
        )
