"""What makes a training independent of the number of its ranks: means over them, and draws for the global batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def world_size() -> int:
    """Return the number of ranks, 1 where there are no others."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def mean_over_ranks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the means of some scalars over all ranks, without gradients; all ranks have to call it."""
    if world_size() == 1:
        return dict(values)
    means = torch.stack([value.detach().float() for value in values.values()])
    torch.distributed.all_reduce(means)
    return dict(zip(values, means / world_size(), strict=True))


SIZED_DRAWS: Mapping[Callable[..., Any], int] = {torch.rand: 0, torch.randn: 0, torch.randint: 1}
"""Functions that draw tensors of a given size, and how many positional arguments come before it, at least."""

DRAWS_LIKE = (torch.rand_like, torch.randn_like, torch.randint_like)
"""Functions that draw a tensor of the size of their first argument."""

DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
"""Functions that multiply their first argument by random factors."""


class DrawsForGlobalBatch(TorchFunctionMode):
    """Makes draws inside this context a rank's rows of draws for the global batch.

    What is drawn for a sample (noise, timestep, dropout) then depends on its position in the global batch and not on
    the number of ranks. Sample i of rank r is sample i * world + r of the global batch, as datamodules.base.Stream
    deals them. All ranks have to begin with the same seed.

    A draw belongs to the samples if its first dimension is a multiple of their number. Other draws are the same on all
    ranks, and those from a generator of their own are not changed.

    Args:
        samples: number of samples of this rank's batch; all ranks have the same.
        rank: this rank.
        world: number of ranks.
    """

    def __init__(self, samples: int, rank: int, world: int) -> None:
        super().__init__()
        self.samples, self.rank, self.world = samples, rank, world

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if function in SIZED_DRAWS and options.get("generator") is None:
            size, others = split_size(function, args, options)
            if self.is_by_sample(size):
                return self.rows(function(*others, self.global_size(size), **options))
            return function(*others, size, **options)
        if function in DRAWS_LIKE and self.is_by_sample(args[0].shape):
            return self.rows(function(self.global_ones(args[0]), *args[1:], **options))
        drops = function in DROPOUTS and options["training"] and options["p"] > 0
        if drops and self.is_by_sample(args[0].shape):
            with torch.no_grad():
                factors = self.rows(function(self.global_ones(args[0]), *args[1:], **options))
            return args[0] * factors
        return function(*args, **options)

    def is_by_sample(self, size: Sequence[int]) -> bool:
        return len(size) > 0 and size[0] > 0 and size[0] % self.samples == 0

    def global_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the size of a draw for all ranks in the place of one for this rank."""
        return (self.world * size[0], *size[1:])

    def global_ones(self, tensor: Tensor) -> Tensor:
        """Return ones of the global batch's size in the tensor's memory order, in which a draw fills a tensor."""
        order = sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)
        size = self.global_size(tensor.shape)
        ones = tensor.new_ones([size[axis] for axis in order])
        return ones.permute([order.index(axis) for axis in range(tensor.dim())])

    def rows(self, draws: Tensor) -> Tensor:
        """Return this rank's part of draws for the global batch, whose samples have one row or several in sequence."""
        by_sample = draws.reshape(self.samples, self.world, -1, *draws.shape[1:])
        return by_sample[:, self.rank].flatten(0, 1)


def split_size(function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Sequence[int], tuple[Any, ...]]:
    """Return the size that a function of SIZED_DRAWS is called with, and its other positional arguments.

    A size among the `options` is removed from them.
    """
    if "size" in options:
        return options.pop("size"), args
    if args and isinstance(args[-1], Sequence):
        return args[-1], args[:-1]
    return args[SIZED_DRAWS[function] :], args[: SIZED_DRAWS[function]]
