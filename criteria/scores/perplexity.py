"""Perplexity of a language model without one unit (Shortened LLaMA, arXiv 2402.02834)."""

from collections.abc import Callable

import torch
from torch import Tensor

from criteria.base import Backbone, Batch
from criteria.scores.shared.leave_one_out import OneRemoved


class Perplexity(OneRemoved):
    """s_i = exp( mean negative log-likelihood of the calibration tokens with only unit i removed ).

    The mean is over samples, which is that over all predicted tokens where samples are equally long, as in the paper;
    of samples with padding it is the mean of their own means. `standard_error` is that of the mean
    log-likelihood over samples, times the perplexity.
    """

    def supports(self, backbone: Backbone) -> str | None:
        if not backbone.writes_text:
            return "it is no language model; choose criterion=task_loss"
        return super().supports(backbone)

    def harm(self, dense: Tensor, inputs: Batch) -> Callable[[Tensor], Tensor]:
        return lambda output: self.backbone.losses(output, inputs)

    def compute(self) -> dict[str, dict[str, float]]:
        found = super().compute()
        score = torch.tensor([entry["score"] for entry in found.values()], dtype=torch.float64).exp()
        error = torch.tensor([entry["standard_error"] for entry in found.values()], dtype=torch.float64)
        return self.table(score=score, standard_error=score * error)
