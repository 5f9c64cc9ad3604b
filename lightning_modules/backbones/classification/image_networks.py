"""Image classifiers whose channels can be narrowed: networks for CIFAR, and ResNets of torchvision.

This file travels with exported networks: it needs torch and safetensors only, and torchvision for torchvision's
networks. `load(folder)` opens a folder with config.json and model.safetensors; the width of each layer is that of its
weights.

Tensors are named by shape: B images, C channels, H rows, W columns.
"""

import itertools
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageNetwork(nn.Module):
    """Base class: classifies images (B,C,H,W) with values in [-1,1], giving logits (B,classes).

    `config` has all arguments from which `build` makes the network again; it does not have the widths of layers. Raises
    ValueError where `mean` and `std` differ in length.

    Args:
        named: {"architecture": its name in ARCHITECTURES}, and the arguments of that architecture alone.
        classes: number of classes.
        mean: mean of each channel, of values in [0,1]; images are normalised by it.
        std: standard deviation of each channel, likewise.
        image_size: rows and columns of an image.
    """

    stage_names: Sequence[str]
    pooling: Mapping[tuple[str, str], int] = {}
    """{(layer, "in" or "out"): operations of average pooling per channel of the layer}, counted as thop does: 1 per
    output of an AvgPool2d, k^2 + 1 per output of an AdaptiveAvgPool2d over k x k inputs"""

    def __init__(
        self,
        named: dict[str, Any],
        classes: int = 10,
        mean: Sequence[float] = CIFAR_MEAN,
        std: Sequence[float] = CIFAR_STD,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"mean={list(mean)} and std={list(std)}: both need one value per channel")
        self.mean, self.std = tuple(mean), tuple(std)
        self.config = named | {"classes": classes, "mean": list(mean), "std": list(std), "image_size": image_size}

    def normalize(self, image_BCHW: Tensor) -> Tensor:
        """Return images (B,C,H,W) of values in [-1,1] with the mean and the standard deviation taken out."""
        mean, std = image_BCHW.new_tensor(self.mean), image_BCHW.new_tensor(self.std)
        return (image_BCHW / 2 + 0.5 - mean[:, None, None]) / std[:, None, None]

    def stage_modules(self) -> dict[str, nn.Module]:
        """Return the modules, by path, whose outputs a distillation can compare, in the order of the forward pass."""
        return {name: self.get_submodule(name) for name in self.stage_names}


def draw_weights(network: nn.Module) -> None:
    """Initial weights of convolutions and linear layers: He et al. 2015 (arXiv 1502.01852)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (option A of He et al.).

    `kept` are the channels of the stream that the remaining outputs of conv2 are added to; None is all of them. The
    stream itself is never narrowed, since the shortcut's zeros shift its channels from stage to stage.
    """

    kept: Tensor | None

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.channels, self.stride, self.pad = channels, stride, (channels - channels_in) // 2
        self.register_buffer("kept", None)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)))
        h_BCHW = self.bn2(self.conv2(h_BCHW))
        if self.stride != 1:  # option A: subsample, and zeros for the new channels
            x_BCHW = F.pad(x_BCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x_BCHW + h_BCHW if self.kept is None else x_BCHW.index_add(1, self.kept, h_BCHW))


class CifarResNet(ImageNetwork):
    """The ResNets for CIFAR of He et al. 2015 (arXiv 1512.03385, section 4.2): 6n+2 layers, option A shortcuts.

    Three stages of n `blocks` with 16, 32 and 64 channels. n=3 is ResNet-20 (0.27M parameters), 9 ResNet-56, 18
    ResNet-110.
    """

    stage_names = ("stages.0", "stages.1", "stages.2")

    def __init__(self, blocks: int, **common: Any) -> None:
        super().__init__({"architecture": "cifar_resnet", "blocks": blocks}, **common)
        self.conv1 = nn.Conv2d(len(self.mean), 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        self.stages = nn.Sequential()
        for before, width in itertools.pairwise(widths):
            first = BasicBlock(before, width, stride=width // before)
            self.stages.append(nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1))))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.pooling = {("linear", "in"): (-(-self.config["image_size"] // 4)) ** 2 + 1}
        self.linear = nn.Linear(64, self.config["classes"])
        draw_weights(self)

    def features(self, image_BCHW: Tensor) -> Tensor:
        """Return the pooled features (B,64) of the last stage, for images (B,C,H,W) with values in [-1,1]."""
        x_BCHW = F.relu(self.bn1(self.conv1(self.normalize(image_BCHW))))
        return self.avgpool(self.stages(x_BCHW)).flatten(1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.linear(self.features(image_BCHW))


def make_convolutions(channels_in: int, *layers: tuple[int, int]) -> list[nn.Module]:
    """Return convolutions with biases, each followed by BatchNorm and ReLU.

    `layers` are (output channels, kernel size) of each convolution.
    """
    modules: list[nn.Module] = []
    for channels, kernel in layers:
        modules += [nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2), nn.BatchNorm2d(channels), nn.ReLU()]
        channels_in = channels
    return modules


class Vgg16(ImageNetwork):
    """VGG-16 with BatchNorm for CIFAR, with the layers and the names of HRank (arXiv 2002.10179) and AutoBot.

    13 convolutions with biases, then two linear layers, the first with a BatchNorm.
    """

    stage_names = ("features.pool2", "features.pool5", "features.pool9", "features.pool13", "features.relu16")

    def __init__(self, **common: Any) -> None:
        super().__init__({"architecture": "vgg16_bn"}, **common)
        self.features, before = nn.Sequential(), len(self.mean)
        for i, width in enumerate((64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)):
            kinds = ("conv", "norm", "relu") if width else ("pool",)
            parts = make_convolutions(before, (width, 3)) if width else [nn.MaxPool2d(2)]
            for kind, part in zip(kinds, parts, strict=True):
                self.features.add_module(f"{kind}{i}", part)
            before = width or before
        head = {"linear1": nn.Linear(512, 512), "norm1": nn.BatchNorm1d(512), "relu1": nn.ReLU()}
        self.classifier = nn.Sequential(OrderedDict(head | {"linear2": nn.Linear(512, self.config["classes"])}))
        draw_weights(self)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BCHW = self.features(self.normalize(image_BCHW))
        return self.classifier(F.avg_pool2d(x_BCHW, self.config["image_size"] // 16).flatten(1))


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, whose outputs are concatenated to the inputs."""

    def __init__(self, channels_in: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(channels_in, growth, 3, padding=1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.cat((x_BCHW, self.conv1(self.relu(self.bn1(x_BCHW)))), 1)


class Transition(nn.Module):
    """BatchNorm, ReLU, a 1x1 convolution and a pooling that halves rows and columns."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.avgpool = nn.AvgPool2d(2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.avgpool(self.conv1(self.relu(self.bn1(x_BCHW))))


class DenseNet(ImageNetwork):
    """The DenseNets for CIFAR without bottlenecks or compression (Huang et al. 2016, arXiv 1608.06993, section 3).

    The first convolution has 2 * `growth` channels; each of the `layers` layers in each of three blocks adds `growth`
    channels. 12 layers of growth 12 are DenseNet-40, with the names of HRank and AutoBot.
    """

    stage_names = ("dense1", "dense2", "dense3")

    def __init__(self, layers: int = 12, growth: int = 12, **common: Any) -> None:
        super().__init__({"architecture": "densenet", "layers": layers, "growth": growth}, **common)
        width = [2 * growth + growth * i for i in range(3 * layers + 1)]
        self.conv1 = nn.Conv2d(len(self.mean), width[0], 3, padding=1, bias=False)
        self.dense1 = nn.Sequential(*(DenseLayer(width[i], growth) for i in range(layers)))
        self.trans1 = Transition(width[layers])
        self.dense2 = nn.Sequential(*(DenseLayer(width[i], growth) for i in range(layers, 2 * layers)))
        self.trans2 = Transition(width[2 * layers])
        self.dense3 = nn.Sequential(*(DenseLayer(width[i], growth) for i in range(2 * layers, 3 * layers)))
        self.bn = nn.BatchNorm2d(width[-1])
        self.relu = nn.ReLU()
        size = self.config["image_size"]
        self.avgpool = nn.AvgPool2d(size // 4)
        self.pooling = {("trans1.conv1", "out"): (size // 2) ** 2, ("trans2.conv1", "out"): (size // 4) ** 2}
        self.pooling |= {("fc", "in"): 1}
        self.fc = nn.Linear(width[-1], self.config["classes"])
        draw_weights(self)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BCHW = self.trans1(self.dense1(self.conv1(self.normalize(image_BCHW))))
        x_BCHW = self.dense3(self.trans2(self.dense2(x_BCHW)))
        return self.fc(self.avgpool(self.relu(self.bn(x_BCHW))).flatten(1))


class Inception(nn.Module):
    """Four parallel branches: 1x1; 1x1 and 3x3; 1x1 and two 3x3; pooling and 1x1.

    `widths` are the output channels of the four branches, then those of the first convolution of the second and of the
    third branch.
    """

    def __init__(self, channels_in: int, widths: Sequence[int]) -> None:
        super().__init__()
        one, three, five, pooled, into_three, into_five = widths
        self.branch1x1 = nn.Sequential(*make_convolutions(channels_in, (one, 1)))
        self.branch3x3 = nn.Sequential(*make_convolutions(channels_in, (into_three, 1), (three, 3)))
        self.branch5x5 = nn.Sequential(*make_convolutions(channels_in, (into_five, 1), (five, 3), (five, 3)))
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), *make_convolutions(channels_in, (pooled, 1)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        branches = (self.branch1x1, self.branch3x3, self.branch5x5, self.branch_pool)
        return torch.cat([branch(x_BCHW) for branch in branches], 1)


class GoogLeNet(ImageNetwork):
    """GoogLeNet (Szegedy et al. 2014, arXiv 1409.4842) for CIFAR, with the layers and names of HRank and AutoBot.

    One convolution and nine Inception blocks: 64 convolutions with BatchNorm.
    """

    stage_names = ("inception_b3", "inception_e4", "inception_b5")
    WIDTHS = {
        "a3": (64, 128, 32, 32, 96, 16),
        "b3": (128, 192, 96, 64, 128, 32),
        "a4": (192, 208, 48, 64, 96, 16),
        "b4": (160, 224, 64, 64, 112, 24),
        "c4": (128, 256, 64, 64, 128, 24),
        "d4": (112, 288, 64, 64, 144, 32),
        "e4": (256, 320, 128, 128, 160, 32),
        "a5": (256, 320, 128, 128, 160, 32),
        "b5": (384, 384, 128, 128, 192, 48),
    }

    def __init__(self, **common: Any) -> None:
        super().__init__({"architecture": "googlenet"}, **common)
        self.pre_layers = nn.Sequential(*make_convolutions(len(self.mean), (192, 3)))
        before = 192
        for name, widths in self.WIDTHS.items():
            self.add_module(f"inception_{name}", Inception(before, widths))
            before = sum(widths[:4])
            if name in ("b3", "e4"):
                self.add_module(f"maxpool_{name}", nn.MaxPool2d(3, 2, 1))
        self.avgpool = nn.AvgPool2d(self.config["image_size"] // 4, 1)
        self.pooling = {("linear", "in"): 1}
        self.linear = nn.Linear(before, self.config["classes"])
        draw_weights(self)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BCHW = self.normalize(image_BCHW)
        for module in list(self.children())[:-1]:  # they are in the order of the forward pass
            x_BCHW = module(x_BCHW)
        return self.linear(x_BCHW.flatten(1))


class Torchvision(ImageNetwork):
    """A ResNet of torchvision, its `network`; `name` is one of NAMES."""

    stage_names = ("network.layer1", "network.layer2", "network.layer3", "network.layer4")
    NAMES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

    def __init__(
        self,
        name: str,
        classes: int = 1000,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        image_size: int = 224,
    ) -> None:
        super().__init__({"architecture": "torchvision", "name": name}, classes, mean, std, image_size)
        if name not in self.NAMES:
            raise ValueError(f"name={name!r} is unknown; choose one of: {', '.join(self.NAMES)}")
        from torchvision.models import get_model  # noqa: PLC0415  needed by this architecture alone

        self.network = get_model(name, weights=None, num_classes=classes)
        self.pooling = {("network.fc", "in"): (-(-image_size // 32)) ** 2 + 1}

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return self.network(self.normalize(image_BCHW))


ARCHITECTURES: dict[str, type[ImageNetwork]] = {
    "cifar_resnet": CifarResNet,
    "vgg16_bn": Vgg16,
    "densenet": DenseNet,
    "googlenet": GoogLeNet,
    "torchvision": Torchvision,
}


def build(config: Mapping[str, Any]) -> ImageNetwork:
    """Return a new network; raises ValueError for an unknown architecture, or arguments that it does not take."""
    arguments = dict(config)
    name = arguments.pop("architecture", None)
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture={name!r} is unknown; choose one of: {', '.join(ARCHITECTURES)}")
    try:
        return ARCHITECTURES[name](**arguments)
    except TypeError as error:
        raise ValueError(f"architecture={name!r} cannot be made of {arguments}: {error}") from error


LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)


def fit_widths(network: ImageNetwork, state: Mapping[str, Tensor]) -> ImageNetwork:
    """Give each layer the widths of its tensors in `state`, and then these tensors, in the network's precision.

    Raises ValueError, naming the tensor, for a tensor that is missing, unknown, of another kernel size or not finite,
    and for widths that do not fit one another.
    """
    for name, module in network.named_modules():
        if isinstance(module, BasicBlock):
            module.kept = state.get(f"{name}.kept")
        elif isinstance(module, LAYERS):
            resize(module, name, state)
    wanted = network.state_dict()
    for what, keys in (("lack", wanted.keys() - state.keys()), ("have an unknown", state.keys() - wanted.keys())):
        if keys:
            raise ValueError(f"the weights {what} {min(keys)} ({len(keys)} in all): {network.config}")
    for key, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"the weights are not finite: {key}")
    network.load_state_dict({key: state[key].to(old.dtype, copy=True) for key, old in wanted.items()}, assign=True)
    check_widths(network)
    return network


def resize(module: Any, name: str, state: Mapping[str, Tensor]) -> None:
    """Give a layer the widths of its tensors in `state`; raises ValueError where no width makes them."""
    for key, old in {**module._parameters, **module._buffers}.items():
        new = state.get(f"{name}.{key}")
        if old is None or new is None:
            continue
        if new.dim() != old.dim() or new.shape[2:] != old.shape[2:]:
            raise ValueError(f"{name}.{key} is {tuple(new.shape)}, which is no other width of {tuple(old.shape)}")
        sized = old.new_empty(new.shape)
        setattr(module, key, nn.Parameter(sized, old.requires_grad) if key in module._parameters else sized)
    weight = module.weight
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = weight.shape[:2]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    else:
        module.num_features = len(weight)


def check_widths(network: ImageNetwork) -> None:
    """Raise ValueError where widths of layers do not fit one another, or a BasicBlock keeps impossible channels."""
    for name, module in network.named_modules():
        if isinstance(module, BasicBlock) and module.kept is not None:
            kept = module.kept.tolist()
            if sorted(set(kept)) != sorted(kept) or not all(0 <= c < module.channels for c in kept):
                raise ValueError(f"{name}.kept={kept}: these have to be different channels of {module.channels}")
        if isinstance(module, LAYERS):
            tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            if len({len(tensor) for tensor in tensors if tensor.dim()}) > 1:
                raise ValueError(f"the tensors of {name} have different widths")
    size = network.config["image_size"]
    meta = {key: tensor.to("meta") for key, tensor in network.state_dict().items()}
    try:
        image = torch.empty(2, len(network.mean), size, size, device="meta")
        classes = torch.func.functional_call(network, meta, image).shape[1]
    except RuntimeError as error:
        raise ValueError(f"the widths of the weights do not fit one another: {error}") from error
    if classes != network.config["classes"]:
        raise ValueError(f"classes={network.config['classes']}, and the weights have {classes}")


def save(network: ImageNetwork, folder: str | Path) -> None:
    """Write config.json and model.safetensors."""
    (Path(folder) / "config.json").write_text(json.dumps(network.config, indent=2) + "\n")
    state = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
    save_file(state, Path(folder) / "model.safetensors")


def load(folder: str | Path) -> ImageNetwork:
    """Return the network in a folder, float32 and in eval mode, with the widths of its weights.

    Raises ValueError as `build` and `fit_widths` do.
    """
    config = json.loads((Path(folder) / "config.json").read_text())
    with torch.device("meta"):
        network = build(config)
    return fit_widths(network, load_file(Path(folder) / "model.safetensors")).eval()
