"""Optimisers that torch does not have."""

from collections.abc import Iterable

import torch
from torch import nn


class AdamWOfMatrices(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) whose decay leaves out biases and the scales of norms.

    These have one dimension; matrices, kernels of convolutions and embeddings have more.

    Args:
        params: the parameters.
        lr: learning rate.
        betas: shares of the old averages of the gradient and of its square.
        eps: what is added to the root of the average square.
        weight_decay: decay of the parameters with more than one dimension, per step and learning rate.
        foreach: update all parameters at once; None leaves it to torch.
        fused: update in one kernel; None leaves it to torch.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        parameters = list(params)
        decayed = {"params": [parameter for parameter in parameters if parameter.ndim > 1]}
        others = {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0}
        groups = [group for group in (decayed, others) if group["params"]]
        super().__init__(groups, lr, betas, eps, weight_decay, foreach=foreach, fused=fused)
