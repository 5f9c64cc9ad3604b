"""What every program that scores units needs: teacher and data as configured, and the batches of a criterion."""

import inspect
from typing import Any

import hydra.utils
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from conf.schema import ConfigError, build
from criteria.base import Criterion
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.modules.sampling import seeds


def teacher_of(cfg: DictConfig) -> NetworkBackbone:
    """The teacher, under the noise schedule of its own pipeline unless the configuration gives another."""
    parameters = inspect.signature(hydra.utils.get_object(cfg.teacher._target_)).parameters
    if "_target_" in cfg.noise_scheduler and "noise_scheduler" not in parameters:
        raise ConfigError(
            f"noise_scheduler={cfg.noise_scheduler.get('name', '?')}: this teacher has none; leave it out"
        )
    schedule = {"noise_scheduler": build(cfg.noise_scheduler)} if "_target_" in cfg.noise_scheduler else {}
    return build(cfg.teacher, **schedule)


def data_of(cfg: DictConfig) -> Any:
    """The data as configured, its samples as stored latents where `latents` names some."""
    data = build(cfg.data)
    if cfg.latents is not None:
        if not hasattr(data, "use_latents"):
            raise ConfigError(f"latents={cfg.latents}: {type(data).__name__} has no use_latents; choose latents=null")
        data.use_latents(cfg.latents)
    return data


def batches_for(
    criterion: Criterion, cfg: DictConfig, teacher: NetworkBackbone, data: Any, calibration: DataLoader | None
) -> DataLoader | None:
    """The calibration batches, or those of seeds, with training captions where the teacher takes text."""
    if criterion.needs != "seeds":
        return calibration
    captions = data.captions("train", criterion.seeds) if teacher.takes_text else None
    return seeds(cfg.calibration.seed, criterion.seeds, cfg.calibration.batch_size, captions)
