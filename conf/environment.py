"""Which fields of a configuration come from environment variables."""

import contextlib
from collections.abc import Iterator
from typing import Any

from omegaconf.resolvers import oc

_names_read: list[str] = []
"""names of the variables that `${oc.env:...}` has read"""


def read_environment(name: str, *default: Any) -> str | None:
    """Return an environment variable, or the default: the resolver `oc.env` of OmegaConf, which notes the name."""
    _names_read.append(name)
    return oc.env(name, *default)


@contextlib.contextmanager
def recorded_environment() -> Iterator[list[str]]:
    """Yield a list that, at the end of the block, has the names of the variables that were read inside."""
    names: list[str] = []
    start = len(_names_read)
    yield names
    names += _names_read[start:]
