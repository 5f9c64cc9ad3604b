"""What a forward pass on a CUDA device saves in memory, imitated on the meta device: autocast and fused attention."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_modules.nested import map_tensors

LOWERED: frozenset[Callable[..., Any]] = frozenset(
    (
        *(F.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d),
        *(torch.matmul, torch.mm, torch.bmm, torch.baddbmm, torch.addmm, torch.addbmm, torch.einsum),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, F.scaled_dot_product_attention),
    )
)
"""Functions that autocast computes in the lower precision (torch.amp, list for CUDA), as far as networks use them"""

RAISED: frozenset[Callable[..., Any]] = frozenset(
    (
        *(F.group_norm, F.layer_norm, F.softmax, F.log_softmax, F.mse_loss, F.l1_loss, F.cross_entropy, F.kl_div),
        *(F.smooth_l1_loss, F.cosine_similarity, F.softplus, F.gumbel_softmax),
        *(torch.softmax, torch.log_softmax, torch.norm, torch.exp, torch.log, torch.pow, torch.rsqrt, torch.sum),
        *(torch.cumsum, torch.prod, torch.rms_norm, F.rms_norm),
        *(Tensor.softmax, Tensor.log_softmax, Tensor.norm, Tensor.exp, Tensor.log, Tensor.pow, Tensor.__pow__),
        *(Tensor.rsqrt, Tensor.sum, Tensor.cumsum, Tensor.prod),
    )
)
"""Functions that autocast computes in float32, likewise"""

FLASH_HEAD_SIZE = 256
"""the largest size of a head for FlashAttention"""


class CudaOnMeta(TorchFunctionMode):
    """A context in which functions of tensors on the meta device have the dtypes that they would have on a CUDA device.

    A weight is cast at every use, as under Lightning's autocast, which keeps no cache. Attention is one of the fused
    kernels, which save no matrix of all pairs of tokens.

    Args:
        dtype: the lower precision of autocast; None computes without autocast.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that runs inside this context, wherever it is called."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return run

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if self.dtype is not None and function in LOWERED:
            args, options = map_tensors(self.lower, (args, options))
        elif self.dtype is not None and function in RAISED:
            args, options = map_tensors(lambda tensor: tensor.float() if is_low(tensor) else tensor, (args, options))
        if function is F.scaled_dot_product_attention:
            return attend(*args, **options)
        return function(*args, **options)

    def lower(self, tensor: Tensor) -> Tensor:
        """Return a floating-point tensor in the lower precision, and any other tensor as it is."""
        assert self.dtype is not None
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def is_low(tensor: Tensor) -> bool:
    """Tell whether a tensor is of half precision."""
    return tensor.dtype in (torch.float16, torch.bfloat16)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the shapes of scaled dot-product attention (N,heads,L,E), of the fused kernel that CUDA would choose."""
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    if is_low(query) and attn_mask is None and query.shape[-1] <= FLASH_HEAD_SIZE:
        output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
        return output
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:2], query.shape[2], key.shape[2]).to(query.dtype)
    output = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]
    return output
