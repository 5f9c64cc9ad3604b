"""Image classifiers: the published sizes, narrower networks that their weights alone describe, files of others."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra.errors import InstantiationException
from safetensors.torch import load_file, save_file
from support.config import composed
from support.process import ROOT
from support.results import the_run
from torch import Tensor, nn

from conf import schema
from datamodules.readers.arrays import Npz
from datamodules.readers.base import MissingData
from experiments.engine.pipeline import run_pipeline
from lightning_modules.backbones.classification.backbone import ClassifierBackbone
from lightning_modules.backbones.classification.image_networks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    BasicBlock,
    ImageNetwork,
    build,
    fit_widths,
    load,
    save,
)
from lightning_modules.backbones.classification.load import ARGUMENTS, load_classifier, load_resnet, make_network_config
from lightning_modules.backbones.diffusion.load import load_teacher
from lightning_modules.backbones.files import list_weight_files
from lightning_modules.backbones.loading import load_network

# What networks cost, as AutoBot's logs have it

LOGGED = {
    "vgg16_bn": (14_991_946, 314_294_272),
    "resnet56": (853_018, 126_554_816),
    "resnet110": (1_727_962, 254_988_992),
    "densenet40": (1_059_298, 287_773_080),
    "googlenet": (6_166_250, 1_529_421_824),
    "resnet50": (25_557_032, 4_111_514_624),
}
"""{name: (parameters, FLOPs)} before pruning"""
BOTTLENECKS: list[Any] = [
    (194, (40, 31), (7, 17), (10, 13)),
    (459, (59, 101), (41, 71), (63, 79), (66, 97)),
    (872, (193, 232), (140, 151), (138, 190), (139, 147), (135, 127), (135, 136)),
    (1780, (436, 464), (437, 438), (447, 415)),
]
"""of the pruned ResNet-50, by stage: the outputs of all blocks; those of conv1 and conv2 of each"""
PRUNED: dict[str, tuple[list[int], int, int]] = {
    "vgg16_bn": ([29, 56, 91, 114, 199, 165, 193, 276, 205, 267, 406, 468, 510], 7_532_703, 145_614_744),
    "resnet56": (
        [
            *(16, 8, 13, 8, 13, 7, 14, 4, 13, 5, 12, 5, 14, 9, 10, 9, 10, 3, 11),
            *(31, 29, 9, 16, 14, 28, 12, 25, 12, 25, 10, 25, 12, 20, 12, 25, 13, 21),
            *(59, 59, 41, 59, 40, 56, 44, 53, 46, 56, 40, 52, 36, 54, 39, 40, 39, 31),
        ],
        460_656,
        55_826_176,
    ),
    "densenet40": (
        [
            *(20, 11, 6, 12, 9, 9, 11, 10, 9, 8, 3, 8, 4, 103),
            *(12, 12, 11, 11, 10, 12, 10, 11, 10, 12, 8, 10, 260),
            *([12] * 10 + [11, 12]),
        ],
        758_237,
        167_638_097,
    ),
    "googlenet": (
        [
            *(110, 51, 30, 75, 10, 19, 27, 6, 111, 32, 140, 20, 37, 81, 49, 159, 57, 136, 11, 37, 44, 58),
            *(154, 56, 116, 21, 44, 51, 60, 117, 53, 118, 20, 44, 50, 58, 106, 67, 109, 21, 41, 51, 63),
            *(236, 46, 233, 22, 37, 80, 122, 29, 67, 93, 29, 72, 66, 121, 151, 48, 94, 32, 47, 54, 120),
        ],
        1_662_478,
        449_458_625,
    ),
    "resnet50": (
        [
            54,
            *(
                width
                for out, *blocks in BOTTLENECKS
                for i, (one, two) in enumerate(blocks)
                for width in (one, two, out, *([out] if i == 0 else []))
            ),
        ],
        16_734_498,
        1_974_220_381,
    ),
}
"""{name: (outputs of its convolutions in their order, parameters, FLOPs)}"""


def on_meta(name: str, **arguments: Any) -> ImageNetwork:
    with torch.device("meta"):
        return build(make_network_config(name, **arguments))


def image_of(network: ImageNetwork, images: int = 2) -> Tensor:
    size = network.config["image_size"]
    return torch.empty(images, len(network.mean), size, size, device="meta")


def cost(network: ImageNetwork) -> tuple[int, int]:
    """(parameters, FLOPs of one image) as thop counts them where AutoBot reports them.

    Multiply-accumulates of convolutions and linear layers, one more for each output of a convolution with bias; 2 for
    each element that a norm takes; 1 for each output of AvgPool2d, and of AdaptiveAvgPool2d as many as elements it
    takes and one more. Nothing for activations, MaxPool2d, sums, biases of linear layers, and what is no module.
    """
    network = network.to("meta").eval()
    counts = []

    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            counts.append(output.numel() * (module.weight[0].numel() + (module.bias is not None)))
        elif isinstance(module, nn.Linear):
            counts.append(module.weight.numel())
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            counts.append(2 * output.numel())
        elif isinstance(module, nn.AvgPool2d):
            counts.append(output.numel())
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            counts.append(inputs[0].numel() + output.numel())

    handles = [module.register_forward_hook(hook) for module in network.modules()]
    network(image_of(network, images=1))
    for handle in handles:
        handle.remove()
    return sum(parameter.numel() for parameter in network.parameters()), sum(counts)


def totals(network: ImageNetwork) -> tuple[int, int]:
    """(parameters, FLOPs) as a backbone counts them, from the widths of its layers."""
    found = ClassifierBackbone(network.to("meta").eval()).totals()
    return found["params"], found["flops"]


@pytest.mark.parametrize("name", LOGGED)
def test_parameters_and_flops_are_the_published_ones(name):
    assert totals(on_meta(name)) == cost(on_meta(name)) == LOGGED[name]


def narrowed(name: str, widths: list[int], **arguments: Any) -> dict[str, Tensor]:
    """The state, of zeros, of a network whose convolutions have these outputs; inputs follow from a forward pass."""
    network = on_meta(name, **arguments)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    outs = dict(zip(convolutions, widths, strict=True))

    def shrink(module: Any, inputs: tuple[Tensor]) -> None:
        width = inputs[0].shape[1]
        if isinstance(module, nn.BatchNorm2d):
            for key in ("weight", "bias", "running_mean", "running_var"):
                getattr(module, key).data = torch.empty(width, device="meta")
            return
        weight = module.weight
        out = outs.get(module, len(weight))
        weight.data = torch.empty(out, width, *weight.shape[2:], device="meta")
        if module.bias is not None:
            module.bias.data = torch.empty(out, device="meta")

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            module.register_forward_pre_hook(shrink)
        if isinstance(module, BasicBlock) and outs[module.conv2] < module.channels:
            module.kept = torch.arange(outs[module.conv2], device="meta")
    network.eval()(image_of(network))
    return {
        key: torch.arange(len(tensor)) if key.endswith(".kept") else torch.zeros(tensor.shape, dtype=tensor.dtype)
        for key, tensor in network.state_dict().items()
    }


@pytest.mark.parametrize("name", PRUNED)
def test_autobots_pruned_networks_cost_what_autobot_logged(name):
    widths, *logged = PRUNED[name]
    network = fit_widths(on_meta(name), narrowed(name, widths))
    assert [module.out_channels for module in network.modules() if isinstance(module, nn.Conv2d)] == widths
    assert list(cost(network)) == list(totals(network)) == logged


def test_autobots_resnet50_target_counts_shortcuts_with_one_input():
    """Its log stops 522,112 FLOPs from a target of 1,750 M, and the network that it built has 1,974 M.

    The gates that its soft count has in front of the 1x1 convolutions of the shortcuts of stages 2 to 4 are behind no
    activation: nothing but the cost pulls at them, and all but one of each close. What is built takes the whole stream.
    Here gates are those of the channels that can go, and the soft count of 0 and 1 is that of the network.
    """
    network = fit_widths(on_meta("resnet50"), narrowed("resnet50", PRUNED["resnet50"][0])).to("meta")
    channels = ClassifierBackbone(network).channels
    counted = PRUNED["resnet50"][2]
    for stage in (2, 3, 4):
        name = f"network.layer{stage}.0.downsample.0"
        shortcut = network.get_submodule(name)
        costs = [channels.layer_cost(name, n, shortcut.out_channels, "flops") for n in (shortcut.in_channels, 1)]
        counted -= costs[0] - costs[1]
    assert counted == 1_750_521_857


# Narrow networks

SMALL = {"resnet8": 8, "vgg16_bn": 16, "densenet40": 8, "googlenet": 8, "resnet18": 32}
"""{name: size of the images}"""


def random_state(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The same shapes with drawn values, variances positive; a block of ResNet-8 keeps some channels in the middle."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for key, tensor in state.items():
        drawn[key] = tensor + 3 if key.endswith(".kept") else tensor
        if tensor.is_floating_point():
            drawn[key] = torch.randn(tensor.shape, generator=generator) * (0.3 if tensor.dim() > 1 else 1)
        if key.endswith("running_var"):
            drawn[key] = drawn[key].abs() + 0.5
    return drawn


def small(name: str) -> ImageNetwork:
    """A network of few and uneven channels, in eval mode; the stream of residuals has one width a stage."""
    network = on_meta(name, classes=5, image_size=SMALL[name])
    widths = []
    for i, (key, module) in enumerate(network.named_modules()):
        if isinstance(module, nn.Conv2d):
            stream = key.endswith(("downsample.0", "conv2")) or key == "network.conv1"
            widths.append(7 if stream and "network" in key else 3 + i % 4)
            if name == "resnet8" and (key == "conv1" or key.startswith("stages.1")):
                widths[-1] = module.out_channels
    state = random_state(narrowed(name, widths, classes=5, image_size=SMALL[name]))
    return fit_widths(network, state).eval()


@pytest.mark.parametrize("name", SMALL)
def test_a_narrow_network_is_saved_and_loaded_in_the_same_bits(tmp_path, name):
    network = small(name)
    save(network, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text()) == network.config
    found = load(tmp_path)
    image = torch.rand(3, 3, SMALL[name], SMALL[name]) * 2 - 1
    assert torch.equal(found(image), network(image)) and found(image).shape == (3, 5) and not found.training
    assert repr(found) == repr(network)  # with the numbers of channels that layers say they have
    assert found.state_dict().keys() == network.state_dict().keys()
    assert torch.equal(load_network(tmp_path)(image), network(image))
    assert list(network.stage_modules().items()) == [(key, network.get_submodule(key)) for key in network.stage_names]
    seen = []
    for key, module in network.stage_modules().items():
        module.register_forward_hook(lambda module, inputs, output, key=key: seen.append(key))
    network(image)
    assert seen == list(network.stage_names)


def test_a_block_without_some_channels_equals_one_with_zeroed_channels():
    dense = build(make_network_config("resnet8", image_size=8)).double().eval()
    fit_widths(dense, {key: tensor.double() for key, tensor in random_state(dense.state_dict()).items()})
    block = "stages.2.0"
    inner, kept = torch.tensor([1, 2, 40]), torch.tensor([0, 5, 17, 63])
    state = dict(dense.state_dict())
    for key in ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
        state[f"{block}.{key}"] = state[f"{block}.{key}"][inner]
    state[f"{block}.conv2.weight"] = state[f"{block}.conv2.weight"][kept][:, inner]
    for key in ("bn2.weight", "bn2.bias", "bn2.running_mean", "bn2.running_var"):
        state[f"{block}.{key}"] = state[f"{block}.{key}"][kept]
    state[f"{block}.kept"] = kept
    sliced = fit_widths(build(make_network_config("resnet8", image_size=8)).double(), state).eval()
    part: Any = dense.get_submodule(block)
    gone = torch.ones(64, dtype=torch.bool)
    with torch.no_grad():
        for norm, rest in ((part.bn1, inner), (part.bn2, kept)):
            norm.weight[gone.index_fill(0, rest, False)] = 0
            norm.bias[gone.index_fill(0, rest, False)] = 0
    image = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1
    torch.testing.assert_close(sliced(image), dense(image))
    state[f"{block}.conv2.weight"].fill_(0)
    assert sliced.get_submodule(block).conv2.weight.any()  # a network has tensors of its own


def test_half_precision_weights_are_widened_and_can_be_trained():
    network = build(make_network_config("resnet8", image_size=8))
    half = {key: t.half() if t.is_floating_point() else t for key, t in network.state_dict().items()}
    fit_widths(network, half)
    assert {t.dtype for t in network.state_dict().values()} == {torch.float32, torch.int64}
    F.cross_entropy(network.train()(torch.rand(4, 3, 8, 8)), torch.tensor([0, 1, 2, 3])).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


# The networks of the embedded weights


@pytest.mark.parametrize(
    ("folder", "blocks", "given"), [("resnet20", 3, {}), ("digits_classifier", 1, {"mean": [0.25], "std": [0.25]})]
)
def test_the_embedded_classifiers_equal_their_layers_bit_for_bit(folder, blocks, given):
    path = ROOT / "assets" / folder / "model.safetensors"
    network = load_resnet(path, blocks, **given)
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    weights = {key: t.float() if t.is_floating_point() else t for key, t in load_file(path).items()}
    image = torch.rand(4, len(network.mean), 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def convolved(x: Tensor, name: str, norm: str, stride: int = 1) -> Tensor:
        x = F.conv2d(x, weights[f"{name}.weight"], stride=stride, padding=1)
        values = [weights[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *values, eps=1e-5)

    mean, std = torch.tensor(network.mean)[:, None, None], torch.tensor(network.std)[:, None, None]
    x = F.relu(convolved((image / 2 + 0.5 - mean) / std, "conv1", "bn1"))
    for stage, block in itertools.product(range(3), range(blocks)):
        name, stride = f"stages.{stage}.{block}", 2 if stage and not block else 1
        h = F.relu(convolved(x, f"{name}.conv1", f"{name}.bn1", stride))
        h = convolved(h, f"{name}.conv2", f"{name}.bn2")
        if stride == 2:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))
        x = F.relu(h + x)
    assert torch.equal(network.features(image), x.mean((2, 3)))
    assert torch.equal(network(image), F.linear(x.mean((2, 3)), weights["linear.weight"], weights["linear.bias"]))


# What is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "alexnet"}, "architecture='alexnet' is unknown; choose one of: cifar_resnet, vgg16_bn, dens"),
        ({"architecture": "vgg16_bn", "depth": 3}, "architecture='vgg16_bn' cannot be made of .*'depth'"),
        ({"architecture": "cifar_resnet"}, "architecture='cifar_resnet' cannot be made of .*blocks"),
        ({"architecture": "torchvision", "name": "vgg11"}, "name='vgg11' is unknown; choose one of: resnet18, "),
        ({"architecture": "googlenet", "mean": [0.5]}, r"mean=\[0.5\] and std=\[0.247, .*\]: both need one value"),
    ],
)
def test_an_architecture_that_is_not_known_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        build(config)


KEY = "stages.1.0.conv1.weight"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({KEY: None}, f"the weights lack {re.escape(KEY)} \\(1 in all\\): .*'blocks': 1"),
        ({"fc.weight": torch.zeros(10, 64)}, r"the weights have an unknown fc\.weight \(1 in all\)"),
        (
            {KEY: torch.zeros(32, 16, 5, 5)},
            r"conv1\.weight is \(32, 16, 5, 5\), which is no other width of \(32, 16, 3",
        ),
        ({KEY: torch.zeros(32, 16)}, r"conv1\.weight is \(32, 16\), which is no other width"),
        ({KEY: torch.full((32, 16, 3, 3), torch.nan)}, f"the weights are not finite: {re.escape(KEY)}"),
        ({KEY: torch.zeros(32, 15, 3, 3)}, "the widths of the weights do not fit one another: "),
        ({KEY: torch.zeros(31, 16, 3, 3)}, "the widths of the weights do not fit one another: "),
        ({"bn1.bias": torch.zeros(15)}, "the tensors of bn1 have different widths"),
        ({"stages.1.0.kept": torch.arange(1, 33)}, r"stages\.1\.0\.kept=\[1, .*, 32\]: .* different channels of 32"),
        ({"stages.1.0.kept": torch.zeros(32, dtype=torch.long)}, "different channels of 32"),
        ({"stages.1.0.kept": torch.arange(31)}, "the widths of the weights do not fit one another: "),
        (
            {"linear.weight": torch.zeros(11, 64), "linear.bias": torch.zeros(11)},
            "classes=10, and the weights have 11",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_the_name_of_the_tensor(changed, message):
    state = {**build(make_network_config("resnet8")).state_dict(), **changed}
    with pytest.raises(ValueError, match=message):
        fit_widths(
            build(make_network_config("resnet8")), {key: tensor for key, tensor in state.items() if tensor is not None}
        )


# Files


def resnet8(**given: Any) -> ImageNetwork:
    network = build(make_network_config("resnet8", image_size=8, **given))
    return fit_widths(network, random_state(network.state_dict())).eval()


def same(backbone: Any, network: ImageNetwork) -> bool:
    image = torch.rand(2, 3, *[network.config["image_size"]] * 2) * 2 - 1
    found = backbone.network
    return torch.equal(found(image), network(image)) and found.config == network.config and not found.training


@pytest.mark.parametrize("last", ["linear", "fc"])
def test_a_checkpoint_of_cifar_resnets_as_published_is_read(tmp_path, last):
    """As of several GPUs, with stages called layers, without counts of batches."""
    network = resnet8(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    state = {key: t for key, t in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    state = {re.sub(r"^stages\.(\d)", lambda match: f"layer{int(match[1]) + 1}", key): t for key, t in state.items()}
    state = {f"module.{re.sub('^linear', last, key)}": tensor for key, tensor in state.items()}
    torch.save({"best_prec1": 93.6, "state_dict": state}, tmp_path / "resnet8.th")
    given = {"architecture": "resnet8", "image_size": 8, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    assert same(load_classifier(str(tmp_path / "resnet8.th"), **given), network)


@pytest.mark.parametrize("name", ["resnet18", "densenet40", "vgg16_bn"])
def test_published_names_are_read_at_any_width_and_in_half_precision(tmp_path, name):
    network = small(name)
    names = {"resnet18": (r"^network\.", ""), "densenet40": (r"^fc\.", "linear.")}.get(name, ("^$", ""))
    state = {re.sub(*names, key): tensor for key, tensor in network.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "num_classes": 5}))  # as timm writes it
    given = {"architecture": name, "classes": 5, "image_size": SMALL[name]}
    assert same(load_classifier(str(tmp_path), **given), network)
    torch.save({key: t.half() if t.is_floating_point() else t for key, t in state.items()}, tmp_path / "half.pt")
    found = load_classifier(str(tmp_path / "half.pt"), **given, block=3).network
    for key, tensor in network.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor.half().float() if tensor.is_floating_point() else tensor)


def test_a_folder_says_by_itself_what_it_holds(tmp_path):
    network = resnet8(mean=[0.5] * 3)
    save(network, tmp_path)
    assert same(load_classifier(str(tmp_path)), network)
    backbone = load_classifier(str(tmp_path), "resnet8", mean=[0.1] * 3, block=4, smoothing=0.1)
    assert same(backbone, network) and backbone.options == {"block": 4, "smoothing": 0.1}
    assert list_weight_files(str(tmp_path)) == [tmp_path / "config.json", tmp_path / "model.safetensors"]
    with pytest.raises(ValueError, match=r"teacher\.architecture='resnet20', and .* has .*'blocks': 1"):
        load_classifier(str(tmp_path), "resnet20")
    with pytest.raises(ValueError, match=r"teacher\.smoothing=1\.0 is out of range"):
        load_classifier(str(tmp_path), smoothing=1.0)
    with pytest.raises(ValueError, match=r"is a CifarResNet: choose the configuration of an image classifier, such as"):
        load_teacher(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(network.config | {"architecture": "alexnet"}))
    with pytest.raises(ValueError, match=f"the weights in {tmp_path} cannot be read: architecture='alexnet' is unknow"):
        load_classifier(str(tmp_path))
    save(network, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"\(model\.safetensors\) cannot be read"):
        load_classifier(str(tmp_path))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def test_files_that_cannot_be_used_are_refused(tmp_path, capsys):
    for name, content in (("evil.th", {"state_dict": Evil()}), ("other.pt", {"conv1.weight": torch.zeros(1)})):
        torch.save(content, tmp_path / name)
    (tmp_path / "short.safetensors").write_bytes(b"short")
    for name, message in (
        ("evil.th", r"evil\.th is pickled .* refused\. Convert it to safetensors"),
        ("short.safetensors", "cannot be read"),
        ("other.pt", r"other\.pt: conv1\.weight is \(1,\), which is no other width"),
    ):
        with pytest.raises(ValueError, match=message):
            load_classifier(str(tmp_path / name), "resnet8")
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"teacher\.architecture is needed .*: vgg16_bn, densenet40, googlenet, resn"):
        load_classifier(str(tmp_path / "other.pt"))
    with pytest.raises(ValueError, match="architecture='lenet' is unknown; choose one of: vgg16_bn, "):
        load_classifier(str(tmp_path / "other.pt"), "lenet")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "short.safetensors").unlink()
    torch.save({}, tmp_path / "another.pt")
    with pytest.raises(ValueError, match=r"several files of weights; name one of: .*another\.pt, .*other\.pt"):
        load_classifier(str(tmp_path), "resnet8")


TEACHERS = {
    "resnet20": "91.73",
    "resnet56": "93.39",
    "resnet110": "93.50",
    "vgg16_bn": "93.96",
    "densenet40": "94.81",
    "googlenet": "95.05",
    "resnet50": "76.13",
}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_missing_teacher_says_how_to_get_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    monkeypatch.setattr("lightning_modules.backbones.files.hub_files", lambda path: None)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cfg = composed(f"teacher={name}").teacher
    assert cfg.architecture == name
    parameters = sum(parameter.numel() for parameter in on_meta(name).parameters())
    header = (ROOT / f"conf/teacher/{name}.yaml").read_text().partition("name:")[0]
    assert f"{parameters:,} parameters, {TEACHERS[name]} %" in header
    ways = {"resnet20": "run curl -LO https", "resnet56": "run curl -LO https", "resnet50": "run `hf download timm/"}
    expected = ways.get(name, f"experiment=pretrain_cifar10_classifier pretrain.architecture={name} and set")
    with pytest.raises(MissingData, match=re.escape(expected)):
        list_weight_files(cfg.path, get=cfg.get("get"))
    with pytest.raises(InstantiationException, match=re.escape(expected)):
        schema.build(cfg)


@pytest.mark.data
@pytest.mark.parametrize(("name", "right"), [("resnet56", 926), ("resnet20", 915)])
def test_the_published_weights_know_the_test_images(name, right):
    cfg = composed(f"teacher={name}").teacher
    try:
        source, _ = Npz("cifar10.npz", "x_test", "y_test"), list_weight_files(cfg.path)
    except MissingData as error:
        pytest.skip(str(error))
    record = source.take(np.arange(1000))
    image, network = torch.from_numpy(record["image"]).permute(0, 3, 1, 2) / 127.5 - 1, schema.build(cfg).network
    with torch.inference_mode():
        found = torch.cat([network(part).argmax(1) for part in image.split(250)])
    assert int((found == torch.from_numpy(record["label"])).sum()) == right


# Training


def test_a_classifier_is_trained_and_its_folder_is_a_teacher(configure, tmp_path):
    job = ["experiment=pretrain_cifar10_classifier", "pretrain.architecture=resnet8", "++pretrain.image_size=8"]
    job += ["debug=tiny", "data=tiny", "data.batch_size=4", "data.crop=1", "trainer=cpu", "++pretrain.classes=3"]
    job += [f"paths.runs={tmp_path}/runs", "evaluation.loss_samples=16", "evaluation.batch_size=8"]
    run_pipeline(configure(*job))
    run = the_run(tmp_path / "runs")
    assert run.name.startswith("resnet8-seed0")
    assert {t.dtype for t in load_file(run / "weights" / "model.safetensors").values()} == {torch.float16, torch.int64}
    backbone = load_classifier(str(run / "weights"), "resnet8")
    assert backbone.network.config == make_network_config("resnet8", classes=3, image_size=8) | {
        "mean": [0.4914, 0.4822, 0.4465],
        "std": [0.2470, 0.2435, 0.2616],
    }
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["test_images"] == 16 and 0 <= metrics["test_accuracy"] <= 1


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("resnet20", {"architecture": "resnet20"}),
        ("digits_classifier", {"architecture": "resnet8", "mean": [0.25], "std": [0.25], "image_size": 48}),
    ],
)
def test_the_recipes_of_the_embedded_classifiers_make_the_same_networks(recipe, expected):
    found = composed(f"experiment=pretrain_{recipe}").pretrain
    given = {key: value for key, value in found.items() if not key.startswith("_")}
    assert {key: value for key, value in given.items() if value is not None} == expected
    module = schema.build(found, optimizer=None, lr_scheduler=None, seed=3, dump=Path())()
    torch.manual_seed(3)
    fresh = build(make_network_config(**expected)).state_dict()
    assert module.network.state_dict().keys() == fresh.keys()
    assert all(torch.equal(tensor, fresh[key]) for key, tensor in module.network.state_dict().items())


def test_resnets_for_cifar_are_named_after_their_layers():
    names = [name for name, config in ARGUMENTS.items() if config["architecture"] == "cifar_resnet"]
    for name in names:
        layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for module in on_meta(name).modules())
        assert name == f"resnet{layers}"
    assert names == ["resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
