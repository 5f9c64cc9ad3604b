"""Perplexity of a language model without one unit (Shortened LLaMA, arXiv 2402.02834)."""

from collections.abc import Callable

import torch
from torch import Tensor

from criteria.base import Batch, Scores
from criteria.protocols import Scorable
from criteria.scores.shared.leave_one_out import OneRemoved


class Perplexity(OneRemoved):
    """s_i = exp( mean negative log-likelihood of the calibration tokens with only unit i removed ).

    The mean over samples is the mean over all predicted tokens where samples have the same length, as in the paper; of
    padded samples it is the mean of their own means. `standard_error` is the one of the mean log-likelihood over
    samples, times the perplexity. The zero of these scores is not the dense network: they are an order of the units
    (selection=ranked, as in the paper).
    """

    def supports(self, backbone: Scorable) -> str | None:
        """Return why a network cannot be scored, or None. Networks that are not language models cannot."""
        if not backbone.writes_text:
            return "it is no language model; choose criterion=task_loss"
        return super().supports(backbone)

    def harm_function(self, dense: Tensor, inputs: Batch) -> Callable[[Tensor], Tensor]:
        return lambda output: self.backbone.losses(output, inputs)

    def compute(self) -> Scores:
        losses = super().compute().values()
        score = torch.tensor([entry["score"] for entry in losses], dtype=torch.float64).exp()
        error = torch.tensor([entry["standard_error"] for entry in losses], dtype=torch.float64)
        return self.table(score=score, standard_error=score * error)
