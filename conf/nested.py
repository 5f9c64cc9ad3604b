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


def unflatten_dict(flat: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Return the nested dictionary of which `flatten_dict` gives this one."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split(separator)
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return nested
