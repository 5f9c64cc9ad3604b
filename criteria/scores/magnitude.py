"""Weight magnitude, the baseline that looks at no data (LAPTOP-Diff and Shortened LLaMA compare against it)."""

from criteria.base import Criterion, check_level, zeros


class Magnitude(Criterion):
    """Sum (or mean) of |w| over the parameters that go with a unit of one `level`.

    Shortened LLaMA sums over all weight matrices of a block; the reduction LAPTOP-Diff compares with is not known.
    """

    needs = "nothing"

    def __init__(self, reduction: str = "sum", level: str = "depth") -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"criterion.reduction={reduction!r} is unknown; choose one of: sum, mean")
        self.reduction, self.level = reduction, check_level(level)

    def compute(self) -> dict[str, dict[str, float]]:
        score = zeros(len(self.units))
        for i, unit in enumerate(self.units):
            weights = self.backbone.freed_weights(unit.name, self.backbone.weights())
            total = sum(float(weight.detach().double().abs().sum()) for weight in weights)
            score[i] = total / (sum(w.numel() for w in weights) if self.reduction == "mean" else 1)
        return self.table(score=score)
