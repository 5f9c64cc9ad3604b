"""BK-SDM's fixed sets of blocks (arXiv 2305.15798): no scores, and no ratio but the one they come to."""

from dataclasses import dataclass
from typing import Any

VARIANTS = ("base", "small", "tiny")


@dataclass
class BkSdm:
    """The whole network by a smaller one of its kind: see lightning_modules/backbones/diffusion/restage.py.

    `variant`: base takes the second ResNet block and attention of every stage, small the middle block, too, and tiny
    the innermost stage as well. Of SD1.x's parameters 0.326, 0.439 and 0.624 are removed. Raises ValueError for
    another.
    """

    variant: str = "base"

    needs_scores = False
    budget = "params"
    """what the achieved ratio is stated in"""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"selection.variant={self.variant!r} is unknown; choose one of: {', '.join(VARIANTS)}")

    def check(self, pool: Any) -> None:
        """Any pool will do: the sets are not made of its units."""

    def changes(self, pool: Any, scores: Any, measure: Any = None) -> list[dict[str, str]]:
        """One change, of the whole network; pool, scores and measure have no say in it."""
        return [{"kind": "restage", "variant": self.variant}]
