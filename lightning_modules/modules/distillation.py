"""Distilling an unpruned teacher into its pruned student."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from conf.schema import build
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.losses.level_weights import LevelWeights, features
from lightning_modules.modules.base import Optimizer, Schedule, TrainedModule
from lightning_modules.modules.lora import Lora


class Reference:
    """Holds a network that is neither trained, nor saved, nor copied with the module that uses it."""

    def __init__(self, network: NetworkBackbone) -> None:
        self.network = network.eval().requires_grad_(False)

    def __deepcopy__(self, memo: Any) -> Self:
        return self


class Distillation(TrainedModule):
    """L = w_task * L_task + w_out * mean((eps_S - eps_T)^2) + w_feat * sum_l alpha_l * mean((f_S_l - f_T_l)^2).

    `taps` says which feature maps are compared: `stages` (the outputs of down, middle and up blocks; of transformers
    the blocks), `units` (the outputs of the units that survive), a list of module paths, or a mapping {teacher's path:
    student's}. With `skip_emptied` a stage that lost every unit it had is not compared: nothing is left in it that
    could follow the teacher. Every term is logged by level, before and after its weight alpha_l (see LevelWeights).

    The squared error of the outputs is that of noise predictions; a language model's outputs are compared by the
    backbone's own `distance`. With `lora` only low-rank adapters are trained, and `result`
    has them merged into the weights.

    `feature_distance` compares two feature maps; None is their mean squared difference.

    The three terms are BK-SDM's (arXiv 2305.15798), the weights alpha_l follow LAPTOP-Diff (arXiv 2404.11098); the
    weights of the terms in the latter are not known, the defaults are ours.
    """

    def __init__(
        self,
        student: NetworkBackbone,
        teacher: NetworkBackbone,
        w_task: float = 1.0,
        w_out: float = 1.0,
        w_feat: float = 1.0,
        normalization: str = "teacher_energy",
        taps: Any = "stages",
        skip_emptied: bool = True,
        lora: Lora | None = None,
        feature_distance: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        optimizer: Optimizer,
        lr_scheduler: Schedule,
        seed: int,
        dump: Path,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, dump)
        self.student, self.reference = student.train(), Reference(teacher)
        self.w_task, self.w_out, self.w_feat = w_task, w_out, w_feat
        self.levels = tap_pairs(student, teacher, taps, skip_emptied) if w_feat else {}
        self.feature_distance = F.mse_loss if feature_distance is None else feature_distance
        self.needs_teacher = bool(w_out or self.levels)
        self.weights = LevelWeights(normalization, len(self.levels))
        self.merge = (lambda: None) if lora is None else lora.into(student.network, seed)

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any], teacher: NetworkBackbone, narrower: bool) -> None:
        """Raise ValueError for a configuration that could not be trained with this teacher.

        `settings` are the group's fields; `narrower`: the student's feature maps have fewer channels.
        """
        if narrower and settings.get("w_feat"):
            raise ValueError(
                f"distillation.w_feat={settings['w_feat']}: a student with fewer channels has no feature maps "
                "like the teacher's; choose distillation=task_only, output_only or none"
            )
        if settings.get("lora") is not None:
            build(settings["lora"]).check(teacher.network)
        check_levels(teacher, settings.get("normalization"), settings.get("taps"))

    def result(self) -> NetworkBackbone:
        """The student as trained, in its own shape."""
        self.merge()
        return self.student

    @property
    def teacher(self) -> NetworkBackbone:
        return self.reference.network

    def on_fit_start(self) -> None:
        if self.needs_teacher:
            self.teacher.to(self.device)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = self.student.training_inputs(batch)
        with features({name: self.student.network.get_submodule(at) for name, at in self.levels.items()}) as features_s:
            eps_s = self.student.predict(inputs).float()
        losses = {"task": self.student.losses(eps_s, inputs).mean()}
        total = self.w_task * losses["task"]
        if self.needs_teacher:
            with (
                torch.no_grad(),
                features({name: self.teacher.network.get_submodule(name) for name in self.levels}) as features_t,
            ):
                eps_t = self.teacher.predict(inputs).float()
            losses["output"] = self.student.distance(eps_s, eps_t, inputs)
            total = total + self.w_out * losses["output"]
            counts = inputs.get("mask")  # of tokens, where not all of them do
            for level, name in enumerate(self.levels):
                pair = (found[name].float() for found in (features_s, features_t))
                f_s, f_t = pair if counts is None else (feature[counts] for feature in pair)
                raw = self.feature_distance(f_s, f_t)
                weighted = self.weights(level, f_t) * raw
                losses[f"feature/{name}"], losses[f"weighted_feature/{name}"] = raw.detach(), weighted.detach()
                total = total + self.w_feat * weighted
        return {"loss": total} | losses


def check_levels(teacher: NetworkBackbone, normalization: str | None, taps: Any) -> None:
    """Raise ValueError for a normalisation or a tap that is not there, before any work is done; None is not checked."""
    if normalization is not None:
        LevelWeights(normalization, 0)
    if taps is not None:
        tap_names(teacher, taps)


def tap_names(teacher: NetworkBackbone, taps: Any) -> list[str]:
    """The teacher's module paths whose outputs are compared; raises ValueError for a path that is not there."""
    stages = list(teacher.stages())
    if isinstance(taps, str):
        if taps not in ("stages", "units"):
            raise ValueError(f"distillation.taps={taps!r} is unknown; choose stages, units, or a list of module paths")
        if taps == "units" and not teacher.survivors():
            raise ValueError(
                "distillation.taps='units': this network has no units of depth; choose stages or a list of paths"
            )
        return stages if taps == "stages" else teacher.survivors()
    there = dict(teacher.network.named_modules())
    for name in taps:
        if name not in there:
            raise ValueError(
                f"distillation.taps: {name!r} is not a module of this network; stages are: {', '.join(stages)}"
            )
    return list(taps)


def tap_pairs(student: NetworkBackbone, teacher: NetworkBackbone, taps: Any, skip_emptied: bool) -> dict[str, str]:
    """{module path of the teacher: that of the student}, of the taps that the student has.

    Raises ValueError for a path that the student has not, and where the student's counterparts of a list or of the
    units are not known.
    """
    names, units, kept = tap_names(teacher, taps), teacher.survivors(), student.kept()
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
    there = dict(student.network.named_modules())
    for name in pairs.values():
        if name not in there:
            raise ValueError(
                f"distillation.taps: {name!r} is not a module of the student; its stages are: "
                f"{', '.join(student.stages())}"
            )
    return pairs
