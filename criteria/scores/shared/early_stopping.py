"""Early stopping of a scoring: no further batch is looked at once none changes what would be removed."""

import math
from collections.abc import Mapping, Sequence

from criteria.base import Unit
from criteria.selection.base import InfeasibleBudget, Pool
from criteria.selection.knapsack import Knapsack

TOLERANCE = 0.02
"""Of the knapsacks on the grid; fixed, so that scores do not depend on the selection of a job."""


class Stopping:
    """Settled when the exact knapsack's answers did not change over the last `stable_for` batches.

    This is our choice, no paper's. `ratios` is a fixed grid and not the ratio of a job, so that all jobs of a sweep
    share the scores; a ratio that no set of units meets is left out, and where none can be met nothing settles. The
    ratios are fractions of the parameters of all units together (what is in no unit has no score, and of a unit
    inside another both count): a grid to compare answers on needs no better base.

    `stable_for`: a number of batches, null for never settling. `batches_at_least`: no settling before that many.
    Raises ValueError for a value out of range.
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
        """Begin with no batch seen."""
        self.pool = Pool(units=list(units), totals={"params": sum(unit.params for unit in units)})
        self.knapsacks = [Knapsack(ratio=ratio, tolerance=TOLERANCE) for ratio in self.ratios]
        self.batches = self.unchanged = 0
        self.answers: list[object] = []

    def look(self, scores: Mapping[str, float]) -> None:
        """Take the scores after one more batch into account; scores that are not finite settle nothing."""
        if self.stable_for is None:
            return
        self.batches += 1
        answers = self.solve(scores) if all(map(math.isfinite, scores.values())) else []
        self.unchanged = self.unchanged + 1 if answers and answers == self.answers else 0
        self.answers = answers

    def solve(self, scores: Mapping[str, float]) -> list[object]:
        """What the knapsack would remove at each ratio of the grid that can be met."""
        answers: list[object] = []
        for knapsack in list(self.knapsacks):
            try:
                answers.append(knapsack.changes(self.pool, scores))
            except InfeasibleBudget:  # a matter of the units' sizes only: it will be so after every batch
                self.knapsacks.remove(knapsack)
        return answers

    def settled(self) -> bool:
        """Have enough batches been seen, and the last `stable_for` of them changed nothing?"""
        return (
            self.stable_for is not None and self.batches >= self.batches_at_least and self.unchanged >= self.stable_for
        )
