"""Nested dictionaries."""

from collections.abc import Mapping
from typing import Any


def flatten_dict(nested: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Return {"outer.inner": value} of a nested dictionary; empty inner dictionaries have no entry."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            inner = flatten_dict(value, separator)
            flat |= {f"{key}{separator}{name}": leaf for name, leaf in inner.items()}
        else:
            flat[key] = value
    return flat
