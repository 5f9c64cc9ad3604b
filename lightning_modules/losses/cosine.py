"""A distance of directions between feature maps."""

import torch.nn.functional as F
from torch import Tensor


class CosineDistance:
    """Return 1 - cos(f_S, f_T), the mean over samples and places of the angle between vectors of channels.

    It ignores how large features are, so that no level outweighs another: choose normalization none with it. As a
    distance of feature maps it is a choice of ours, of no paper that is re-implemented here.
    """

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the distance of two feature maps, (N,C,H,W), or (N,L,C) of sequences; a scalar."""
        return 1 - F.cosine_similarity(student, teacher, dim=1 if student.dim() == 4 else -1).mean()
