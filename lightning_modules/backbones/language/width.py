"""Units of width of a decoder-only language model: key-value heads, and blocks of channels of the feed-forwards.

The width baselines of Shortened LLaMA (arXiv 2402.02834), which are LLM-Pruner (arXiv 2305.11627), Wanda-sp and FLAP
(arXiv 2312.11983), remove heads of attentions and intermediate channels of feed-forwards. Their students are networks
of new classes, whose layers may differ in width. Ours is a stock network of smaller sizes, which any tool can open: all
layers lose equally many heads and channels.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM

from criteria.base import Unit
from criteria.selection.base import group
from lightning_modules.backbones.removal import removing
from lightning_modules.backbones.width.blocks import Blocks, Cuts
from lightning_modules.backbones.width.graph import Channels


class DecoderChannels(Blocks):
    """The heads `<layer>.self_attn:<number>` and the channels `<layer>.mlp:<number>` of a network of transformers.

    A unit of kind "head" is a key-value head with the query heads that share it: rows of q, k and v, columns of o. A
    unit of kind "channel" is a block of consecutive intermediate channels (see Channels for its length): rows of the
    layers that compute them, columns of the layer that reads them, as torch-pruning's graph of the first layer's `mlp`
    couples them. An attention with a single key-value head has no units. No two units share a weight, so the costs
    that they free add up.

    Args:
        network: the network.
        meta: a network of the same configuration on the meta device.
        length: number of tokens of the sample for which MACs are counted.
        block: greatest number of channels per unit.

    Raises ValueError for a network whose layers are not alike or not built like Llama's.
    """

    network: Any  # a model of transformers

    def __init__(self, network: Any, meta: Any, length: int, block: int = 8) -> None:
        layers = {f"model.layers.{i}": layer for i, layer in enumerate(network.model.layers)}
        shapes = {path: {name: p.shape for name, p in layer.named_parameters()} for path, layer in layers.items()}
        if others := [path for path in shapes if shapes[path] != shapes["model.layers.0"]]:
            raise make_error(network, f"the weights of 'model.layers.0' and {others[0]!r} have other shapes")
        parts = {
            "self_attn": list_heads(network, layers["model.layers.0"]),
            "mlp": list_channel_blocks(network, meta.model.layers[0].mlp, block),
        }
        blocks = {
            f"{path}.{part}": [
                {(f"{path}.{part}.{layer}", side): i for (layer, side), i in cut.items()} for cut in cuts
            ]
            for path in layers
            for part, cuts in parts.items()
            if cuts
        }
        self.block = len(next(iter(parts["mlp"][0].values())))
        linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
        super().__init__(network, blocks, dict.fromkeys(linear, length))
        self.units_of_width = [replace(u, kind="head") if ".self_attn:" in u.name else u for u in super().units()]

    def units(self) -> list[Unit]:
        return list(self.units_of_width)

    def consumers(self, name: str) -> dict[str, Tensor]:
        """Return {layer: indices of its inputs that are the channels of a unit}."""
        return {layer: indices for (layer, side), indices in self.cuts[name].items() if side == "in"}

    def cost(self, names: Iterable[str], budget: str) -> int:
        """Return how many params or macs a set of units frees; raises what `config` raises."""
        names = list(names)
        self.config(names)
        return super().cost(names, budget)

    def config(self, names: Iterable[str]) -> Any:
        """Return the configuration of the stock network without these units.

        A LlamaConfig refuses a number of heads that does not divide the hidden size, although the network would work.
        A MistralConfig without a window, which describes the same computation, is then returned. Raises ValueError
        where layers would differ in width, and where the configuration refuses the widths.
        """
        lost = Counter(group(name) for name in names)
        for part in ("self_attn", "mlp"):
            counts = {lost[root] for root in self.blocks if root.endswith(part)}
            if len(counts) > 1:
                raise ValueError(
                    f"layers would lose {min(counts)} to {max(counts)} of their units of {part}, and a stock "
                    f"{type(self.network).__name__} has one width for all layers; choose selection=uniform"
                )
        config, lost_heads = copy.deepcopy(self.network.config), lost["model.layers.0.self_attn"]
        config.head_dim = self.network.model.layers[0].self_attn.head_dim
        config.num_attention_heads -= lost_heads * (config.num_attention_heads // config.num_key_value_heads)
        config.num_key_value_heads -= lost_heads
        config.intermediate_size -= lost["model.layers.0.mlp"] * self.block
        return make_acceptable(config)

    def sliced(self, names: Iterable[str]) -> Any:
        """Return a stock network without these units, with copies of the weights, in eval mode.

        Raises ValueError for an unknown unit, where a layer would lose all its heads or channels, and what `config`
        raises.
        """
        names = list(names)
        (_, state), config = self.remaining(names), self.config(names)
        state = {key: tensor.to("cpu", copy=True) for key, tensor in state.items()}
        is_same_class = type(config) is type(self.network.config)
        student = (type(self.network) if is_same_class else MistralForCausalLM).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=self.network.dtype,
            attn_implementation=self.network.config._attn_implementation,
        )
        student.generation_config = copy.deepcopy(self.network.generation_config)
        return student


def list_heads(network: Any, layer: Any) -> list[Cuts]:
    """Return, for each key-value head of a decoder layer, the indices that go with it; [] where there is only one.

    Raises ValueError for an attention that is not built like Llama's.
    """
    attention, config = layer.self_attn, network.config
    width, count = getattr(attention, "head_dim", 0), config.num_key_value_heads
    outputs = {"q_proj": config.num_attention_heads * width, "k_proj": count * width, "v_proj": count * width}
    for name, parameter in attention.named_parameters():
        projection = name.rpartition(".")[0]
        if projection not in (*outputs, "o_proj") and parameter.shape != (width,):  # such as norms over one head
            raise make_error(network, f"its attention's weight {name!r} has the shape {tuple(parameter.shape)}")
    projections = {name: getattr(attention, name, None) for name in (*outputs, "o_proj")}
    widths = {name: getattr(projections[name], "out_features", None) for name in outputs}
    if widths != outputs or not all(isinstance(module, nn.Linear) for module in projections.values()):
        raise make_error(network, "its attention has no q_proj, k_proj, v_proj and o_proj of so many heads")
    sides = {(name, "out"): extent // count for name, extent in outputs.items()}
    sides["o_proj", "in"] = outputs["q_proj"] // count
    if count < 2:
        return []
    return [{key: torch.arange(i * n, (i + 1) * n) for key, n in sides.items()} for i in range(count)]


def list_channel_blocks(network: Any, meta_mlp: nn.Module, block: int) -> list[Cuts]:
    """Return, for each block of intermediate channels of a decoder layer's feed-forward, the indices that go with it.

    Raises ValueError for a feed-forward whose channels are not those of the configuration.
    """
    # torch 2.11 has no products of experts in float32 on the meta device.
    hidden = torch.zeros(1, 2, network.config.hidden_size, device="meta", dtype=torch.bfloat16)
    blocks = Channels(meta_mlp.to(torch.bfloat16), lambda mlp: mlp(hidden), block).blocks
    counts = [len(cuts) * len(next(iter(cuts[0].values()))) for cuts in blocks.values()]
    if counts != [network.config.intermediate_size]:
        raise make_error(network, f"its feed-forward has intermediate channels {counts}")
    return next(iter(blocks.values()))


def make_error(network: Any, reason: str) -> ValueError:
    """Return the error for a network that has no units of width."""
    return ValueError(
        f"criterion.level='channel' is for networks whose layers are alike and built like Llama's; of this "
        f"{type(network).__name__}, {reason}; choose criterion.level=depth"
    )


def make_acceptable(config: Any) -> Any:
    """Return a configuration that its class accepts, see DecoderChannels.config; raises ValueError without one."""
    try:
        config.validate()
    except StrictDataclassError as error:
        if type(config) is not LlamaConfig or config.attention_bias or config.mlp_bias:
            raise ValueError(f"no stock network is that wide: {error}") from error
        of_llama = ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp")
        fields = {key: value for key, value in config.to_dict().items() if key not in of_llama}
        return MistralConfig(**fields, sliding_window=None)
    return config


@contextlib.contextmanager
def listening(network: nn.Module, listeners: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Pass the inputs of layers to functions, {module path: function}, in every forward pass inside the context."""
    handles = [
        network.get_submodule(name).register_forward_pre_hook(lambda module, args, listen=listen: listen(args[0]))
        for name, listen in listeners.items()
    ]
    with removing(handles):
        yield
