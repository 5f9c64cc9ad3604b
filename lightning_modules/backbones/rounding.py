"""Weights of a frozen network in the precision in which autocast computes with them."""

import copy

import torch
from torch import nn

from lightning_modules.backbones.base import NetworkBackbone

AUTOCAST_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""{Lightning's name of a precision: the dtype to which autocast rounds}"""

ROUNDED_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weights autocast rounds in every pass. It does not round those of norms and embeddings."""


def round_weights(backbone: NetworkBackbone, precision: str) -> NetworkBackbone:
    """Return a copy whose weights have been rounded as autocast rounds them; the network itself without autocast.

    The copy has the same outputs under autocast, bit for bit, with half the memory, and nothing is rounded again in
    every pass. Biases and weights that an embedding shares stay as they are. Pipeline parts are shared, not copied.

    Args:
        backbone: a network that is not trained; it is left on the CPU.
        precision: Lightning's name of the precision of the computation.
    """
    if precision not in AUTOCAST_DTYPES:
        return backbone
    if not next(backbone.parameters()).is_meta:
        backbone.to("cpu")
    layers = [part for part in backbone.network.modules() if isinstance(part, ROUNDED_LAYERS)]
    embedded = {id(part.weight) for part in backbone.network.modules() if isinstance(part, nn.Embedding)}
    memo: dict[int, object] = {id(backbone.pipeline_parts): backbone.pipeline_parts}
    for weight in (layer.weight for layer in layers if id(layer.weight) not in embedded):
        memo[id(weight)] = nn.Parameter(weight.detach().to(AUTOCAST_DTYPES[precision]), requires_grad=False)
    rounded: NetworkBackbone = copy.deepcopy(backbone, memo)
    return rounded
