"""Distillation of an unpruned teacher into its pruned student."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, ListConfig
from torch import Tensor

from conf.schema import build
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.losses.level_weights import LevelWeights, features
from lightning_modules.modules.base import DistillationModule, Optimizer, Schedule
from lightning_modules.modules.lora import Lora

log = logging.getLogger(__name__)

WEIGHTS = ("w_task", "w_out", "w_feat")
"""The weights of the three terms of the loss."""


class Distillation(DistillationModule):
    """Task, output and feature losses: L = w_task * L_task + w_out * L_out + w_feat * sum_l alpha_l * d(f_S_l, f_T_l).

    L_out is mean((eps_S - eps_T)^2) of noise predictions; the backbone's `distance` defines it, which for language
    models is a divergence of distributions. d is mean((f_S_l - f_T_l)^2) unless `feature_distance` is given. Each
    feature term is logged before and after its weight alpha_l (see LevelWeights).

    The three terms are BK-SDM's (arXiv 2305.15798), the weights alpha_l follow LAPTOP-Diff (arXiv 2404.11098). The
    weights of the terms in the latter are not known, and the defaults are ours.

    Args:
        student: see DistillationModule.
        teacher: see DistillationModule.
        w_task: weight of the loss that the teacher was trained with.
        w_out: weight of the distance between the outputs.
        w_feat: weight of the sum of the feature terms.
        normalization: how alpha_l follows from the teacher's feature maps, one of NORMALIZATIONS.
        taps: the feature maps that are compared: `stages` (outputs of the down, middle and up blocks of a U-Net, or
            of the blocks of a transformer), `units` (outputs of the units that are kept), a list of module paths, or
            a mapping {module path of the teacher: module path of the student}.
        skip_emptied: leave out stages all of whose units were removed, since nothing in them can learn.
        lora: low-rank adapters, which alone are trained; `result` merges them into the weights. None trains all.
        feature_distance: distance (student's map, teacher's map) -> scalar; the maps are float32, of shape (N,C,H,W)
            or (N,L,C), or (tokens,C) of one sample where padding is left out. None is the mean squared error.
        optimizer: see TrainedModule.
        lr_scheduler: see TrainedModule.
        seed: see TrainedModule.
        dump: see TrainedModule.
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
        super().__init__(student, teacher, optimizer, lr_scheduler, seed, dump)
        self.w_task, self.w_out, self.w_feat = w_task, w_out, w_feat
        self.levels = tap_pairs(student, teacher, taps, skip_emptied) if w_feat else {}
        if not (w_task or w_out or self.levels):
            raise ValueError(
                f"distillation.w_feat={w_feat} is the only weight above 0, and the student has none of the "
                f"feature maps of distillation.taps={taps}; choose distillation.w_task or distillation.w_out above 0"
            )
        self.feature_distance = F.mse_loss if feature_distance is None else feature_distance
        self.needs_teacher = bool(w_out or self.levels)
        self.weights = LevelWeights(normalization, len(self.levels))
        self.merge = (lambda: None) if lora is None else lora.into(student.network, seed)

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any], teacher: NetworkBackbone, narrower: bool) -> None:
        """Raise ValueError for settings that cannot be trained with this teacher; see DistillationModule."""
        weights = [name for name in WEIGHTS if settings.get(name, 1.0)]
        if not weights:
            values = ", ".join(f"{name}={settings[name]}" for name in WEIGHTS)
            raise ValueError(
                f"distillation: {values}, so that there is no loss to train on; choose a weight above 0, or "
                "distillation=none for no training"
            )
        if narrower and settings.get("w_feat"):
            raise ValueError(
                f"distillation.w_feat={settings['w_feat']}: a student with fewer channels has no feature maps "
                "like the teacher's; choose distillation=task_only, output_only or none"
            )
        if settings.get("lora") is not None:
            build(settings["lora"]).check(teacher.network)
        distance = settings.get("feature_distance")
        if distance is not None and not (isinstance(distance, DictConfig) and callable(build(distance))):
            raise ValueError(
                f"distillation.feature_distance={distance} is no distance; choose null for the mean squared error, or "
                "a class whose objects are called with two feature maps, such as "
                "{_target_: lightning_modules.losses.cosine.CosineDistance}"
            )
        LevelWeights(settings.get("normalization", "none"), 0)
        taps = settings.get("taps", "stages")
        if taps or "w_feat" in weights:
            check_taps(taps)
            tap_names(teacher, taps)
        if teacher.predicts_variance and "w_out" not in weights:
            log.warning(
                "distillation.w_out=%s: the student's predicted variance is not trained, as only the teacher's output "
                "teaches it; do not sample with sampler=ddpm, or set distillation.w_out above 0",
                settings.get("w_out"),
            )

    def result(self) -> NetworkBackbone:
        """Return the trained student, with adapters merged into its weights."""
        self.merge()
        return self.student

    def on_fit_start(self) -> None:
        if self.needs_teacher:
            super().on_fit_start()

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = self.network_inputs = self.student.training_inputs(batch)
        with features({name: self.student.network.get_submodule(path) for name, path in self.levels.items()}) as maps_s:
            eps_s = self.student.predict(inputs).float()
        losses = {"task": self.student.losses(eps_s, inputs).mean()}
        total = self.w_task * losses["task"]
        if self.needs_teacher:
            with (
                torch.no_grad(),
                features({name: self.teacher.network.get_submodule(name) for name in self.levels}) as maps_t,
            ):
                eps_t = self.teacher.predict(inputs).float()
            losses["output"] = self.student.distance(eps_s, eps_t, inputs)
            total = total + self.w_out * losses["output"]
            for level, name in enumerate(self.levels):
                raw, weighted = self.feature_terms(
                    level, maps_s[name].float(), maps_t[name].float(), inputs.get("mask")
                )
                losses[f"feature/{name}"], losses[f"weighted_feature/{name}"] = raw.detach(), weighted.detach()
                total = total + self.w_feat * weighted
        return {"loss": total} | losses

    def feature_terms(self, level: int, f_s: Tensor, f_t: Tensor, mask_NL: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the distance of a level's feature maps before and after its weight, two scalars.

        Where a mask says which tokens count, both are means over samples, each with a weight of its own, so that they
        do not depend on the number of tokens that happen to be in the same batch. Samples without tokens give 0.
        """
        if mask_NL is None:
            raw = self.feature_distance(f_s, f_t)
            return raw, self.weights(level, f_t) * raw
        counts = mask_NL.sum(1).tolist()
        samples = zip(f_s[mask_NL].split(counts), f_t[mask_NL].split(counts), strict=True)
        pairs = [(sample_s, sample_t) for sample_s, sample_t in samples if len(sample_s)]
        weights_N = self.weights.for_samples(level, [sample_t for _, sample_t in pairs])
        if not pairs:
            return (nothing := 0 * f_s.sum()), nothing
        raw_N = torch.stack([self.feature_distance(*pair) for pair in pairs])
        return raw_N.sum() / len(counts), (weights_N * raw_N).sum() / len(counts)


TAPS = "stages, units, a list of module paths, or a mapping {teacher's path: student's path}"
"""The values of `taps`, in words."""


def check_taps(taps: Any) -> None:
    """Raise ValueError where `taps` is of another type than TAPS, or empty."""
    is_mapping = isinstance(taps, Mapping | DictConfig)
    paths = [*taps, *taps.values()] if is_mapping else taps
    is_list = is_mapping or isinstance(taps, list | tuple | ListConfig)
    if not isinstance(taps, str) and not (is_list and paths and all(isinstance(path, str) for path in paths)):
        value = "null" if taps is None else taps
        raise ValueError(
            f"distillation.taps={value} names no feature maps to compare; choose {TAPS}, or distillation.w_feat=0 to "
            "compare none"
        )


def tap_names(teacher: NetworkBackbone, taps: Any) -> list[str]:
    """Return the module paths of the teacher whose outputs are compared; raises ValueError for an unknown path."""
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


def tap_pairs(student: NetworkBackbone, teacher: NetworkBackbone, taps: Any, skip_emptied: bool) -> dict[str, str]:
    """Return {module path of the teacher: module path of the student} for the taps that the student has.

    Raises ValueError for a path that the student does not have, and for a list or `units` where the student's modules
    have other paths than the teacher's, so that it is not known which of them correspond.
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
    modules = dict(student.network.named_modules())
    for name in pairs.values():
        if name not in modules:
            raise ValueError(
                f"distillation.taps: {name!r} is not a module of the student; its stages are: "
                f"{', '.join(student.stages())}"
            )
    return pairs
