"""Training a classifier: it makes the feature extractors of `frechet_resnet20` and `frechet_digits`."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from lightning_modules.backbones.resnet_cifar import CIFAR_MEAN, CIFAR_STD, CifarResNet
from lightning_modules.base import Optimizer, Schedule, TrainedModule, sum_over_ranks


class Classifier(TrainedModule):
    """Cross-entropy training of a CIFAR ResNet; `test_step` measures the accuracy on the held-out images."""

    def __init__(
        self, network: CifarResNet, optimizer: Optimizer, lr_scheduler: Schedule, seed: int, dump: Path
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, dump)
        self.network = network.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.network(batch["image"].contiguous(memory_format=torch.channels_last))
        accuracy = (logits.argmax(1) == batch["label"]).float().mean()
        return {"loss": F.cross_entropy(logits, batch["label"]), "accuracy": accuracy}

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
        """model.safetensors in half precision."""
        half = {name: t.half() if t.is_floating_point() else t for name, t in self.network.state_dict().items()}
        save_file({name: tensor.contiguous() for name, tensor in half.items()}, folder / "model.safetensors")


def from_blocks(
    blocks: int,
    optimizer: Optimizer,
    lr_scheduler: Schedule,
    seed: int,
    dump: Path,
    mean: Sequence[float] = CIFAR_MEAN,
    std: Sequence[float] = CIFAR_STD,
) -> Classifier:
    """A Classifier with fresh weights, drawn from `seed`; `mean` and `std` have a value a channel of the images."""
    torch.manual_seed(seed)
    return Classifier(CifarResNet(blocks, mean=mean, std=std), optimizer, lr_scheduler, seed, dump)
