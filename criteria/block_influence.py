"""Block influence: how much a unit turns what passes through it (ShortGPT, arXiv 2403.03853)."""

import torch.nn.functional as F

from criteria.base import Batch
from criteria.per_sample import PerSample


class BlockInfluence(PerSample):
    """s_i = 1 - E[ cos(what the bypass of unit i would give, the unit's output) ], between 0 and 2.

    One dense forward pass scores all units. ShortGPT compares the hidden states before and after a decoder layer token
    by token. To take a sample's whole feature map as one vector is our choice, and so is to compare with the output
    of the bypass instead of with the input: the two are the same where the bypass is the identity, and a ResNet block
    that changes channels has no input of its output's shape.
    """

    def update(self, batch: Batch) -> None:
        inputs = self.backbone.calibration_inputs(batch, self.seed)
        with self.backbone.watching(list(self.place)) as seen:
            self.backbone.predict(inputs)
        for name in self.place:
            one, other = (tensor.double().flatten(1) for tensor in seen[name])
            self.add(name, 1 - F.cosine_similarity(one, other, dim=1))
