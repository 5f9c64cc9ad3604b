"""The front of one scoring as data: every plan of least harm, its costs, and the ratio that makes a job choose it."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from criteria.selection.base import Budget, Pool, Selection
from criteria.selection.front import find_front
from criteria.selection.solver import total_harm

DIGITS = 4
"""Decimal places of the ratio that chooses a plan of the front; more where plans are closer together."""


def describe_ratios(selection: Selection, pool: Pool, removed: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the planned ratio of each of several budgets, as an entry of plan.json; nothing for a single budget."""
    if selection.budgets is None:
        return {}
    return {
        "achieved_ratios": {
            budget: pool.count_freed(removed, budget) / pool.total(budget) for budget in selection.budgets
        }
    }


def describe_front(
    selection: Selection, pool: Pool, harms: Mapping[str, float], plan: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of pareto.json.

    Each plan states what is left of every cost (of latency the whole less what each removed unit saves alone), its
    `removed` units as indices into `units`, and in `selection_ratio` the `selection.ratio` with which the knapsack
    chooses it.

    Args:
        selection: its budget, the first of several, is what the harm is weighed against; its protected units stay.
        pool: the units with their measured savings.
        harms: {unit: score}.
        plan: the content of plan.json, which is described as `chosen`.
    """
    names = [unit.name for unit in pool.units]
    index = {name: i for i, name in enumerate(names)}
    programs = {budget: pool.program(budget) for budget in pool.totals if budget != Budget.FLOPS}

    def describe(units: Sequence[str]) -> dict[str, Any]:
        removed = [index[name] for name in units]
        freed = {budget: program.cost(removed) for budget, program in programs.items()}
        left = {budget: max(pool.total(budget) - cost, 0) for budget, cost in freed.items()}
        return {
            "ratio": freed[selection.budget] / pool.total(selection.budget),
            "harm": total_harm([harms[name] for name in names], removed),
            "removed_units": len(removed),
            **convert_latency(left),
            "removed": removed,
        }

    chosen = [change["unit"] for change in plan["changes"] if "unit" in change]
    plans, below = [], Fraction(0)
    for each in find_front(pool, harms, selection.budget, selection.protected_units(pool.units)):
        share = Fraction(each.removed, pool.total(selection.budget))
        plans.append({"selection_ratio": choose_ratio(share, below), **describe(each.units)})
        below = share
    return {
        "teacher": plan["teacher"],
        "scores": plan["scores"],
        "budget": selection.budget,
        "totals": convert_latency({budget: pool.total(budget) for budget in programs}),
        "units": names,
        "chosen": describe(chosen),
        "plans": plans,
    }


def convert_latency(costs: Mapping[str, int]) -> dict[str, float]:
    """Return costs with `latency` in microseconds replaced by `latency_ms` in milliseconds."""
    return {
        **{budget: cost for budget, cost in costs.items() if budget != Budget.LATENCY},
        **({"latency_ms": costs[Budget.LATENCY] / 1000} if Budget.LATENCY in costs else {}),
    }


def choose_ratio(share: Fraction, below: Fraction) -> float:
    """Return a short decimal number that is at most `share` and greater than `below`, the share of the plan before."""
    digits = DIGITS
    while math.floor(share * 10**digits) <= below * 10**digits:
        digits += 1
    return float(Fraction(math.floor(share * 10**digits), 10**digits))


def format_csv(front: Mapping[str, Any]) -> str:
    """Return pareto.csv: a row per plan with the columns of pareto.json but for the lists of units."""
    columns = [name for name in front["chosen"] if name != "removed"]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["selection_ratio", *columns, "chosen"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for plan in front["plans"]:
        writer.writerow({**plan, "chosen": int(plan["removed"] == front["chosen"]["removed"])})
    return text.getvalue()
