"""Teacher, data and calibration batches as configured, for stages and for programs that score units."""

import inspect

import hydra.utils
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from conf.schema import ConfigError, build
from criteria.base import Criterion
from datamodules.base import DataModule
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.modules.sampling import seed_batches


def teacher_of(cfg: DictConfig) -> NetworkBackbone:
    """Return the teacher, under the noise schedule of its own pipeline unless the configuration gives another."""
    parameters = inspect.signature(hydra.utils.get_object(cfg.teacher._target_)).parameters
    if "_target_" in cfg.noise_scheduler and "noise_scheduler" not in parameters:
        raise ConfigError(
            f"noise_scheduler={cfg.noise_scheduler.get('name', '?')}: this teacher has none; leave it out"
        )
    schedule = {"noise_scheduler": build(cfg.noise_scheduler)} if "_target_" in cfg.noise_scheduler else {}
    return build(cfg.teacher, **schedule)


def data_of(cfg: DictConfig) -> DataModule:
    """Return the data module; its samples are stored latents where `latents` names some."""
    data: DataModule = build(cfg.data)
    if cfg.latents is not None:
        data.use_latents(cfg.latents)
    return data


def calibration_data(cfg: DictConfig, data: DataModule) -> DataModule:
    """Return the data module of calibration samples: `data`, unless the configuration names another."""
    if cfg.calibration.data is None:
        return data
    calibration: DataModule = build(cfg.calibration.data)
    return calibration


def calibration_batches(
    cfg: DictConfig, data: DataModule, criterion: Criterion, network: NetworkBackbone
) -> DataLoader:
    """Return the batches of calibration samples.

    They are spread evenly over the samples where a part of the batches has to speak for all: timesteps of diffusion
    networks go with the samples' numbers.
    """
    calibration = cfg.calibration
    return data.subset(
        "train",
        calibration.samples,
        calibration.seed,
        calibration.batch_size,
        spread=criterion.spreads_batches(network),
        augment=calibration.augment,
        field="calibration.samples",
    )


def batches_for(
    criterion: Criterion, cfg: DictConfig, teacher: NetworkBackbone, data: DataModule, calibration: DataLoader | None
) -> DataLoader | None:
    """Return the calibration batches, or those of seeds, with training captions where the teacher takes text."""
    if criterion.needs != "seeds":
        return calibration
    captions = data.captions("train", criterion.seeds) if teacher.takes_text else None
    return seed_batches(cfg.calibration.seed, criterion.seeds, cfg.calibration.batch_size, captions)


def held_out(cfg: DictConfig, data: DataModule) -> DataLoader:
    """Return the held-out samples on which losses are measured."""
    count, seed, batch = (cfg.evaluation[key] for key in ("loss_samples", "seed", "batch_size"))
    return data.subset("holdout", count, seed, batch, field="evaluation.loss_samples")
