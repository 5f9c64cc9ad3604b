"""BK-SDM's fixed sets of blocks (arXiv 2305.15798): no scores, and no ratio but the one they come to."""

from collections.abc import Mapping
from dataclasses import dataclass

from criteria.selection.base import Measure, Pool, Selection

VARIANTS = ("base", "small", "tiny")


@dataclass
class BkSdm(Selection):
    """The whole network by a smaller one of its kind: see lightning_modules/backbones/diffusion/restage.py.

    `variant`: base takes the second ResNet block and attention of every stage, small the middle block, too, and tiny
    the innermost stage as well. Of SD1.x's parameters 0.326, 0.439 and 0.624 are removed. Raises ValueError for
    another.
    """

    variant: str = "base"

    needs_scores = False

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"selection.variant={self.variant!r} is unknown; choose one of: {', '.join(VARIANTS)}")

    def changes(self, pool: Pool, scores: Mapping[str, float], measure: Measure | None = None) -> list[dict[str, str]]:
        """Return one change, of the whole network; pool, scores and measure have no say in it."""
        return [{"kind": "restage", "variant": self.variant}]
