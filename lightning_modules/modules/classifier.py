"""Training of a classifier: a teacher to prune, or the features of `frechet_resnet20` and `frechet_digits`."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.backbones.classification.backbone import ClassifierBackbone
from lightning_modules.backbones.classification.image_networks import ImageNetwork, build, save
from lightning_modules.backbones.classification.load import make_network_config
from lightning_modules.modules.base import Optimizer, Schedule, TrainedModule, sum_over_ranks


class Classifier(TrainedModule):
    """A classifier trained on the cross-entropy; its test loop measures the accuracy on the held-out images.

    Args:
        network: the classifier.
        optimizer: see TrainedModule.
        lr_scheduler: see TrainedModule.
        seed: see TrainedModule.
        dump: see TrainedModule.
    """

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
        self.counts = torch.zeros(2, dtype=torch.float64)  # correctly classified images, all images

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if batch_idx % self.trainer.world_size == self.global_rank:
            correct = (self.network(batch["image"]).argmax(1) == batch["label"]).sum()
            self.counts += torch.tensor([float(correct), len(batch["label"])], dtype=torch.float64)

    def on_test_epoch_end(self) -> None:
        correct, count = sum_over_ranks(self, self.counts).tolist()
        self.metrics = {"test_accuracy": correct / count, "test_images": int(count)}

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors in half precision, which load as a teacher."""
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
    """Return a Classifier with new weights.

    Args:
        architecture: name, such as resnet56; see conf/pretrain/classifier.yaml.
        optimizer: see TrainedModule.
        lr_scheduler: see TrainedModule.
        seed: seed of the weights, and of training.
        dump: see TrainedModule.
        classes: number of classes; None is the architecture's usual one.
        mean: mean of the images per channel, in [0, 1]; None is the architecture's usual one.
        std: standard deviation of the images per channel; None is the architecture's usual one.
        image_size: edge of the images in pixels; None is the architecture's usual one.
    """
    torch.manual_seed(seed)
    network = build(make_network_config(architecture, classes=classes, mean=mean, std=std, image_size=image_size))
    return Classifier(network, optimizer, lr_scheduler, seed, dump)
