"""Image classifiers as backbones: convolutional networks whose channels are the units (AutoBot, arXiv 2111.09635).

Shapes: N images, C classes.
"""

import copy
import functools
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from criteria.base import Batch, Level, Unit, parse_level
from lightning_modules.backbones.base import Change, NetworkBackbone
from lightning_modules.backbones.classification import image_networks
from lightning_modules.backbones.classification.image_networks import BasicBlock, ImageNetwork
from lightning_modules.backbones.width.blocks import Cuts, multiplies, without
from lightning_modules.backbones.width.graph import Channels, block_length, check_block


class ConvolutionChannels(Channels):
    """The output channels of convolutions, in groups of those that can only go together, by torch-pruning's graph.

    One exception: the streams of CIFAR ResNets with option A shortcuts, which that graph cannot slice, stay whole, as
    in the paper; the outputs of each block's `conv2` are a group of their own, which lose their place in what is added
    to the stream (see BasicBlock), and whose gates are behind `bn2`. The outputs of linear layers stay, too.
    """

    network: Any  # an ImageNetwork

    def __init__(self, network: Any, forward: Callable[[nn.Module], Any], block: int) -> None:
        check_block(block)
        self.adders = {name: part for name, part in network.named_modules() if isinstance(part, BasicBlock)}
        ignored: list[nn.Module] = [part for part in network.modules() if isinstance(part, nn.Linear)]
        ignored += [network.conv1] if self.adders else []
        ignored += [part.conv2 for part in self.adders.values()]
        further = {f"{name}.conv2": added(name, part, block) for name, part in self.adders.items()}
        outlets = [f"{name}.bn2" for name in self.adders]
        super().__init__(network, forward, block, ignored, further, outlets)

    def layer_cost(self, layer: str, into: Any, out: Any, budget: str) -> Any:
        """As Blocks has it; FLOPs (`flops`) are those of an image, as AutoBot's tables have them, counted by thop.

        That is the multiply-accumulates, one addition for each output of a convolution with a bias, two operations for
        each element that a norm normalises, and what the network says of `pooling`. Nothing else counts.
        """
        if budget != "flops":
            return super().layer_cost(layer, into, out, budget)
        module = self.network.get_submodule(layer)
        each = 0 if multiplies(module) else 2
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            each = 1
        pooled = sum(self.network.pooling.get((layer, side), 0) * n for side, n in (("in", into), ("out", out)))
        return super().layer_cost(layer, into, out, "macs") + each * self.uses[layer] * out + pooled

    def sliced(self, names: Iterable[str]) -> ImageNetwork:
        """A network of its own without these blocks, in eval mode; raises what `together` raises."""
        removed, state = self.remaining(names)
        for name, part in self.adders.items():
            gone = removed.get((f"{name}.conv2", "out"))
            if gone is not None:
                kept = torch.arange(part.channels) if part.kept is None else part.kept
                state[f"{name}.kept"] = without(kept, 0, gone).to(state[f"{name}.conv2.weight"].device)
        with torch.device("meta"):
            student = image_networks.build(self.network.config)
        return image_networks.fit(student, state).eval()


def added(name: str, part: BasicBlock, block: int) -> list[Cuts]:
    """The blocks of the outputs of a ResNet block's last convolution."""
    count = part.conv2.out_channels
    if count < 2:
        return []
    return [
        {(f"{name}.conv2", "out"): indices, (f"{name}.bn2", "out"): indices}
        for indices in torch.arange(count).split(block_length(count, block))
    ]


class ClassifierBackbone(NetworkBackbone):
    """A network that classifies images. Option: `block`, the most channels of a unit (1, as in AutoBot).

    `smoothing` softens the targets of the loss (label smoothing; 0.1 for ImageNet in AutoBot).
    """

    library = "torch"
    classifies = True
    pipeline_tag = "image-classification"
    slices = "channels"

    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images it takes."""
        size = self.network.config["image_size"]
        return len(self.network.mean), size, size

    @property
    def classes(self) -> int:
        return self.network.config["classes"]

    @property
    def width_changes_stages(self) -> bool:  # type: ignore[override]
        """The streams of ResNets with option A shortcuts keep their width."""
        return not self.channels.adders

    def twin(self, network: nn.Module) -> Self:
        return type(self)(network, **self.options)

    # Units and their removal

    def units(self, level: str = "channel") -> list[Unit]:
        """Output channels of convolutions; raises ValueError for the other levels."""
        if parse_level(level) != Level.CHANNEL:
            raise ValueError(
                f"criterion.level={level!r}: of an image classifier channels go; choose criterion.level=channel and "
                "one of criterion=bottleneck, magnitude, taylor, bn_scale, random"
            )
        return self.channels.units()

    @functools.cached_property
    def channels(self) -> ConvolutionChannels:
        """The groups of coupled channels."""
        images = self.example_inputs(2, next(self.network.parameters()).device)["sample"]
        return ConvolutionChannels(self.network, lambda network: network(images), self.options.get("block", 1))

    def totals(self) -> dict[str, int]:
        return super().totals() | {"flops": self.channels.whole("flops")}

    def freed_weights(self, unit: Unit, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return self.channels.weights(unit.name, tensors)

    def survivors(self) -> list[str]:
        """None: there are no units of depth."""
        return []

    def pruned(self, changes: Sequence[Change]) -> Self:
        return self.student(self.channels.sliced(change["unit"] for change in changes))

    def adopt(self, network: nn.Module, changes: Sequence[Change] = ()) -> Self:
        return self.student(network)

    def stages(self) -> dict[str, nn.Module]:
        return self.network.stage_modules()

    # What the network takes and gives

    def check_data(self, data: Any) -> None:
        """Samples that are no images of this size, and images without labels, or with labels of other classes."""
        if not hasattr(data, "image_shape"):
            raise ValueError(f"{type(data).__name__} gives no images, and the teacher is an image classifier")
        if data.image_shape() != self.image_shape():
            raise ValueError(
                f"its images are {data.image_shape()}, the teacher takes {self.image_shape()} (channels, height, width)"
            )
        data.match_classes(self.class_names, self.classes)
        count = len(data.source("train"))
        labels = data.take("train", np.linspace(0, count - 1, min(256, count)).astype(int)).get("label")
        if labels is None or len(set(labels)) == 1 < len(labels):
            raise ValueError(
                "its images have no labels (or all the same one), and the teacher is an image classifier; choose data "
                "with labels, such as data=cifar10, or pictures in a folder a class"
            )
        if labels.max() >= self.classes:
            raise ValueError(f"it has the label {labels.max()}, and the teacher knows {self.classes} classes")

    def training_inputs(self, batch: Batch) -> Batch:
        """{"sample": (N,channels,height,width) in [-1,1], "target": (N,)}."""
        return {"sample": batch["image"], "target": batch["label"]}

    def calibration_inputs(self, batch: Batch, seed: int, purpose: str = "calibration") -> Batch:
        return self.training_inputs(batch)

    def example_inputs(self, batch: int, device: torch.device | str) -> Batch:
        return {
            "sample": torch.zeros(batch, *self.image_shape(), device=device),
            "target": torch.zeros(batch, dtype=torch.long, device=device),
        }

    def predict(self, inputs: Batch) -> Tensor:
        """Logits (N,C)."""
        return self.network(inputs["sample"])

    def losses(self, output: Tensor, inputs: Batch) -> Tensor:
        """Cross-entropy of each image, (N,)."""
        smoothing = self.options.get("smoothing", 0.0)
        return F.cross_entropy(output.float(), inputs["target"], reduction="none", label_smoothing=smoothing)

    def distance(self, output: Tensor, reference: Tensor, inputs: Batch) -> Tensor:
        """Kullback-Leibler divergence of the classes' distributions from the teacher's, the mean over images."""
        log_s, log_t = (logits.float().log_softmax(-1) for logits in (output, reference))
        return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)

    # Costs, files

    def meta_network(self) -> nn.Module:
        return copy.deepcopy(self.network).to("meta")

    def save(self, folder: Any) -> None:
        image_networks.save(self.network, folder)

    # Exports

    def save_export(self, folder: Path) -> None:
        """Write config.json and weights, and beside them the file of the class, which needs torch and safetensors."""
        self.save(folder)
        shutil.copyfile(image_networks.__file__, folder / "image_networks.py")

    def random_arguments(self) -> dict[str, Any]:
        shape = self.example_inputs(2, "cpu")["sample"].shape
        return {"image": torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1}

    def expected_outputs(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        with torch.inference_mode():
            return {"output": self.network.eval()(arguments["image"])}

    def card_usage(self) -> str:
        channels, height, width = self.image_shape()
        return f"""    import sys
    import numpy, torch
    from PIL import Image
    sys.path.insert(0, folder)
    from image_networks import load  # the file beside the weights
    network = load(folder).eval()
    picture = Image.open("picture.png").convert("{"RGB" if channels == 3 else "L"}").resize(({width}, {height}))
    image = torch.from_numpy(numpy.atleast_3d(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        print(network(image).softmax(1))

`image_networks.py` needs torch and safetensors (and torchvision for the networks that are torchvision's).
"""
