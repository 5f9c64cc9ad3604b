"""A distance between the directions of feature maps."""

import torch.nn.functional as F
from torch import Tensor


class CosineDistance:
    """One minus the cosine between the vectors of channels of two feature maps, averaged over samples and positions.

    Equations 1 and 2 of Deng & Li 2022 (arXiv 2201.10703), there for one level. It does not depend on the size of the
    features, so that no level outweighs another: use it with normalization=none. Its use for pruning is ours.
    """

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the distance, a scalar in [0, 2], of maps of shape (N,C,H,W), or (N,L,C) or (N,C) of sequences."""
        return 1 - F.cosine_similarity(student, teacher, dim=1 if student.dim() == 4 else -1).mean()
