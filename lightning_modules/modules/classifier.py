"""Training a classifier: a teacher to be pruned, or the features of `frechet_resnet20` and `frechet_digits`."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.backbones.classification.backbone import ClassifierBackbone
from lightning_modules.backbones.classification.image_networks import ImageNetwork, build, save
from lightning_modules.backbones.classification.load import named
from lightning_modules.modules.base import Optimizer, Schedule, TrainedModule, sum_over_ranks


class Classifier(TrainedModule):
    """Cross-entropy training; `test_step` measures the accuracy on the held-out images."""

    def __init__(
        self, network: ImageNetwork, optimizer: Optimizer, lr_scheduler: Schedule, seed: int, dump: Path
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, dump)
        self.network = network.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.network(batch["image"].contiguous(memory_format=torch.channels_last))
        accuracy = (logits.argmax(1) == batch["label"]).float().mean()
        return {"loss": F.cross_entropy(logits, batch["label"]), "accuracy": accuracy}

    def on_fit_start(self) -> None:
        ClassifierBackbone(self.network).check_data(self.trainer.datamodule)  # type: ignore[attr-defined]

    def on_test_start(self) -> None:
        self.counts = torch.zeros(2, dtype=torch.float64)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if batch_idx % self.trainer.world_size == self.global_rank:
            correct = (self.network(batch["image"]).argmax(1) == batch["label"]).sum()
            self.counts += torch.tensor([float(correct), len(batch["label"])], dtype=torch.float64)

    def on_test_epoch_end(self) -> None:
        correct, count = sum_over_ranks(self, self.counts).tolist()
        self.metrics = {"test_accuracy": correct / count, "test_images": int(count)}

    def save(self, folder: Path) -> None:
        """config.json and model.safetensors in half precision, which opens as a teacher."""
        save(copy.deepcopy(self.network).half(), folder)


def new_classifier(
    architecture: str,
    optimizer: Optimizer,
    lr_scheduler: Schedule,
    seed: int,
    dump: Path,
    classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
) -> Classifier:
    """A Classifier with fresh weights, drawn from `seed`.

    `architecture` is a name such as resnet56; `classes`, `image_size`, and `mean` and `std` (a value a channel of the
    images) are the architecture's unless given.
    """
    torch.manual_seed(seed)
    network = build(named(architecture, classes=classes, mean=mean, std=std, image_size=image_size))
    return Classifier(network, optimizer, lr_scheduler, seed, dump)
