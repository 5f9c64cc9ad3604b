"""The ResNets for CIFAR of He et al. 2015 (arXiv 1512.03385, section 4.2), with parameter-free option A shortcuts."""

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class BasicBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.pad = stride, (channels - channels_in) // 2

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)))
        h_BCHW = self.bn2(self.conv2(h_BCHW))
        if self.stride != 1:  # option A: subsample, and zeros for the new channels
            x_BCHW = F.pad(x_BCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(h_BCHW + x_BCHW)


class CifarResNet(nn.Module):
    """6n+2 layers: three stages of n blocks with 16, 32 and 64 channels. n=3 is ResNet-20 (0.27M parameters).

    Takes (N,C,H,W) images in [-1,1], normalises each channel by its `mean` and `std` (of values in [0,1]; those of
    CIFAR-10 unless others are given), gives (N,classes) logits.
    """

    def __init__(
        self, blocks: int, classes: int = 10, mean: Sequence[float] = CIFAR_MEAN, std: Sequence[float] = CIFAR_STD
    ) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"mean={list(mean)} and std={list(std)} are to have a value a channel each")
        self.mean, self.std = tuple(mean), tuple(std)
        self.conv1 = nn.Conv2d(len(self.mean), 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    *(
                        BasicBlock(widths[s] if b == 0 else widths[s + 1], widths[s + 1], 2 if s and b == 0 else 1)
                        for b in range(blocks)
                    )
                )
                for s in range(3)
            )
        )
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def features(self, image_BCHW: Tensor) -> Tensor:
        """(N,C,H,W) images in [-1,1] -> (N,64) pooled features of the last stage."""
        mean, std = image_BCHW.new_tensor(self.mean), image_BCHW.new_tensor(self.std)
        x_BCHW = (image_BCHW / 2 + 0.5 - mean[:, None, None]) / std[:, None, None]
        return self.stages(F.relu(self.bn1(self.conv1(x_BCHW)))).mean((2, 3))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.linear(self.features(image_BCHW))


def load_resnet(
    path: str | Path, blocks: int, mean: Sequence[float] = CIFAR_MEAN, std: Sequence[float] = CIFAR_STD
) -> CifarResNet:
    """A trained network, frozen and in eval mode, from safetensors (half precision on disk is widened)."""
    network = CifarResNet(blocks, mean=mean, std=std)
    network.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()}
    )
    return network.eval().requires_grad_(False)
