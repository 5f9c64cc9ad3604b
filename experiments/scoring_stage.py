"""What every program that scores units needs: the teacher as configured, and the batches that a criterion asks for."""

from typing import Any

from omegaconf import DictConfig
from torch.utils.data import DataLoader

from conf.schema import build
from criteria.base import Criterion
from lightning_modules.backbones.diffusion import DiffusionBackbone
from lightning_modules.evaluation import seeds


def teacher_of(cfg: DictConfig) -> DiffusionBackbone:
    """The teacher, under the noise schedule of its own pipeline unless the configuration gives another."""
    schedule = build(cfg.noise_scheduler) if "_target_" in cfg.noise_scheduler else None
    return build(cfg.teacher, noise_scheduler=schedule)


def batches_for(
    criterion: Criterion, cfg: DictConfig, teacher: DiffusionBackbone, data: Any, calibration: DataLoader
) -> DataLoader:
    """The calibration batches, or those of seeds, with training captions where the teacher takes text."""
    if criterion.needs != "seeds":
        return calibration
    captions = data.source("train").captions if teacher.takes_text else None
    return seeds(cfg.calibration.seed, criterion.seeds, cfg.calibration.batch_size, captions)
