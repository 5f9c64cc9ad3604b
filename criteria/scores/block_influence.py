"""Block influence: how much a unit turns what passes through it (ShortGPT, arXiv 2403.03853)."""

import torch
import torch.nn.functional as F

from criteria.base import Batch
from criteria.protocols import Scorable
from criteria.scores.shared.leave_one_out import PerSample


class BlockInfluence(PerSample[Scorable]):
    """s_i = 1 - E[ cos(output of the bypass of unit i, output of unit i) ], between 0 (no harm) and 2.

    One dense forward pass scores all units. Hidden states of language models (N,L,D) are compared token by token, as
    ShortGPT compares the input and the output of a decoder layer, and averaged over the tokens of a sample (those that
    the mask counts). Ours: elsewhere a sample's whole feature map is one vector, and a unit's output is compared with
    the output of its bypass instead of its input. The two are the same where the bypass is the identity; a ResNet block
    that changes channels has no input with its output's shape.
    """

    def update(self, batch: Batch) -> None:
        inputs = self.backbone.calibration_inputs(batch, self.seed)
        with self.backbone.watching(list(self.index)) as outputs:
            self.backbone.predict(inputs)
        for name in self.index:
            output, bypassed = (tensor.double() for tensor in outputs[name])
            if not self.backbone.writes_text:
                output, bypassed = output.flatten(1)[:, None], bypassed.flatten(1)[:, None]
            turned_NL = 1 - F.cosine_similarity(output, bypassed, dim=2)
            counts_NL = inputs.get("mask", torch.ones_like(turned_NL)).to(turned_NL)
            self.add(name, (turned_NL * counts_NL).sum(1) / counts_NL.sum(1))
