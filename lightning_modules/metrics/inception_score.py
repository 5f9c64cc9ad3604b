"""Inception Score (arXiv 1606.03498)."""

import warnings
from typing import Any

import torch
from torch import nn

from lightning_modules.metrics.features import Features
from lightning_modules.metrics.protocol import OnFeatures, Reference, Samples


class InceptionScore(OnFeatures):
    """Inception Score exp(E KL(p(y|x) || p(y))) (arXiv 1606.03498), the mean over `splits` parts of the samples.

    `features` are the log-probabilities of classes. On another classifier than Inception it is another measure, which
    needs another name.
    """

    better = "higher"

    def __init__(self, features: Features, splits: int = 10) -> None:
        super().__init__(features)
        self.splits = splits

    def protocol(self, reference: Reference) -> dict[str, Any]:
        return super().protocol(reference) | {"splits": self.splits}

    def __call__(self, samples: Samples, reference: Reference) -> float:
        from torchmetrics.image.inception import InceptionScore as Score  # noqa: PLC0415  slow to import

        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # it keeps the features, and one split has no deviation
            torch.manual_seed(0)  # the samples are shuffled before they are split
            score = Score(feature=nn.Identity(), splits=self.splits)
            score.update(torch.from_numpy(samples.features(self.features)))  # softmax undoes the logarithm
            return float(score.compute()[0])
