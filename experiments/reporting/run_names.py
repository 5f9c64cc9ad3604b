"""The name of a run for readers: its folder, and what it did that the folder's name does not say."""

import functools
import re
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from conf.schema import ROOT, take_first_value

NAME_LENGTH = 128
"""Longest name that W&B takes, in characters."""


def name_run(folder: str, config: Mapping[str, Any]) -> str:
    """Return the name of a run in reports and dashboards, such as "output_loss-knapsack-0.5-none-seed0-1a2b3c4d (t2i)".

    In brackets stands what the label leaves out: task, teacher and data where these are not the usual ones of the job,
    and criterion, selection, ratio or target, repair and distillation, so that a recipe with a label of its own hides
    nothing that was changed. A label that says all of it, such as that of the default job, stays as it is.

    Args:
        folder: name of the run's folder, "<label>-<first 8 characters of its id>".
        config: the run's configuration as plain values.
    """
    missing = [word for word in list_choices(config) if not contains_word(folder, word)]
    return (f"{folder} ({', '.join(missing)})" if missing else folder)[:NAME_LENGTH]


def list_choices(config: Mapping[str, Any]) -> list[str]:
    """Return the names of what distinguishes a run from other jobs, but for its seed."""
    task = get_name(config, "task")
    usual = read_usual_choices(task)
    choices = [name for group in ("task", "teacher", "data") if (name := get_name(config, group)) != usual.get(group)]
    if config.get("pretrain"):  # nothing is pruned
        return [name for name in choices if name]
    selection = config.get("selection") or {}
    if selection.get("name") == "bk_sdm":  # its fixed sets have a variant instead of scores and a ratio
        choices += [f"bk_sdm_{selection.get('variant')}"]
    elif selection:
        target = take_first_value(selection.get("ratio"), selection.get("target"))
        choices += [get_name(config, "criterion"), get_name(config, "selection"), str(target or "")]
    repair = get_name(config, "repair")
    choices += ["" if repair == "none" else repair, get_name(config, "distillation")]
    return [name for name in choices if name]


def get_name(config: Mapping[str, Any], group: str) -> str:
    """Return the name of the choice of a group; "" where the group is empty or its choice has none."""
    return str((config.get(group) or {}).get("name") or "")


def contains_word(text: str, word: str) -> bool:
    """Return whether a text contains a word that is not part of a longer word or number."""
    return re.search(rf"(?<![a-z0-9.]){re.escape(word)}(?![a-z0-9.])", text, re.IGNORECASE) is not None


@functools.cache
def read_usual_choices(task: str) -> dict[str, str]:
    """Return {group: name} of the task, the teacher and the data that a job of a task has unless these are changed."""
    files = {path.stem: path for path in (ROOT / "conf" / "task").glob("*.yaml")}
    choices: dict[str, str] = {}
    for path in (ROOT / "conf" / "train.yaml", *([files[task]] if task in files else [])):
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        for entry in content.get("defaults", ()):
            if isinstance(entry, dict):
                choices |= {str(group).removeprefix("override /"): name for group, name in entry.items()}
    return choices
