"""Tiny image classifiers of random weights."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.backbones.classification.backbone import ClassifierBackbone
from lightning_modules.backbones.classification.image_networks import CifarResNet

CLASSES = 3


def tiny_resnet(classes: int = CLASSES) -> CifarResNet:
    """Three blocks for images of 8x8, in eval mode, the same in every call; no two channels are alike."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = CifarResNet(1, classes=classes, image_size=8)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def tiny_classifier(classes: int = CLASSES) -> ClassifierBackbone:
    return ClassifierBackbone(tiny_resnet(classes))


def percent_right(network: nn.Module, images: Any, labels: Any, top: int = 1) -> float:
    """Accuracy by hand, of uint8 (N,H,W,C) images."""
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        order: Tensor = network.eval()(batch).argsort(1, descending=True)
    return 100 * float(sum(label in row[:top] for row, label in zip(order, labels, strict=True))) / len(labels)
