"""Functions of nested dictionaries and lists of tensors."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import MappingKey, tree_flatten_with_path, tree_map_only


def leaves_by_path(content: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values in nested dictionaries and lists as {"key/key/index": value}.

    A `prefix` becomes the first part of every path.
    """
    leaves, _ = tree_flatten_with_path(content)
    first = [prefix] if prefix else []
    return {"/".join([*first, *map(name_of_key, keys)]): leaf for keys, leaf in leaves}


def name_of_key(key: Any) -> str:
    """Return the dictionary's key, or the index in a list or tuple, as text."""
    return str(key.key if isinstance(key, MappingKey) else key.idx)


def tensors_by_path(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors in nested dictionaries and lists as {"key/key/index": tensor}, without all other values."""
    return {path: leaf for path, leaf in leaves_by_path(content, prefix).items() if isinstance(leaf, Tensor)}


def map_tensors(function: Callable[[Tensor], Tensor], content: Any) -> Any:
    """Return nested dictionaries and lists in which every tensor is replaced by the function of it."""
    return tree_map_only(Tensor, function, content)


def count_samples(batch: Any) -> int:
    """Return the number of samples of a batch: the length of the first tensor in it, 0 where it has none."""
    return next((len(tensor) for tensor in tensors_by_path(batch).values()), 0)
