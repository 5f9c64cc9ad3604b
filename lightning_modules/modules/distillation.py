"""Distillation of a teacher, such as the unpruned network, into a pruned student."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from conf.schema import build
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.removal import record_features
from lightning_modules.losses.level_weights import LevelWeights
from lightning_modules.losses.timesteps import Timesteps
from lightning_modules.modules.base import DistillationModule, Optimizer, Schedule
from lightning_modules.modules.lora import Lora
from lightning_modules.modules.taps import check_skip, check_taps, find_teacher_taps, pair_taps
from lightning_modules.modules.training_inputs import draw_training_inputs

log = logging.getLogger(__name__)

WEIGHTS = ("w_task", "w_out", "w_feat")
"""Fields with the weights of the three terms of the loss."""


class Distillation(DistillationModule):
    """Minimises L = w_task * L_task + w_out * L_out + w_feat * sum_l alpha_l * d(f_S_l, f_T_l).

    L_task is the loss that the teacher was trained with. L_out is the backbone's `distance` between the outputs:
    mean((eps_S - eps_T)^2) for noise predictions, a divergence of distributions for language models and classifiers. d
    is mean((f_S_l - f_T_l)^2) unless `feature_distance` is given. Each feature term is logged before and after
    multiplication by its weight alpha_l (see LevelWeights).

    The three terms are those of BK-SDM (arXiv 2305.15798), and the weights alpha_l follow LAPTOP-Diff (arXiv
    2404.11098). LAPTOP-Diff's values of w_task, w_out and w_feat are not known; the defaults are ours.

    Args:
        student: see DistillationModule.
        teacher: see DistillationModule. In a configuration, the folder or hub id of a network to distil from instead
            of the one that was pruned; null for that one.
        w_task: weight of the task loss.
        w_out: weight of the distance between the outputs.
        w_feat: weight of the sum of the feature terms.
        normalization: formula of alpha_l, one of NORMALIZATIONS.
        taps: the feature maps that are compared: `stages` (outputs of the down, middle and up blocks of a U-Net, or
            of the blocks of a transformer), `units` (outputs of the units that are kept), a list of module paths, or
            a mapping {module path of the teacher: module path of the student}.
        skip_emptied: leave out stages that have lost all their `units` (or true), as nothing in them can learn; also
            those that have lost all units with `convolutions`, though an attention may be left; or `none` (or false).
        lora: low-rank adapters. Only these are trained, and `result` merges them into the weights. None trains all
            weights.
        feature_distance: distance (student's map, teacher's map) -> scalar. The maps are float32 of shape (N,C,H,W) or
            (N,L,C), or (tokens,C) of one sample if padding is left out. None is the mean squared error.
        teacher_outputs: `live`, or `stored`: batches have the teacher's outputs ("teacher_output", of the shape of an
            output), and the teacher is not called. Needs w_feat = 0.
        timesteps: which timesteps are drawn, and how much the task and output terms of each count; feature terms are
            not weighted. None is uniform.
        drop_text: probability that a sample's caption is replaced by the empty one, for student and teacher alike (see
            `drop_captions`), so that the student learns the pass of classifier-free guidance without text.
        optimizer: see TrainedModule.
        lr_scheduler: see TrainedModule.
        seed: see TrainedModule.
        dump: see TrainedModule.
    """

    functions = ("compare_maps",)

    def __init__(
        self,
        student: NetworkBackbone,
        teacher: NetworkBackbone,
        w_task: float = 1.0,
        w_out: float = 1.0,
        w_feat: float = 1.0,
        normalization: str = "teacher_energy",
        taps: Any = "stages",
        skip_emptied: bool | str = True,
        lora: Lora | None = None,
        feature_distance: Callable[[Tensor, Tensor], Tensor] | None = None,
        teacher_outputs: str = "live",
        timesteps: Timesteps | None = None,
        drop_text: float = 0.0,
        *,
        optimizer: Optimizer,
        lr_scheduler: Schedule,
        seed: int,
        dump: Path,
    ) -> None:
        super().__init__(student, teacher, optimizer, lr_scheduler, seed, dump)
        self.w_task, self.w_out, self.w_feat = w_task, w_out, w_feat
        self.levels = pair_taps(student, teacher, taps, skip_emptied) if w_feat else {}
        if not (w_task or w_out or self.levels):
            raise ValueError(
                f"distillation.w_feat={w_feat} is the only weight above 0, and the student has none of the "
                f"feature maps of distillation.taps={taps}; choose distillation.w_task or distillation.w_out above 0"
            )
        self.feature_distance = F.mse_loss if feature_distance is None else feature_distance
        self.has_stored_outputs = teacher_outputs == "stored"
        assert not (self.has_stored_outputs and self.levels), "conf/checks.py refuses this"
        self.needs_teacher = bool(w_out or self.levels) and not self.has_stored_outputs
        self.timesteps, self.drop_text = timesteps or Timesteps(), drop_text
        self.weights = LevelWeights(normalization, len(self.levels))
        self.merge_adapters = (lambda: None) if lora is None else lora.insert(student.network, seed)

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any], teacher: NetworkBackbone, narrower: bool) -> None:
        """Raise ValueError for settings that cannot be trained with this teacher; see DistillationModule."""
        weights = [name for name in WEIGHTS if settings.get(name, 1.0)]
        if not weights:
            values = ", ".join(f"{name}={settings[name]}" for name in WEIGHTS)
            raise ValueError(
                f"distillation: {values}, so there is no loss to train on; choose a weight above 0, or "
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
                "a class whose objects can be called with two feature maps, such as "
                "{_target_: lightning_modules.losses.cosine.CosineDistance}"
            )
        LevelWeights(settings.get("normalization", "none"), 0)
        if settings.get("timesteps") is not None:
            build(settings["timesteps"]).check(teacher)
        if settings.get("drop_text") and not teacher.takes_text:
            raise ValueError(
                f"distillation.drop_text={settings['drop_text']}: a {type(teacher.network).__name__} takes no captions"
                "; choose 0"
            )
        check_skip(settings.get("skip_emptied", True))
        taps = settings.get("taps", "stages")
        if taps or "w_feat" in weights:
            check_taps(taps)
            find_teacher_taps(teacher, taps)
        if teacher.predicts_variance and "w_out" not in weights:
            log.warning(
                "distillation.w_out=%s: the student's predicted variance is not trained, as only the teacher's output "
                "teaches it; do not sample with sampler=ddpm, or set distillation.w_out above 0",
                settings.get("w_out"),
            )

    def result(self) -> NetworkBackbone:
        """Return the trained student; adapters are merged into its weights."""
        self.merge_adapters()
        return self.student

    def networks(self) -> dict[NetworkBackbone, list[nn.Module]]:
        networks = super().networks()
        for network, paths in ((self.student, self.levels.values()), (self.teacher, self.levels)):
            if network in networks:
                networks[network] = [network.network.get_submodule(path) for path in paths]
        return networks

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = self.network_inputs = draw_training_inputs(self.student, batch, self.timesteps, self.drop_text)
        modules_s = {name: self.student.network.get_submodule(path) for name, path in self.levels.items()}
        with record_features(modules_s) as maps_s:
            eps_s = self.student.predict(inputs).float()
        losses = {"task": self.student.losses(eps_s, inputs).mean()}
        total = self.w_task * losses["task"]
        if self.needs_teacher or self.has_stored_outputs:
            modules_t = {name: self.teacher.network.get_submodule(name) for name in self.levels}
            with torch.no_grad(), record_features(modules_t) as maps_t:
                eps_t = (batch["teacher_output"] if self.has_stored_outputs else self.teacher.predict(inputs)).float()
            losses["output"] = self.student.distance(eps_s, eps_t, inputs)
            total = total + self.w_out * losses["output"]
            for level, name in enumerate(self.levels):
                raw, weighted = self.compare_features(level, maps_s[name], maps_t[name], inputs.get("mask"))
                losses[f"feature/{name}"], losses[f"weighted_feature/{name}"] = raw.detach(), weighted.detach()
                total = total + self.w_feat * weighted
        return {"loss": total} | losses

    def compare_features(self, level: int, f_s: Tensor, f_t: Tensor, mask_NL: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the distance between a level's feature maps, without and with its weight: two scalars.

        If a mask says which tokens count, both are means over samples, and each sample has its own weight. The terms of
        a sample then do not depend on the number of tokens of other samples. A sample without tokens counts as 0.

        Args:
            level: index of the level.
            f_s: the student's feature map, (N,...), of any dtype.
            f_t: the teacher's feature map of the same shape.
            mask_NL: which tokens count; None if all do.

        Raises ValueError for maps of different shapes.
        """
        if f_s.shape != f_t.shape:
            name, path = list(self.levels.items())[level]
            raise ValueError(
                f"distillation.taps: the teacher's {name} gives a feature map of shape {tuple(f_t.shape)}, and the "
                f"student's {path} one of {tuple(f_s.shape)}; choose pairs of the same shape"
            )
        if mask_NL is None:
            raw, statistic = self.compare_maps(f_s, f_t)
            return raw, self.weights(level, statistic) * raw
        f_s, f_t = f_s.float(), f_t.float()
        counts = mask_NL.sum(1).tolist()
        samples = zip(f_s[mask_NL].split(counts), f_t[mask_NL].split(counts), strict=True)
        pairs = [(sample_s, sample_t) for sample_s, sample_t in samples if len(sample_s)]
        raw_N = torch.stack([self.feature_distance(*pair) for pair in pairs]) if pairs else f_s.new_zeros(0)
        maps_t = [sample_t for _, sample_t in pairs]
        weights_N = self.weights.weigh_samples(level, maps_t, raw_N.detach(), self.feature_distance)  # on all ranks
        if not pairs:
            return (nothing := 0 * f_s.sum()), nothing
        return raw_N.sum() / len(counts), (weights_N * raw_N).sum() / len(counts)

    def compare_maps(self, f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distance of two feature maps (N,...) in float32, and the statistic of its weight: two scalars.

        A compiled function keeps no copy of the maps in float32.
        """
        f_t = f_t.float()
        raw = self.feature_distance(f_s.float(), f_t)
        return raw, self.weights.measure(f_t, raw, self.feature_distance)
