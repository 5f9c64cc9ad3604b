"""What is raised and advised if a loss or a gradient is not finite."""

from typing import Any


class NonFiniteLoss(FloatingPointError):
    """A loss or a gradient is NaN or infinite; no optimiser step was taken with it."""


def advise_on_non_finite(step: int, precision: str, rate_field: str, precision_field: str, otherwise: str) -> str:
    """Return a sentence that says what to try against a loss or gradient that is not finite.

    Args:
        step: number of optimiser steps taken so far.
        precision: Lightning's name of the precision of the computation.
        rate_field: configuration field of the learning rate.
        precision_field: configuration field of the precision.
        otherwise: what to try if no step has been taken, so that the learning rate cannot be the cause.
    """
    wider = [] if precision == "32-true" else [f"{precision_field}=32-true"]
    if step:
        return f"{' or '.join([f'A lower {rate_field}', *wider])} usually helps"
    return f"No step was taken before, so the learning rate is not the cause; try {' or '.join([*wider, otherwise])}"


def is_list_of_texts(value: Any) -> bool:
    """Return whether a part of a batch is a list of strings, such as captions."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
