"""Taps: the modules whose outputs (feature maps) are compared between teacher and student."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig
from torch import Tensor, nn

from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.removal import get_feature_map

TAPS = "stages, units, a list of module paths, or a mapping {teacher's path: student's path}"
"""The choices of `taps`, in words."""


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


def pair_taps(student: NetworkBackbone, teacher: NetworkBackbone, taps: Any, skip_emptied: bool) -> dict[str, str]:
    """Return {module path of the teacher: module path of the student} for the taps that the student has.

    Raises ValueError for a path that the student does not have. Raises it also for a list or `units` if the student's
    modules have other paths than the teacher's, so that it is unknown which modules correspond.

    Args:
        student: the pruned network.
        teacher: the network it was pruned from.
        taps: see Distillation.
        skip_emptied: leave out stages that have lost all their units.
    """
    names, units, kept = find_teacher_taps(teacher, taps), teacher.survivors(), student.kept()
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

    def has_lost_all(name: str) -> bool:
        inside = [unit for unit in units if unit == name or unit.startswith(name + ".")]
        return bool(inside) and not any(unit in kept for unit in inside)

    if taps == "units":
        names = [name for name in names if name in kept]
    elif taps == "stages" and student.moved:
        names = [name for name in names if name in student.moved]
    elif skip_emptied and not isinstance(taps, Mapping):
        names = [name for name in names if not has_lost_all(name)]
    pairs = {name: taps[name] if isinstance(taps, Mapping) else student.moved.get(name, name) for name in names}
    modules = dict(student.network.named_modules())
    for name in pairs.values():
        if name not in modules:
            raise ValueError(
                f"distillation.taps: {name!r} is not a module of the student; its stages are: "
                f"{', '.join(student.stages())}"
            )
    return pairs


@contextlib.contextmanager
def record_features(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that is filled with the feature maps of modules, by name, in forward passes in the context.

    If a module returns several values, only its feature map is recorded. Modules are given as objects, as their paths
    change under DDP.
    """
    maps: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            maps[name] = get_feature_map(output)

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
