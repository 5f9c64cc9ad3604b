"""The base class of selections that start at the knapsack's plan and measure joint losses to find a better one."""

from dataclasses import dataclass
from typing import ClassVar

from criteria.selection.base import Measure
from criteria.selection.knapsack import Knapsack


@dataclass
class MeasuredKnapsack(Knapsack):
    """A knapsack with a bound on the number of joint losses that may be measured.

    `evaluations`: how many losses may be measured.
    """

    evaluations: int = 64

    needs_joint_loss = True
    chooses_least_harm: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluations < 1:
            raise ValueError(f"selection.evaluations={self.evaluations} is out of range; choose 1 or more")

    def require_measure(self, measure: Measure | None, measured: str) -> Measure:
        """Return `measure`; raise ValueError without one, saying what is `measured`."""
        if measure is None:
            raise ValueError(
                f"selection.name={type(self).__name__.lower()!r} measures the joint loss of {measured}, and nothing to "
                "measure it with is given; choose selection=knapsack"
            )
        return measure
