"""Width units: which channels are coupled, what a block weighs, slicing, and rebuilding from sizes."""

import copy
import json
from collections.abc import Iterable

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from support.networks import UNETS, same_tensors
from support.process import ROOT
from torch import Tensor, nn

from lightning_modules.backbones.diffusion.pruned_unet import (
    channel_axes,
    list_sizes,
    resize_layers,
    update_channel_counts,
)
from lightning_modules.backbones.width.graph import Channels
from lightning_modules.metrics.cost import count_macs

SMALLEST_EPS = 1e-5
"""Of a batch norm: cuDNN, and torch 2.11 on every device, refuse less."""


class Cnn(nn.Module):
    """Residual, concatenation, depthwise and transposed convolution, batch norm, gate, flatten; whole numbers only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16, eps=SMALLEST_EPS, dtype=torch.float64)
        self.norm.running_var.fill_(1 - SMALLEST_EPS)  # variance and eps are 1 together: whole numbers stay whole
        self.conv1 = nn.Conv2d(16, 20, 3, padding=1)
        self.conv2 = nn.Conv2d(20, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.down = nn.Conv2d(16, 12, 2, stride=2)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.narrow = nn.Conv2d(24, 8, 1)
        self.square = nn.Conv2d(8, 8, 1)
        self.gated = nn.Linear(8 * 16, 32)
        self.hidden = nn.Linear(16, 9)
        self.head = nn.Linear(9, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randint(-2, 3, parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = x + self.conv2(self.conv1(x).relu())
        y = self.up(self.down(self.depthwise(x)).relu())
        x = self.narrow(torch.cat([x, y], 1))
        x = nn.functional.max_pool2d(x + self.square(x), 2)
        a, b = self.gated(x.flatten(1)).chunk(2, 1)
        return self.head(self.hidden(a.relu() + b).relu())


class ZeroPadded(nn.Module):
    """A shortcut that pads channels on both sides, as CIFAR ResNets have: the graph takes channel i for channel i."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 1)
        self.inner, self.head = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.wide(x) + nn.functional.pad(x, (0, 0, 0, 0, 4, 4))
        return self.head(x + self.last(self.inner(x)))


def inputs_of(network: nn.Module) -> dict[str, Tensor]:
    """A batch of two in the network's precision, the same in every call."""
    rng = torch.Generator().manual_seed(1)
    dtype = next(network.parameters()).dtype
    if not isinstance(network, UNet2DModel | UNet2DConditionModel):
        return {"x": torch.randint(-3, 4, (2, 3, 8, 8), generator=rng).to(dtype)}
    size = network.config.sample_size
    inputs = {"sample": torch.randn(2, 3, size, size, generator=rng).to(dtype), "timestep": torch.tensor([3, 700])}
    if isinstance(network, UNet2DConditionModel):
        inputs["encoder_hidden_states"] = torch.randn(2, 5, 6, generator=rng).to(dtype)
    return inputs


def run(network: nn.Module) -> Tensor:
    output = network(**inputs_of(network))
    return output if isinstance(output, Tensor) else output.sample


def make(name: str) -> nn.Module:
    """A network of random weights (norms too), frozen and in eval mode, as teachers are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "Cnn":
            return Cnn().double().eval()  # whole numbers beyond 2^24
        cls, config = UNETS[name]
        network = cls(**config).eval().requires_grad_(False)
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.normal_()
        return network


@torch.no_grad()
def unread(channels: Channels, names: Iterable[str]) -> nn.Module:
    """A copy in which nothing reads the channels of these blocks."""
    masked = copy.deepcopy(channels.network)
    for (layer, side), indices in channels.merge_cuts(names).items():
        if side == "in":
            (tensor, dim), *_ = channel_axes(masked.get_submodule(layer), side)
            getattr(masked.get_submodule(layer), tensor).index_fill_(dim, indices, 0)
    return masked


def params(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def subsets(channels: Channels) -> list[list[str]]:
    """First blocks, all but the last ones, every second one of every third group."""
    names = {root: [f"{root}:{i}" for i in range(len(blocks))] for root, blocks in channels.blocks.items()}
    some = [blocks[1::2] for blocks in list(names.values())[::3]]
    return [
        [blocks[0] for blocks in names.values()],
        [name for blocks in names.values() for name in blocks[:-1]],
        [name for blocks in some for name in blocks],
    ]


NETWORKS = pytest.mark.parametrize("name", ["Cnn", *UNETS])


@pytest.fixture
def channels(name: str) -> Channels:
    return Channels(make(name), run)


def test_the_groups_of_a_cnn_and_their_blocks() -> None:
    channels = Channels(make("Cnn"), run)
    blocks = {root: (len(cuts), len(cuts[0][root, "out"])) for root, cuts in channels.blocks.items()}
    # 16 channels of stem + conv2 + depthwise; 20 and 12 have no divisor between 5 or 6 and 8; the gate's 2 x 16.
    assert blocks == {
        "stem": (2, 8),
        "conv1": (4, 5),
        "down": (2, 6),
        "up": (2, 4),
        "narrow": (2, 4),
        "gated": (2, 16),
        "hidden": (3, 3),
    }
    stem = {key: cut.tolist() for key, cut in channels.blocks["stem"][1].items()}
    last = list(range(8, 16))
    assert stem == dict.fromkeys(
        [(layer, "out") for layer in ("stem", "norm", "conv2", "depthwise")]
        + [(layer, "in") for layer in ("conv1", "down", "narrow")],
        last,
    )
    gated = channels.blocks["gated"][0]
    assert gated["gated", "out"].tolist() == [*range(8), *range(16, 24)]
    assert gated["hidden", "in"].tolist() == [*range(8)]
    assert channels.blocks["narrow"][0]["gated", "in"].tolist() == [*range(4 * 16)]  # flattened 4x4 positions
    assert channels.blocks["up"][1]["narrow", "in"].tolist() == [*range(20, 24)]  # behind the concatenation


def test_the_units_of_the_embedded_teacher() -> None:
    teacher = UNet2DModel.from_pretrained(ROOT / "assets" / "teacher", low_cpu_mem_usage=False)
    channels = Channels(teacher, run)
    units = channels.units()
    assert (len(units), len(channels.blocks)) == (656, 44)
    assert {len(cuts[0][root, "out"]) for root, cuts in channels.blocks.items()} == {8}
    smallest = channels.sliced([unit.name for unit in units if not unit.name.endswith(":0")])
    assert (params(teacher), params(smallest)) == (8_952_067, 68_371)
    assert run(smallest).shape == (2, 3, 32, 32)


@NETWORKS
@pytest.mark.slow
def test_a_removed_block_equals_channels_that_nothing_reads(channels: Channels) -> None:
    """Exact for whole numbers; the U-Nets' norms are made to look at each channel alone."""
    network = channels.network
    if not isinstance(network, Cnn):
        network.double()
        for module in network.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = module.num_channels
    mixing = {name for name, module in network.named_modules() if isinstance(module, nn.LayerNorm)}
    mixed = {root for root, cuts in channels.blocks.items() if mixing & {layer for layer, _ in cuts[0]}}
    assert len(mixed) == (4 if isinstance(network, UNet2DConditionModel) else 0)
    for names in subsets(channels) + [[unit.name] for unit in channels.units()[::3]]:
        names = [name for name in names if name.rpartition(":")[0] not in mixed]
        masked, sliced = run(unread(channels, names)), run(channels.sliced(names))
        assert len(names) < 2 or not torch.equal(masked, run(network))
        if isinstance(network, Cnn):
            assert torch.equal(masked, sliced)
        else:
            torch.testing.assert_close(sliced, masked, rtol=1e-10, atol=1e-10)


@NETWORKS
def test_params_and_macs_are_what_a_unit_frees(channels: Channels) -> None:
    network = channels.network
    one = {key: x[:1] for key, x in inputs_of(network).items()}
    macs = count_macs(network, lambda: network(**one)).linear
    for unit in channels.units()[::3]:
        sliced = channels.sliced([unit.name])
        assert (unit.kind, unit.change) == ("channel", "slice")
        assert unit.params == params(network) - params(sliced) == sum(w.numel() for w in channels.weights(unit.name))
        assert unit.macs == macs - count_macs(sliced, lambda sliced=sliced: sliced(**one)).linear


@NETWORKS
def test_weights_are_each_element_once(channels: Channels) -> None:
    network = channels.network
    ones = {key: torch.ones_like(p) for key, p in network.named_parameters()}
    for unit in channels.units():
        touched = {key: torch.zeros_like(p) for key, p in ones.items()}
        for key, dim, indices in channels.slices(unit.name):
            touched[key].index_fill_(dim, indices, 1)
        assert sum(int(t.sum()) for t in touched.values()) == unit.params
        total = sum(float(w.detach().abs().double().sum()) for w in channels.weights(unit.name))
        marked = {key: p.detach().abs().double() * touched[key] for key, p in network.named_parameters()}
        assert total == pytest.approx(sum(float(m.sum()) for m in marked.values()), rel=1e-12)
        assert sum(int(w.sum()) for w in channels.weights(unit.name, ones)) == unit.params


@NETWORKS
def test_slicing_keeps_the_other_weights_and_fits_the_sizes(channels: Channels) -> None:
    network = channels.network
    dense = dict(network.named_parameters())
    for names in subsets(channels):
        sliced = channels.sliced(names)
        gone = {key: torch.zeros_like(p, dtype=torch.bool) for key, p in dense.items()}
        for name in names:
            for key, dim, indices in channels.slices(name):
                gone[key].index_fill_(dim, indices, True)
        for key, p in sliced.named_parameters():
            assert torch.equal(p.flatten(), dense[key][~gone[key]])
            assert p.requires_grad == dense[key].requires_grad
        assert run(sliced).shape == run(network).shape
        for path, size in list_sizes(sliced).items():
            module = sliced.get_submodule(path)
            if isinstance(module, nn.GroupNorm):
                before = network.get_submodule(path).num_groups
                assert size[1] == max(n for n in range(1, before + 1) if size[0] % n == 0)


@NETWORKS
def test_removing_nothing_gives_equal_bits(channels: Channels) -> None:
    sliced = channels.sliced([])
    assert torch.equal(run(sliced), run(channels.network))
    assert same_tensors(sliced.state_dict(), channels.network.state_dict())


@NETWORKS
def test_sizes_rebuild_a_sliced_network(name: str, channels: Channels) -> None:
    for names in subsets(channels):
        sliced = channels.sliced(names)
        stored = json.loads(json.dumps(list_sizes(sliced)))
        rebuilt = make(name)
        resize_layers(rebuilt, stored)
        assert not same_tensors(rebuilt.state_dict(), sliced.state_dict())
        rebuilt.load_state_dict(sliced.state_dict())
        assert torch.equal(run(rebuilt), run(sliced))
        empty = make(name).to("meta")
        resize_layers(empty, stored)
        empty.load_state_dict(sliced.state_dict(), assign=True)
        assert torch.equal(run(empty), run(sliced))


@NETWORKS
def test_a_sliced_network_is_sliced_again(name: str, channels: Channels) -> None:
    sliced = channels.sliced(subsets(channels)[0])
    again = Channels(sliced, run)
    assert again.blocks.keys() <= channels.blocks.keys()
    names = subsets(again)[0]
    smaller = again.sliced(names)
    assert params(smaller) < params(sliced)
    assert run(smaller).shape == run(sliced).shape


@NETWORKS
def test_it_is_deterministic_and_leaves_the_network_alone(name: str, channels: Channels) -> None:
    network = make(name).train()
    before, modes = copy.deepcopy(network.state_dict()), [module.training for module in network.modules()]
    frozen = [p.requires_grad for p in network.parameters()]
    rng = torch.get_rng_state()
    with torch.inference_mode():  # no harm: the graph needs autograd and switches it on
        again = Channels(network, run)
    again.sliced(subsets(again)[1])
    assert again.units() == channels.units()
    for root, blocks in channels.blocks.items():
        for cuts, others in zip(blocks, again.blocks[root], strict=True):
            assert cuts.keys() == others.keys() and all(torch.equal(cuts[key], others[key]) for key in cuts)
    assert same_tensors(network.state_dict(), before)
    assert [module.training for module in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == frozen
    assert all(p.grad is None for p in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("name", UNETS)
def test_heads_inputs_and_outputs_stay_whole(name: str, channels: Channels) -> None:
    whole = {"conv_out"} | {
        layer for layer in list_sizes(channels.network) if layer.rpartition(".")[2] in ("to_q", "to_k", "to_v")
    }
    cut = {key for blocks in channels.blocks.values() for cuts in blocks for key in cuts}
    assert len(whole) > 10
    assert not {layer for layer, side in cut if side == "out"} & whole
    assert not {layer for layer, side in cut if side == "in"} & {"conv_in", "time_embedding.linear_1"}
    assert not [layer for layer, side in cut if side == "in" and layer.endswith("to_out.0")]
    if name == "UNet2DConditionModel":
        assert not [layer for layer, side in cut if side == "in" and layer.endswith(("attn2.to_k", "attn2.to_v"))]


@pytest.mark.parametrize("name", UNETS)
def test_updating_channel_counts_of_a_stock_network_changes_nothing(name: str) -> None:
    network = make(name)
    before = {path: {k: v for k, v in vars(m).items() if k[0] != "_"} for path, m in network.named_modules()}
    update_channel_counts(network)
    assert {path: {k: v for k, v in vars(m).items() if k[0] != "_"} for path, m in network.named_modules()} == before


@pytest.mark.parametrize("change", [{"resnet_time_scale_shift": "scale_shift"}, {"downsample_type": "resnet"}])
def test_other_kinds_of_resnet_blocks(change: dict[str, str]) -> None:
    """A projection of twice the channels, chunked in two; samplers inside ResNet blocks, which assert their size."""
    cls, config = UNETS["UNet2DModel"]
    types = {"upsample_type": "resnet"} if "downsample_type" in change else {}
    network = cls(**config, **change, **types).eval()
    channels = Channels(network, run)
    if "resnet_time_scale_shift" in change:
        cuts = channels.blocks["down_blocks.0.resnets.0.conv1"][1]
        assert cuts["down_blocks.0.resnets.0.time_emb_proj", "out"].tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    for unit in channels.units():
        assert run(channels.sliced([unit.name])).shape == (2, 3, 8, 8)
    assert run(channels.sliced(subsets(channels)[1])).shape == (2, 3, 8, 8)


def test_a_stream_that_the_graph_cannot_follow_stays_whole() -> None:
    channels = Channels(ZeroPadded(), run)
    assert list(channels.blocks) == ["inner"]
    assert run(channels.sliced(["inner:0"])).shape == (2, 2, 8, 8)


def test_a_weight_with_one_group_on_both_sides_is_counted_once() -> None:
    channels = Channels(make("Cnn"), run)
    assert {dim for key, dim, _ in channels.slices("narrow:0") if key == "square.weight"} == {0, 1}
    ones = {key: torch.ones_like(p) for key, p in channels.network.named_parameters()}
    assert sum(int(part.sum()) for part in channels.parts("narrow:0", ones)["square.weight"]) == 8 * 8 - 4 * 4


def test_channels_respect_block_size_and_ignored_layers() -> None:
    network = make("Cnn")
    assert len(Channels(network, run, block=2).blocks["stem"]) == 8
    ignored = Channels(network, run, ignored=[network.conv2, network.hidden])
    assert list(ignored.blocks) == ["conv1", "down", "up", "narrow", "gated"]  # the stem is coupled to conv2
    with pytest.raises(ValueError, match="block=0"):
        Channels(network, run, block=0)


def test_mistakes_are_named() -> None:
    channels = Channels(make("Cnn"), run)
    with pytest.raises(ValueError, match=r"all 2 blocks of 'down'"):
        channels.sliced(["down:0", "down:1"])
    for name in ("down:2", "down:x", "nowhere:0", "down"):
        with pytest.raises(ValueError, match=rf"unit '{name}' is no block.*down:0\.\.1"):
            channels.sliced([name])
    with pytest.raises(ValueError, match="no tensor with a gradient"):
        Channels(make("Cnn"), torch.no_grad()(run))
    with pytest.raises(ValueError, match=r"sizes\['nowhere'\]=\[1, 2\] fits no layer of this Cnn"):
        resize_layers(make("Cnn"), {"nowhere": [1, 2]})
    with pytest.raises(ValueError, match=r"sizes\['norm'\]=\[1, 2\]"):
        resize_layers(make("Cnn"), {"norm": [1, 2]})
