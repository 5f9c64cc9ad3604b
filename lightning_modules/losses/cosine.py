"""The cosine distance between feature maps."""

import torch.nn.functional as F
from torch import Tensor


class CosineDistance:
    """One minus the cosine between the channel vectors of two feature maps, averaged over samples and positions.

    Equations 1 and 2 of Deng & Li 2022 (arXiv 2201.10703), which define it for one level. It does not depend on the
    norm of the features, so that no level dominates: use it with normalization=none. Its use for pruning is ours.
    """

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the distance, a scalar in [0, 2], of two maps of shape (N,C,H,W), (N,L,C) or (N,C)."""
        return 1 - F.cosine_similarity(student, teacher, dim=1 if student.dim() == 4 else -1).mean()
