"""AutoBot (arXiv 2111.09635): units behind trainable gates, under a budget that the gates have to keep."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from criteria.base import Backbone, Batch, Criterion, Unit, check_level, zeros
from criteria.selection.base import group


class Bottleneck(Criterion):
    """The gate of a unit, between 0 and 1, after training all gates together; the network itself is frozen.

    A gate is lambda = sigmoid(alpha), `init` at first. The alphas are trained with Adam at `lr`, a step per calibration
    batch, by `module` (lightning_modules/modules/gate_training.py), on

        task loss + beta * L_g + gamma * L_h,

    where L_g (`budget_loss`) draws the cost under gates to what is wanted and L_h (`binary_loss`) draws the gates to 0
    or 1. Wanted is `target`, in units of `budget` (params | macs | flops), or a fraction 1 - `ratio` of the whole
    network's. The gates kept are those of the iteration of the lowest loss, of all behind the share `keep_after`. The
    scores therefore belong to one cost, which is given along with them.

    The paper has gates of the channels of classifiers, whose task loss is cross-entropy. In a residual stream that is
    narrowed, gates are on what is read from it, not on the stream itself (ours; the same at 0 and 1). Gates of other
    units, such as whole blocks of a diffusion network (`level` depth) with its squared error, are ours.
    """

    needs_grad = True

    def __init__(
        self,
        ratio: float | None = None,
        target: float | None = None,
        budget: str = "params",
        level: str = "channel",
        beta: float = 6.0,
        gamma: float = 0.2,
        lr: float = 0.5,
        init: float = 0.9,
        keep_after: float = 0.6,
        module: Callable[..., Any] | None = None,
    ) -> None:
        if (ratio is None) == (target is None):
            raise ValueError(
                f"criterion.ratio={ratio}, criterion.target={target}: gates are trained for one cost; give exactly one "
                "of selection.ratio and selection.target (the criterion takes over what the selection has)"
            )
        if ratio is not None and not 0 < ratio < 1:
            raise ValueError(f"selection.ratio={ratio} is out of range; choose 0 < ratio < 1")
        if target is not None and target <= 0:
            raise ValueError(f"selection.target={target} is out of range; choose more than 0")
        if min(beta, gamma) < 0:
            raise ValueError(f"criterion.beta={beta}, criterion.gamma={gamma}: choose 0 or more for both")
        if not lr > 0:
            raise ValueError(f"criterion.lr={lr} is out of range; choose more than 0")
        if not 0 < init < 1:
            raise ValueError(f"criterion.init={init} is out of range; choose 0 < init < 1")
        if not 0 <= keep_after < 1:
            raise ValueError(f"criterion.keep_after={keep_after} is out of range; choose 0 <= keep_after < 1")
        self.level = check_level(level)
        self.ratio, self.target, self.budget = ratio, target, budget
        self.beta, self.gamma, self.lr, self.init = beta, gamma, lr, init
        self.keep_after, self.module = keep_after, module
        self.history: list[dict[str, float]] = []
        """of each iteration: loss, task, L_g, L_h, and the cost under gates"""

    def supports(self, backbone: Backbone) -> str | None:
        """Also: that the cost is one of this network's."""
        if reason := super().supports(backbone):
            return reason
        totals = backbone.totals()
        if self.budget not in totals:
            return f"gates are trained for a cost that is counted; choose selection.budget from: {', '.join(totals)}"
        return None

    def spreads_batches(self, backbone: Any) -> bool:
        """Timesteps of diffusion networks go with the samples' numbers, and each batch is a step of the gates."""
        return bool(backbone.stratifies_timesteps)

    def start(self, backbone: Backbone, units: Sequence[Unit], seed: int) -> None:
        """Begin with all gates at `init`; `alphas` are what is trained: {group: (units of the group,)}."""
        super().start(backbone, units, seed)
        sizes: dict[str, int] = {}
        for unit in units:
            sizes[group(unit.name)] = sizes.get(group(unit.name), 0) + 1
        alpha = torch.tensor(self.init).logit()
        self.alphas = {name: nn.Parameter(alpha.repeat(size)) for name, size in sizes.items()}
        self.whole = backbone.totals()[self.budget]
        self.wanted = self.target if self.target is not None else (1 - self.ratio) * self.whole  # type: ignore[operator]
        self.history = []
        self.lowest = float("inf")
        self.kept = self.gates()

    def update(self, batch: Batch) -> None:
        """Raise ValueError: batches are steps of a training here."""
        raise ValueError("criterion.module=null: gates are trained; choose what conf/criterion/bottleneck.yaml names")

    def gates(self) -> dict[str, Tensor]:
        """lambda = sigmoid(alpha), by group."""
        return {name: alpha.sigmoid() for name, alpha in self.alphas.items()}

    def task_losses(self, batch: Batch, gates: Mapping[str, Tensor]) -> Tensor:
        """The task loss of each sample under gates: (N,)."""
        inputs = self.backbone.calibration_inputs(batch, self.seed)
        with self.backbone.gated(gates, self.level):
            return self.backbone.losses(self.backbone.predict(inputs), inputs)

    def objective(self, task: Tensor, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is minimised ("loss") and what it is made of, scalars; "cost" is that of the network under gates."""
        cost = self.backbone.soft_cost(gates, self.budget, self.level)
        l_g, l_h = budget_loss(cost, self.wanted, self.whole), binary_loss(gates)
        loss = task + self.beta * l_g + self.gamma * l_h
        return {"loss": loss, "task": task, "L_g": l_g, "L_h": l_h, "cost": cost}

    def record(self, losses: Mapping[str, float], gates: Mapping[str, Tensor], iterations: int) -> None:
        """Note one of so many iterations, and keep its gates where its loss is the lowest of those that count."""
        place, first = len(self.history), min(int(self.keep_after * iterations) + 1, iterations - 1)
        self.history.append(dict(losses))
        if place >= first and losses["loss"] < self.lowest:
            self.lowest = losses["loss"]
            self.kept = {name: gate.detach().clone() for name, gate in gates.items()}

    def compute(self) -> dict[str, dict[str, float]]:
        score = zeros(len(self.units))
        for i, unit in enumerate(self.units):
            number = unit.name.partition(":")[2]
            score[i] = self.kept[group(unit.name)][int(number or 0)].detach()
        return self.table(score=score)


def budget_loss(cost: Tensor, wanted: float, whole: float) -> Tensor:
    """L_g: 1 for the whole network, 0 where the cost is what is wanted, 1 where nothing is left."""
    return (cost - wanted) / (whole - wanted) if cost > wanted else 1 - cost / wanted


def binary_loss(gates: Mapping[str, Tensor]) -> Tensor:
    """L_h: how far gates are from 0 or 1, the mean over groups of the mean over a group's units."""
    return torch.stack([(gate - gate.round()).abs().mean() for gate in gates.values()]).mean()
