"""Several budgets at once: checks of the fields that state them, and messages for those that cannot be met together."""

from collections.abc import Mapping, Sequence
from typing import Any

from criteria.selection.solver import Limit, find_extreme_cost


def check_budgets(budgets: Any, choices: Sequence[str]) -> None:
    """Raise ValueError for budgets that are no mapping of costs, which are among `choices`, to ratios."""
    if not isinstance(budgets, Mapping) or not budgets:
        raise ValueError(
            f"selection.budgets={budgets!r} has no budgets; give the ratio of each, such as "
            "{params: 0.5, latency: 0.3}, or null"
        )
    for name, ratio in budgets.items():
        if name not in choices:
            raise ValueError(f"selection.budgets={name!r} is unknown; choose one of: {', '.join(choices)}")
        check_ratio(f"selection.budgets.{name}", ratio)


def check_single_budget(budgets: Mapping[str, float], budget: str, ratio: float | None, target: float | None) -> None:
    """Raise ValueError where the fields of a single budget differ from the first of several budgets."""
    first, first_ratio = next(iter(budgets.items()))
    for name, value, expected in (("budget", budget, first), ("ratio", ratio, first_ratio)):
        if value not in (expected, None):
            raise ValueError(
                f"selection.{name}={value} differs from the first of selection.budgets={format_mapping(budgets)}, "
                f"{first}: {first_ratio}; leave selection.{name} out, or choose selection.{name}={expected}"
            )
    if target is not None:
        raise ValueError(
            f"selection.target={target}: several budgets are given as ratios; choose selection.target=null, or "
            "selection.budgets=null"
        )


def check_tolerance(tolerance: Any, budgets: Sequence[str]) -> None:
    """Raise ValueError for a tolerance out of range, or for tolerances that are not those of the budgets."""
    tolerances = {"": tolerance}
    if isinstance(tolerance, Mapping):
        if set(tolerance) != set(budgets):
            raise ValueError(
                f"selection.tolerance={format_mapping(tolerance)}: choose one number, or a number for each of: "
                f"{', '.join(budgets)}"
            )
        tolerances = {f".{name}": value for name, value in tolerance.items()}
    for name, value in tolerances.items():
        if not 0 <= value < 1:
            raise ValueError(f"selection.tolerance{name}={value} is out of range; choose 0 <= tolerance < 1")


def check_ratio(name: str, ratio: float) -> None:
    """Raise ValueError for a ratio that is no fraction between 0 and 1; `name` is its field."""
    if not 0 < ratio < 1:
        percent = f" (a fraction, not a percentage: {ratio / 100:g}?)" if 1 <= ratio < 100 else ""
        raise ValueError(f"{name}={ratio} is out of range; choose 0 < ratio < 1{percent}")


def describe_nearest(limits: Mapping[str, Limit], totals: Mapping[str, int]) -> str:
    """Return in words what each budget can be while the other ones are met: the nearest ratios, and the largest."""
    texts = []
    for name, (program, (low, high)) in limits.items():
        others, every = [limit for other, limit in limits.items() if other != name], sum(program.all_costs)
        below = find_extreme_cost(program, (0, low - 1), others, largest=True)
        above = find_extreme_cost(program, (high + 1, every), others, largest=False)
        most = find_extreme_cost(program, (0, every), others, largest=True)
        near = " and ".join(f"{cost / totals[name]:.4f}" for cost in (below, above) if cost is not None)
        largest = "" if most is None else f" (the largest {most / totals[name]:.4f})"
        texts.append(f"the nearest achievable ratio of {name} is {near or 'none'}{largest}")
    return ", ".join(texts)


def format_mapping(content: Mapping[str, Any]) -> str:
    """Return a mapping as it is written on the command line."""
    return f"{{{', '.join(f'{key}: {value}' for key, value in content.items())}}}"
