"""BK-SDM's fixed sets of blocks (arXiv 2305.15798): no scores, and no other ratio than the one of the set."""

from collections.abc import Mapping
from dataclasses import dataclass

from criteria.base import ChangeKind
from criteria.selection.base import Measure, Pool, Selection

VARIANTS = ("base", "small", "tiny")


@dataclass
class BkSdm(Selection):
    """Replaces the whole network by a smaller one of its kind: see lightning_modules/backbones/diffusion/restage.py.

    `variant`: base removes the second ResNet block and attention of every stage, small also the middle block, tiny also
    the innermost stage. That is 0.326, 0.439 and 0.624 of SD1.x's parameters. Raises ValueError for another variant.
    """

    variant: str = "base"

    needs_scores = False

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"selection.variant={self.variant!r} is unknown; choose one of: {', '.join(VARIANTS)}")

    def changes(self, pool: Pool, scores: Mapping[str, float], measure: Measure | None = None) -> list[dict[str, str]]:
        """Return one change, of the whole network; it depends on none of the arguments."""
        return [{"kind": ChangeKind.RESTAGE, "variant": self.variant}]
