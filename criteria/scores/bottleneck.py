"""AutoBot (arXiv 2111.09635): trainable gates on all units, under a budget that the gates have to meet."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from criteria.base import Batch, Criterion, Scores, Unit, parse_level, zeros
from criteria.protocols import Gateable
from criteria.selection.base import group


class Bottleneck(Criterion[Gateable]):
    """s_i = the gate of unit i, between 0 and 1, after all gates were trained together with the network frozen.

    A gate is lambda = sigmoid(alpha). The alphas are trained with Adam, one step per calibration batch, on

        task loss + beta * L_g + gamma * L_h,

    where L_g (`budget_loss`) draws the cost under gates to the wanted cost and L_h (`binary_loss`) draws the gates to 0
    or 1. The scores are the gates of the iteration with the lowest loss among the last ones (`keep_after`). They belong
    to one cost, and are an order of the units rather than harms that add up.

    Loss, optimiser and gates follow the authors' code; the formulas printed in the paper were not seen. There the gates
    are on channels of classifiers, with the cross-entropy as task loss. In a residual stream that is narrowed, gates
    are on what is read from it, not on the stream itself (ours; the same at gates of 0 and 1). Gates of other units,
    such as whole blocks of a diffusion network (`level` depth) with its squared error, are ours.

    Args:
        ratio: the fraction of the network's cost to remove; None with a target.
        target: the cost that is to be left, in units of `budget`; None with a ratio.
        budget: params | macs | flops.
        level: depth | operator | channel.
        beta: weight of L_g.
        gamma: weight of L_h.
        lr: learning rate of Adam.
        init: all gates before the first step.
        keep_after: the share of the iterations after which the gates of the lowest loss are stored.
        module: (criterion, backbone) -> the LightningModule that trains the gates, see
            lightning_modules/modules/gate_training.py.
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
        self.level = parse_level(level)
        self.ratio, self.target, self.budget = ratio, target, budget
        self.beta, self.gamma, self.lr, self.init = beta, gamma, lr, init
        self.keep_after, self.module = keep_after, module
        self.history: list[dict[str, float]] = []
        """per iteration: loss, task, L_g, L_h, and the cost under gates"""

    def supports(self, backbone: Gateable) -> str | None:
        """Return a reason as well for a budget that this network does not have."""
        if reason := super().supports(backbone):
            return reason
        totals = backbone.totals()
        if self.budget not in totals:
            return f"gates are trained for a cost that is counted; choose selection.budget from: {', '.join(totals)}"
        return None

    def spreads_batches(self, backbone: Gateable) -> bool:
        """Return whether timesteps go with the samples' numbers: each batch is a step, and must have all timesteps."""
        return backbone.stratifies_timesteps

    def start(self, backbone: Gateable, units: Sequence[Unit], seed: int) -> None:
        """Begin with all gates at `init`; `alphas` are the trained parameters: {group: (units of the group,)}."""
        super().start(backbone, units, seed)
        sizes: dict[str, int] = {}
        for unit in units:
            sizes[group(unit.name)] = sizes.get(group(unit.name), 0) + 1
        alpha = torch.tensor(self.init).logit()
        self.alphas = {name: nn.Parameter(alpha.repeat(size)) for name, size in sizes.items()}
        self.whole = backbone.totals()[self.budget]
        if self.ratio is not None:
            self.wanted = (1 - self.ratio) * self.whole
        else:
            assert self.target is not None
            self.wanted = self.target
        self.history = []
        self.lowest = float("inf")
        self.kept = self.gates()

    def update(self, batch: Batch) -> None:
        """Raise ValueError: batches are steps of a training here."""
        raise ValueError("criterion.module=null: gates are trained; choose what conf/criterion/bottleneck.yaml names")

    def gates(self) -> dict[str, Tensor]:
        """Return the gates lambda = sigmoid(alpha): {group: (units of the group,)}."""
        return {name: alpha.sigmoid() for name, alpha in self.alphas.items()}

    def task_losses(self, batch: Batch, gates: Mapping[str, Tensor]) -> Tensor:
        """Return the task loss of each sample under gates, (N,)."""
        inputs = self.backbone.calibration_inputs(batch, self.seed)
        with self.backbone.gated(gates, self.level):
            return self.backbone.losses(self.backbone.predict(inputs), inputs)

    def objective(self, task: Tensor, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the minimised "loss" and its parts, scalars, and the "cost" of the network under gates."""
        cost = self.backbone.soft_cost(gates, self.budget, self.level)
        l_g, l_h = budget_loss(cost, self.wanted, self.whole), binary_loss(gates)
        loss = task + self.beta * l_g + self.gamma * l_h
        return {"loss": loss, "task": task, "L_g": l_g, "L_h": l_h, "cost": cost}

    def record(self, losses: Mapping[str, float], gates: Mapping[str, Tensor], iterations: int) -> None:
        """Log one training iteration; store the gates if its loss is the lowest after the first `keep_after` share.

        `iterations` is the number of all iterations of the training.
        """
        iteration, first = len(self.history), min(int(self.keep_after * iterations) + 1, iterations - 1)
        self.history.append(dict(losses))
        if iteration >= first and losses["loss"] < self.lowest:
            self.lowest = losses["loss"]
            self.kept = {name: gate.detach().clone() for name, gate in gates.items()}

    def compute(self) -> Scores:
        score = zeros(len(self.units))
        for i, unit in enumerate(self.units):
            number = unit.name.partition(":")[2]
            score[i] = self.kept[group(unit.name)][int(number or 0)].detach()
        return self.table(score=score)


def budget_loss(cost: Tensor, wanted: float, whole: float) -> Tensor:
    """Return L_g: 1 for the whole network, 0 where the cost is the wanted one, 1 where nothing is left."""
    return (cost - wanted) / (whole - wanted) if cost > wanted else 1 - cost / wanted


def binary_loss(gates: Mapping[str, Tensor]) -> Tensor:
    """Return L_h: the distance of gates to 0 or 1, the mean over groups of the mean over a group's units."""
    return torch.stack([(gate - gate.round()).abs().mean() for gate in gates.values()]).mean()
