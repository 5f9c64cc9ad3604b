"""Environment variables: those that number the processes of a job, and those that a configuration reads."""

import contextlib
from collections.abc import Iterator
from typing import Any

from omegaconf.resolvers import oc

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
"""Environment variables from which Lightning reads a process' rank; the first that is set counts."""

_names_read: list[str] = []
"""names of the variables that `${oc.env:...}` has read"""


def read_environment(name: str, *default: Any) -> str | None:
    """Return the value of an environment variable, or the default, as OmegaConf's `oc.env` does; note the name."""
    _names_read.append(name)
    return oc.env(name, *default)


@contextlib.contextmanager
def recorded_environment() -> Iterator[list[str]]:
    """Yield a list that, at the end of the block, has the names of the variables that were read inside."""
    names: list[str] = []
    start = len(_names_read)
    yield names
    names += _names_read[start:]
