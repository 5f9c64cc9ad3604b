"""Training that does not depend on the number of ranks: sums and means over ranks, and random draws per sample."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode


def world_size() -> int:
    """Return the number of ranks, 1 where there are no others."""
    # Builds of torch without support for ranks have no is_initialized.
    has_ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if has_ranks else 1


def sum_over_ranks(value: Tensor, device: torch.device) -> Tensor:
    """Return the sum of a tensor over all ranks, on the CPU; all ranks have to call it.

    `device` is the one that the ranks communicate from: NCCL needs a GPU.
    """
    if world_size() == 1:
        return value
    total = value.to(device, copy=True)
    torch.distributed.all_reduce(total)
    return total.cpu()


def mean_over_ranks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the means of some scalars over all ranks, without gradients; all ranks have to call it."""
    if world_size() == 1:
        return dict(values)
    means = torch.stack([value.detach().float() for value in values.values()])
    torch.distributed.all_reduce(means)
    return dict(zip(values, means / world_size(), strict=True))


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm of all tensors together; if they are distributed over ranks, all ranks have to call it."""
    norm = nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


SIZED_DRAWS: Mapping[Callable[..., Any], int] = {torch.rand: 0, torch.randn: 0, torch.randint: 1}
"""Functions that draw tensors of a given size, and the number of positional arguments before the size."""

DRAWS_LIKE = (torch.rand_like, torch.randn_like, torch.randint_like)
"""Functions that draw a tensor with the size of their first argument."""

IN_PLACE_DRAWS = (Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.bernoulli_)
"""Methods that fill a tensor with draws that do not depend on its values."""

DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
"""Functions that multiply their first argument by random factors."""


class DrawsForGlobalBatch(TorchFunctionMode):
    """A context in which a rank's random draws are its rows of a draw for the global batch.

    What is drawn for a sample (noise, timestep, dropout) depends on its position in the global batch then, and not on
    the number of ranks. Sample i of rank r is sample i * world + r of the global batch, the order of
    datamodules.base.EndlessShuffle. All ranks have to start with the same seed.

    A draw is one per sample if its first dimension is a multiple of the number of samples. Other draws are the same on
    all ranks. Draws with an explicit generator are not changed. Some draws are not covered and are the same on all
    ranks: those of torch.distributions, and the dropout of scaled_dot_product_attention.

    Args:
        samples: number of samples of this rank's batch; all ranks have the same.
        rank: this rank.
        world: number of ranks.
    """

    active: "DrawsForGlobalBatch | None" = None
    """the context that draws are made in now; a forward pass that is repeated in the backward pass needs it again"""

    def __init__(self, samples: int, rank: int, world: int) -> None:
        super().__init__()
        self.samples, self.rank, self.world = samples, rank, world

    def __enter__(self) -> Self:
        DrawsForGlobalBatch.active = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        DrawsForGlobalBatch.active = None
        super().__exit__(*error)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if function in SIZED_DRAWS and options.get("generator") is None:
            size, others = split_size(function, args, options)
            if self.is_by_sample(size):
                return self.take_rows(function(*others, self.global_size(size), **options))
            return function(*others, size, **options)
        if function in DRAWS_LIKE and self.is_by_sample(args[0].shape):
            return self.take_rows(function(self.global_ones(args[0]), *args[1:], **options))
        if function in IN_PLACE_DRAWS and options.get("generator") is None and self.is_by_sample(args[0].shape):
            with torch.no_grad():
                args[0].copy_(self.take_rows(function(self.global_ones(args[0]), *args[1:], **options)))
            return args[0]
        if function is torch.bernoulli and options.get("generator") is None and self.is_by_sample(args[0].shape):
            return self.take_rows(torch.bernoulli(self.repeat_rows(args[0])))
        drops = function in DROPOUTS and options["training"] and options["p"] > 0
        if drops and self.is_by_sample(args[0].shape):
            with torch.no_grad():
                factors = self.take_rows(function(self.global_ones(args[0]), *args[1:], **options))
            return args[0] * factors
        return function(*args, **options)

    def is_by_sample(self, size: Sequence[int]) -> bool:
        """Return whether a draw of this size has one row, or the same number of rows, per sample."""
        return len(size) > 0 and size[0] > 0 and size[0] % self.samples == 0

    def global_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the size of the draw for all ranks that corresponds to this rank's."""
        return (self.world * size[0], *size[1:])

    def global_ones(self, tensor: Tensor) -> Tensor:
        """Return ones of the global size, with the memory order of a tensor: random numbers fill memory in order."""
        order = sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)
        size = self.global_size(tensor.shape)
        ones = tensor.new_ones([size[axis] for axis in order])
        return ones.permute([order.index(axis) for axis in range(tensor.dim())])

    def repeat_rows(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the global size in which every rank's rows are this rank's."""
        by_sample = tensor.reshape(self.samples, 1, -1, *tensor.shape[1:])
        return by_sample.expand(-1, self.world, *by_sample.shape[2:]).flatten(0, 2)

    def take_rows(self, draws: Tensor) -> Tensor:
        """Return this rank's rows of a draw for the global batch; several rows of one sample are consecutive."""
        by_sample = draws.reshape(self.samples, self.world, -1, *draws.shape[1:])
        return by_sample[:, self.rank].flatten(0, 1)


def split_size(function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Sequence[int], tuple[Any, ...]]:
    """Return the size that a function of SIZED_DRAWS is called with, and the positional arguments before it.

    If the size is among the keyword arguments `options`, it is removed from them.
    """
    if "size" in options:
        return options.pop("size"), args
    if args and isinstance(args[-1], Sequence):
        return args[-1], args[:-1]
    return args[SIZED_DRAWS[function] :], args[: SIZED_DRAWS[function]]
