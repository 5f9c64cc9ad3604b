"""Nested dictionaries and lists of tensors."""

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path


def tensors_by_path(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of nested dictionaries and lists as {"key/key/index": tensor}; what is no tensor is left out.

    A `prefix` becomes the first part of all paths.
    """
    leaves, _ = tree_flatten_with_path(content)
    parts = {tuple(getattr(key, "key", getattr(key, "idx", None)) for key in keys): leaf for keys, leaf in leaves}
    first = [prefix] if prefix else []
    return {"/".join(map(str, [*first, *path])): leaf for path, leaf in parts.items() if isinstance(leaf, Tensor)}
