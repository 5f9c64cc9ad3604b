"""Block influence: how much a unit turns what passes through it (ShortGPT, arXiv 2403.03853)."""

import torch
import torch.nn.functional as F

from criteria.base import Batch
from criteria.scores.shared.leave_one_out import PerSample


class BlockInfluence(PerSample):
    """s_i = 1 - E[ cos(what the bypass of unit i would give, the unit's output) ], between 0 and 2.

    One dense forward pass scores all units. Hidden states of language models (N,L,D) are compared token by token, as
    ShortGPT does before and after a decoder layer, and averaged over a sample's (those that count, where not all do).
    To take a sample's whole feature map as one vector elsewhere is our choice, and so is to compare with the output of
    the bypass instead of with the input: the two are the same where the bypass is the identity, and a ResNet block that
    changes channels has no input of its output's shape.
    """

    def update(self, batch: Batch) -> None:
        inputs = self.backbone.calibration_inputs(batch, self.seed)
        with self.backbone.watching(list(self.place)) as seen:
            self.backbone.predict(inputs)
        for name in self.place:
            one, other = (tensor.double() for tensor in seen[name])
            if not self.backbone.writes_text:
                one, other = one.flatten(1)[:, None], other.flatten(1)[:, None]
            turned_NL = 1 - F.cosine_similarity(one, other, dim=2)
            counts_NL = inputs.get("mask", torch.ones_like(turned_NL)).to(turned_NL)
            self.add(name, (turned_NL * counts_NL).sum(1) / counts_NL.sum(1))
