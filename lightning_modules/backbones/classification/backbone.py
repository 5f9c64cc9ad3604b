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
from lightning_modules.backbones.repair.sites import Site, find_width_sites, sort_sites
from lightning_modules.backbones.width.blocks import Cuts, delete_indices, multiplies
from lightning_modules.backbones.width.graph import Channels, check_block, get_block_length


class ConvolutionChannels(Channels):
    """The output channels of convolutions, in groups of coupled channels; the outputs of linear layers stay.

    torch-pruning's graph cannot slice the streams of CIFAR ResNets with option A shortcuts: they stay whole, as in
    AutoBot. There the outputs of each block's `conv2` are a group of their own, gated behind `bn2`: a removed channel
    is no longer added to the stream (see BasicBlock).
    """

    network: Any  # an ImageNetwork

    def __init__(self, network: Any, forward: Callable[[nn.Module], Any], block: int) -> None:
        check_block(block)
        self.basic_blocks = {name: part for name, part in network.named_modules() if isinstance(part, BasicBlock)}
        ignored: list[nn.Module] = [part for part in network.modules() if isinstance(part, nn.Linear)]
        ignored += [network.conv1] if self.basic_blocks else []
        ignored += [part.conv2 for part in self.basic_blocks.values()]
        further = {f"{name}.conv2": divide_outputs(name, part, block) for name, part in self.basic_blocks.items()}
        outlets = [f"{name}.bn2" for name in self.basic_blocks]
        super().__init__(network, forward, block, ignored, further, outlets)

    def layer_cost(self, layer: str, into: Any, out: Any, budget: str) -> Any:
        """Return the cost of a layer as Blocks does, and for `flops` that of one image as AutoBot's tables count it.

        AutoBot counts as thop does: multiply-accumulates, one addition per output of a convolution with a bias, two
        operations per element that a norm normalises, and the operations in the network's `pooling`. Nothing else
        counts.
        """
        if budget != "flops":
            return super().layer_cost(layer, into, out, budget)
        module = self.network.get_submodule(layer)
        per_output = 0 if multiplies(module) else 2
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            per_output = 1
        pooled = sum(self.network.pooling.get((layer, side), 0) * n for side, n in (("in", into), ("out", out)))
        return super().layer_cost(layer, into, out, "macs") + per_output * self.uses[layer] * out + pooled

    def sliced(self, names: Iterable[str]) -> ImageNetwork:
        """Return a new network without these blocks, in eval mode; raises ValueError as `merge_cuts` does."""
        removed, state = self.remaining(names)
        for name, part in self.basic_blocks.items():
            removed_outputs = removed.get((f"{name}.conv2", "out"))
            if removed_outputs is not None:
                kept = torch.arange(part.channels) if part.kept is None else part.kept
                kept = delete_indices(kept, 0, removed_outputs)
                state[f"{name}.kept"] = kept.to(state[f"{name}.conv2.weight"].device)
        with torch.device("meta"):
            student = image_networks.build(self.network.config)
        return image_networks.fit_widths(student, state).eval()


def divide_outputs(name: str, part: BasicBlock, block: int) -> list[Cuts]:
    """Return the Cuts of the blocks of outputs of a ResNet block's last convolution; none for a single output."""
    count = part.conv2.out_channels
    if count < 2:
        return []
    return [
        {(f"{name}.conv2", "out"): indices, (f"{name}.bn2", "out"): indices}
        for indices in torch.arange(count).split(get_block_length(count, block))
    ]


class ClassifierBackbone(NetworkBackbone):
    """A network that classifies images. Its units are blocks of output channels of convolutions.

    Options: `block`, the most channels per unit (1 by default, as in AutoBot); `smoothing`, the label smoothing of the
    loss (0 by default; AutoBot takes 0.1 for ImageNet).
    """

    library = "torch"
    classifies = True
    pipeline_tag = "image-classification"
    slices = "channels"

    def image_shape(self) -> tuple[int, int, int]:
        """Return (channels, height, width) of the images that the network takes."""
        size = self.network.config["image_size"]
        return len(self.network.mean), size, size

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.network.config["classes"]

    @property
    def width_changes_stages(self) -> bool:  # type: ignore[override]
        """Whether the outputs of stages lose channels: not in ResNets with option A shortcuts, whose streams stay."""
        return not self.channels.basic_blocks

    def twin(self, network: nn.Module) -> Self:
        return type(self)(network, **self.options)

    # Units and their removal

    def units(self, level: str = "channel") -> list[Unit]:
        """Return the blocks of output channels; raises ValueError for a level other than channel."""
        if parse_level(level) != Level.CHANNEL:
            raise ValueError(
                f"criterion.level={level!r}: only channels can be removed from an image classifier; choose "
                "criterion.level=channel and one of criterion=bottleneck, magnitude, taylor, bn_scale, random"
            )
        return self.channels.units()

    @functools.cached_property
    def channels(self) -> ConvolutionChannels:
        """The groups of coupled channels."""
        images = self.example_inputs(2, next(self.network.parameters()).device)["sample"]
        return ConvolutionChannels(self.network, lambda network: network(images), self.options.get("block", 1))

    def totals(self) -> dict[str, int]:
        return super().totals() | {"flops": self.channels.total_cost("flops")}

    def freed_weights(self, unit: Unit, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return self.channels.weights(unit.name, tensors)

    def survivors(self) -> list[str]:
        """Return no names: there are no units of depth."""
        return []

    def pruned(self, changes: Sequence[Change]) -> Self:
        return self.student(self.channels.sliced(change["unit"] for change in changes))

    def adopt(self, network: nn.Module, changes: Sequence[Change] = ()) -> Self:
        return self.student(network)

    def repair_sites(self, student: Self, changes: Sequence[Change]) -> list[Site]:
        sites = find_width_sites(self.channels, [change["unit"] for change in changes])
        return sort_sites(sites, student.forward_order())

    def stages(self) -> dict[str, nn.Module]:
        return self.network.stage_modules()

    # What the network takes and gives

    def check_data(self, data: Any) -> None:
        """Raise ValueError for images of another shape, without labels, or with labels that the network lacks."""
        if not hasattr(data, "image_shape"):
            raise ValueError(f"{type(data).__name__} has no images, which an image classifier needs")
        if data.image_shape() != self.image_shape():
            raise ValueError(
                f"its images are {data.image_shape()}, the teacher takes {self.image_shape()} (channels, height, width)"
            )
        data.match_classes(self.class_names, self.classes)
        count = len(data.source("train"))
        labels = data.take("train", np.linspace(0, count - 1, min(256, count)).astype(int)).get("label")
        if labels is None or len(set(labels)) == 1 < len(labels):
            raise ValueError(
                "its images have no labels, or all the same one, and the teacher is an image classifier; choose data "
                "with labels, such as data=cifar10, or a folder of images per class"
            )
        if labels.max() >= self.classes:
            raise ValueError(f"it has the label {labels.max()}, and the teacher has {self.classes} classes, from 0 on")

    def training_inputs(self, batch: Batch) -> Batch:
        """Return {"sample": (N,channels,height,width) in [-1,1], "target": labels (N,)}."""
        return {"sample": batch["image"], "target": batch["label"]}

    def calibration_inputs(self, batch: Batch, seed: int, purpose: str = "calibration") -> Batch:
        return self.training_inputs(batch)

    def example_inputs(self, batch: int, device: torch.device | str) -> Batch:
        return {
            "sample": torch.zeros(batch, *self.image_shape(), device=device),
            "target": torch.zeros(batch, dtype=torch.long, device=device),
        }

    def predict(self, inputs: Batch) -> Tensor:
        """Return the logits (N,C)."""
        return self.network(inputs["sample"])

    def losses(self, output: Tensor, inputs: Batch) -> Tensor:
        """Return the cross-entropy of each image, (N,)."""
        smoothing = self.options.get("smoothing", 0.0)
        return F.cross_entropy(output.float(), inputs["target"], reduction="none", label_smoothing=smoothing)

    def distance(self, output: Tensor, reference: Tensor, inputs: Batch) -> Tensor:
        """Return the mean over images of KL(teacher || student), the divergence of the class probabilities."""
        log_s, log_t = (logits.float().log_softmax(-1) for logits in (output, reference))
        return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)

    # Costs, files

    def meta_network(self) -> nn.Module:
        return copy.deepcopy(self.network).to("meta")

    def save(self, folder: Any) -> None:
        image_networks.save(self.network, folder)

    # Exports

    def save_export(self, folder: Path, sampler: Any = None) -> None:
        """Write config.json, weights, and the file of the network's class, which needs torch and safetensors."""
        self.save(folder)
        shutil.copyfile(image_networks.__file__, folder / "image_networks.py")

    def random_arguments(self, samples: int = 2) -> dict[str, Any]:
        shape = self.example_inputs(samples, "cpu")["sample"].shape
        return {"image": torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1}

    def forward(self, **arguments: Any) -> Tensor:
        return self.predict({"sample": arguments["image"]})

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
