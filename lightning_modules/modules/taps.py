"""Taps: the modules whose outputs (feature maps) are compared between teacher and student."""

from collections.abc import Collection, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig
from torch import nn

from lightning_modules.backbones.base import NetworkBackbone

TAPS = "stages, units, a list of module paths, or a mapping {teacher's path: student's path}"
"""The choices of `taps`, in words."""

SKIPS: dict[Any, str] = {True: "units", False: "none", "units": "units", "convolutions": "convolutions", "none": "none"}
"""{value of `skip_emptied`: what a stage has to lose to be left out}"""


def check_skip(skip_emptied: Any) -> None:
    """Raise ValueError for a value of `skip_emptied` that is not one of SKIPS."""
    if skip_emptied not in SKIPS:
        raise ValueError(
            f"distillation.skip_emptied={skip_emptied!r} is unknown; choose one of: units (or true), convolutions, "
            "none (or false)"
        )


def check_taps(taps: Any) -> None:
    """Raise ValueError if `taps` is empty or has a type other than those in TAPS."""
    is_mapping = isinstance(taps, Mapping | DictConfig)
    paths = [*taps, *taps.values()] if is_mapping else taps
    is_list = is_mapping or isinstance(taps, list | tuple | ListConfig)
    if not isinstance(taps, str) and not (is_list and paths and all(isinstance(path, str) for path in paths)):
        value = "null" if taps is None else taps
        raise ValueError(
            f"distillation.taps={value} names no feature maps to compare; choose {TAPS}, or distillation.w_feat=0 to "
            "compare none"
        )


def find_teacher_taps(teacher: NetworkBackbone, taps: Any) -> list[str]:
    """Return the paths of the teacher's modules whose outputs are compared; raise ValueError for an unknown path."""
    stages = list(teacher.stages())
    if isinstance(taps, str):
        if taps not in ("stages", "units"):
            raise ValueError(f"distillation.taps={taps!r} is unknown; choose stages, units, or a list of module paths")
        if taps == "units" and not teacher.survivors():
            raise ValueError(
                "distillation.taps='units': this network has no units of depth; choose stages or a list of module paths"
            )
        return stages if taps == "stages" else teacher.survivors()
    modules = dict(teacher.network.named_modules())
    for name in taps:
        if name not in modules:
            raise ValueError(
                f"distillation.taps: {name!r} is not a module of this network; stages are: {', '.join(stages)}"
            )
    return list(taps)


def pair_taps(
    student: NetworkBackbone, teacher: NetworkBackbone, taps: Any, skip_emptied: bool | str
) -> dict[str, str]:
    """Return {module path of the teacher: module path of the student} for the taps that the student has.

    Raises ValueError for a path that the student does not have. Raises it also for a list or `units` if the student's
    modules have other paths than the teacher's, so that it is unknown which modules correspond.

    Args:
        student: the pruned network.
        teacher: the network it was pruned from.
        taps: see Distillation.
        skip_emptied: which stages are left out, one of SKIPS: those that have lost all their units; also those that
            have lost all their units with convolutions; none.
    """
    check_skip(skip_emptied)
    names, kept = find_teacher_taps(teacher, taps), student.kept()
    renamed = any(old != new for old, new in student.moved.items())
    if renamed and not isinstance(taps, str | Mapping):
        raise ValueError(
            "distillation.taps: the student's modules have other paths than the teacher's, so a list cannot name both; "
            "choose stages, or a mapping {teacher's path: student's path}"
        )
    if taps == "units" and student.moved and not student.moved.keys() >= set(kept):
        raise ValueError(
            "distillation.taps='units': the student's units are not the teacher's; choose stages, or a mapping "
            "{teacher's path: student's path}"
        )

    if taps == "units":
        names = [name for name in names if name in kept]
    elif taps == "stages" and student.moved:
        names = [name for name in names if name in student.moved]
    elif not isinstance(taps, Mapping):
        emptied = find_emptied(teacher, kept, SKIPS[skip_emptied])
        names = [name for name in names if name not in emptied]
    pairs = {name: taps[name] if isinstance(taps, Mapping) else student.moved.get(name, name) for name in names}
    modules = dict(student.network.named_modules())
    for name in pairs.values():
        if name not in modules:
            raise ValueError(
                f"distillation.taps: {name!r} is not a module of the student; its stages are: "
                f"{', '.join(student.stages())}"
            )
    return pairs


def find_emptied(teacher: NetworkBackbone, kept: Collection[str], lost: str) -> set[str]:
    """Return the modules of the teacher that have lost all of certain units, of which they had some.

    Args:
        teacher: the unpruned network.
        kept: the teacher's units of depth that the student has.
        lost: `units` for all units of depth, `convolutions` also for those with a convolution over neighbours (such as
            ResNet blocks) alone, `none` for no units.
    """
    units = {} if lost == "none" else {name: teacher.network.get_submodule(name) for name in teacher.survivors()}
    sets = [list(units)]
    if lost == "convolutions":
        sets.append([name for name, unit in units.items() if any(map(mixes_neighbours, unit.modules()))])
    emptied = set()
    for names in sets:
        parents = {parent for name in names for parent in list_parents(name)}
        emptied |= parents - {parent for name in names if name in kept for parent in list_parents(name)}
    return emptied


def mixes_neighbours(module: nn.Module) -> bool:
    """Tell whether a module is a convolution with a kernel of more than one position."""
    return isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)


def list_parents(name: str) -> list[str]:
    """Return the paths of the modules that a module is in, itself among them."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
