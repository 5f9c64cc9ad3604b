"""Training of an image classifier: a teacher to prune, or the feature network of a Frechet distance."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import SumMetric

from lightning_modules.backbones.classification.backbone import ClassifierBackbone
from lightning_modules.backbones.classification.image_networks import ImageNetwork, build, save
from lightning_modules.backbones.classification.load import make_network_config
from lightning_modules.modules.base import Optimizer, Schedule, TrainedModule, new_mean_metric


class Classifier(TrainedModule):
    """Trains a classifier on the cross-entropy; the test loop measures the accuracy on the held-out images.

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
        self.test_accuracy, self.test_images = new_mean_metric(), SumMetric()

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.network(batch["image"].contiguous(memory_format=torch.channels_last))
        accuracy = (logits.argmax(1) == batch["label"]).float().mean()
        return {"loss": F.cross_entropy(logits, batch["label"]), "accuracy": accuracy}

    def on_fit_start(self) -> None:
        ClassifierBackbone(self.network).check_data(self.trainer.datamodule)  # type: ignore[attr-defined]

    def on_test_start(self) -> None:
        self.test_accuracy.reset()
        self.test_images.reset()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        if batch_idx % self.trainer.world_size == self.global_rank:
            self.test_accuracy.update((self.network(batch["image"]).argmax(1) == batch["label"]).double())
            self.test_images.update(len(batch["label"]))

    def on_test_epoch_end(self) -> None:
        self.metrics = {
            "test_accuracy": float(self.test_accuracy.compute()),
            "test_images": int(self.test_images.compute()),
        }

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors in half precision, which can be loaded as a teacher."""
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
    """Return a Classifier with random weights.

    Args:
        architecture: name, such as resnet56; see conf/pretrain/classifier.yaml.
        optimizer: see TrainedModule.
        lr_scheduler: see TrainedModule.
        seed: seed of the weights, and of training.
        dump: see TrainedModule.
        classes: number of classes; None is the architecture's default.
        mean: mean of the images per channel, in [0, 1]; None is the architecture's default.
        std: standard deviation of the images per channel; None is the architecture's default.
        image_size: edge length of the images in pixels; None is the architecture's default.
    """
    torch.manual_seed(seed)
    network = build(make_network_config(architecture, classes=classes, mean=mean, std=std, image_size=image_size))
    return Classifier(network, optimizer, lr_scheduler, seed, dump)
