"""Warnings of libraries: a process that runs several jobs prints each of them once."""

import logging
import warnings
from typing import Any

from conf.schema import PACKAGES

_printed: set[tuple[Any, ...]] = set()
"""what this process has printed so far"""

_print_warning = warnings.showwarning


def print_warning_once(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any, **more: Any
) -> None:
    """Print a warning of Python, in place of `warnings.showwarning`, unless the same line has printed it before."""
    if is_new(filename, lineno, category, str(message)):
        _print_warning(message, category, filename, lineno, *rest, **more)


def is_no_repeat(record: logging.LogRecord) -> bool:
    """Tell whether a log record is to be printed: the project's own, errors, and what was not printed before."""
    own = record.name.partition(".")[0] in PACKAGES
    return own or record.levelno != logging.WARNING or is_new(record.name, record.getMessage())


def is_new(*key: Any) -> bool:
    """Tell whether something has not been printed yet, and note that it is printed now."""
    if key in _printed:
        return False
    _printed.add(key)
    return True


def drop_repeats() -> None:
    """Have warnings of libraries printed once; Hydra makes the handlers of the log anew for every job."""
    warnings.showwarning = print_warning_once
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.addFilter(is_no_repeat)
