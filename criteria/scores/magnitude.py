"""Weight magnitude, the baseline that uses no data (Shortened LLaMA, arXiv 2402.02834)."""

from criteria.base import Criterion, Needs, Scores, parse_level, zeros
from criteria.protocols import Weighted


class Magnitude(Criterion[Weighted]):
    """s_i = sum (or mean) of |w| over the parameters that belong to unit i, of one `level`.

    Shortened LLaMA sums over all weight matrices of a block. A criterion by magnitude is a baseline of LAPTOP-Diff
    (arXiv 2404.11098) too, whose reduction is not known. Scores are an order of the units: also a unit whose removal
    changes nothing has weights.
    """

    needs = Needs.NOTHING

    def __init__(self, reduction: str = "sum", level: str = "depth") -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"criterion.reduction={reduction!r} is unknown; choose one of: sum, mean")
        self.reduction, self.level = reduction, parse_level(level)

    def compute(self) -> Scores:
        score = zeros(len(self.units))
        for i, unit in enumerate(self.units):
            weights = self.backbone.freed_weights(unit, self.backbone.weights())
            total = sum(float(weight.detach().double().abs().sum()) for weight in weights)
            score[i] = total / (sum(w.numel() for w in weights) if self.reduction == "mean" else 1)
        return self.table(score=score)
