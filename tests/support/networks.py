"""A tiny network of every family, and batches that fit it."""

import copy
import functools
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, Transformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.backbones.diffusion.load import load_teacher
from lightning_modules.backbones.diffusion.unet import UNetBackbone
from support.language import tiny_language, tiny_tokens
from support.pipelines import LATENT, TEXT, tiny_pipeline

TINY = dict(  # noqa: C408
    sample_size=8,
    in_channels=3,
    out_channels=3,
    layers_per_block=1,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
    attention_head_dim=8,
)
"""12 units: 8 ResNet blocks, 4 of them with a 1x1 shortcut to keep, and attentions; some 60,000 parameters."""


CROSS = TINY | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
UNETS: dict[str, tuple[Any, dict[str, Any]]] = {
    "UNet2DModel": (UNet2DModel, TINY),
    "UNet2DConditionModel": (UNet2DConditionModel, CROSS | {"cross_attention_dim": 6}),
}
"""Networks without a pipeline around them: on images, with conditions that a batch brings along."""

LATENTS = CROSS | {"in_channels": 4, "out_channels": 4}
SMALLER: dict[str, dict[str, Any]] = {
    "sd": LATENTS | {"cross_attention_dim": TEXT},
    "sdxl": LATENTS
    | {
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "cross_attention_dim": 2 * TEXT,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TEXT,
        "projection_class_embeddings_input_dim": 7 * TEXT,
    },
}
"""U-Nets of two stages that take the place of those in the tiny pipelines, which have more than a test needs."""

TRANSFORMERS = ("dit", "pixart", "sd3", "flux")
FAMILIES = (*UNETS, *SMALLER, *TRANSFORMERS)
CAPTIONS = ("a cat", "the dog at the door", "red", "a boat, 1906")

JOINT = ("attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2")
LAST_LAYERS: dict[type[nn.Module], tuple[str, ...]] = {
    ResnetBlock2D: ("conv2",),
    Attention: ("to_out.0",),
    Transformer2DModel: ("proj_out",),
    BasicTransformerBlock: ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2"),
    JointTransformerBlock: JOINT,
    FluxTransformerBlock: JOINT,
    FluxSingleTransformerBlock: ("proj_out",),
    LlamaDecoderLayer: ("self_attn.o_proj", "mlp.down_proj"),
}
"""What a unit adds to its residual stream (or streams) comes from these; without them it does nothing."""


def tiny_backbone(family: str) -> Any:
    """A backbone of one of FAMILIES, of random weights, the same in every call."""
    return copy.deepcopy(made(family))


@functools.cache
def made(family: str) -> NetworkBackbone:
    backbone: NetworkBackbone
    if family == "llama":
        return tiny_language()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family in UNETS:
            cls, config = UNETS[family]
            backbone = UNetBackbone(cls(**config).eval(), DDPMScheduler())
        else:
            with tempfile.TemporaryDirectory() as folder:
                backbone = load_teacher(str(tiny_pipeline(family, Path(folder))), sample_size=LATENT)
            if family in SMALLER:
                backbone = backbone.student(UNet2DConditionModel(**SMALLER[family]))
    backbone.macs()  # counted once for all copies
    return backbone


def tiny_batch(backbone: DiffusionBackbone, count: int = 4, of: int | None = None) -> dict[str, Any]:
    """The first `count` of `of` samples, as Images.subset gives them, with captions or conditions as needed."""
    if backbone.writes_text:
        return part(tiny_tokens(of or count), 0, count)
    rng = torch.Generator().manual_seed(1)
    images = torch.rand(of or count, *backbone.image_shape(), generator=rng) * 2 - 1
    batch = {"image": images[:count], "number": torch.arange(count), "of": torch.full((count,), of or count)}
    batch["label"] = batch["number"] % 3
    if backbone.takes_text:
        batch["caption"] = captions(count)
    elif isinstance(backbone.network, UNet2DConditionModel):
        batch["conditions"] = {"encoder_hidden_states": torch.randn(of or count, 5, 6, generator=rng)[:count]}
    return batch


def tiny_seeds(backbone: DiffusionBackbone, count: int = 4) -> dict[str, Any]:
    """As many images to generate."""
    return {"seed": torch.arange(count)} | ({"caption": captions(count)} if backbone.takes_text else {})


def captions(count: int) -> list[str]:
    return [CAPTIONS[k % len(CAPTIONS)] for k in range(count)]


def part(batch: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Some samples of a batch."""
    return {key: part(v, start, stop) if isinstance(v, dict) else v[start:stop] for key, v in batch.items()}


def bypasses(names: Iterable[str]) -> list[dict[str, str]]:
    """A plan that bypasses these units."""
    return [{"unit": name, "kind": "bypass"} for name in names]


def replacements(names: Iterable[str]) -> list[dict[str, str]]:
    """A plan that puts cheaper operators into the place of these units."""
    return [{"unit": name, "kind": "replace"} for name in names]


def last_layers(unit: nn.Module) -> list[nn.Module]:
    there = dict(unit.named_modules())
    return [there[name] for name in LAST_LAYERS[type(unit)] if name in there]


@torch.no_grad()
def with_zeroed(backbone: DiffusionBackbone, names: Iterable[str]) -> DiffusionBackbone:
    """A copy in which the last layers of each of these units are zero, weight and bias.

    So is that of a Transformer2D all of whose basic blocks are named. Attentions turn their feature maps to
    channels-last strides, in which later convolutions round differently; here they keep the strides they were given,
    so that nothing but the zeros is compared.
    """
    zeroed, names = copy.deepcopy(backbone), set(names)
    names |= {part.name for part in backbone.shared() if names.issuperset(part.units)}
    for name in names:
        unit = zeroed.network.get_submodule(name)
        for layer in last_layers(unit):
            for parameter in layer.parameters():
                parameter.zero_()
        if isinstance(unit, Attention | Transformer2DModel):
            unit.register_forward_hook(keep_strides)
    return zeroed


def keep_strides(module: nn.Module, given: tuple[Tensor], output: Any) -> Any:
    """A forward hook: the output in the strides of the input."""
    kept = torch.empty_like(given[0]).copy_(output if isinstance(output, Tensor) else output[0])
    return kept if isinstance(output, Tensor) else (kept,)


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """The same names with the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
