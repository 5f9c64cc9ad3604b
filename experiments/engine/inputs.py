"""Builds teacher, data and batches from a configuration, for stages and for programs that score units."""

import inspect

import hydra.utils
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from conf.schema import ConfigError, build
from criteria.base import Criterion
from datamodules.base import DataModule
from datamodules.readers.base import MissingData
from experiments.engine.artefacts import digest
from experiments.engine.sweep import shares_process
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.files import find_model
from lightning_modules.backbones.other_teacher import check_other_teacher, has_same_layers
from lightning_modules.modules.sampling import seed_batches


def build_teacher(cfg: DictConfig) -> NetworkBackbone:
    """Return the teacher; its noise schedule is its own pipeline's unless the configuration gives another.

    Raises ConfigError where the configuration gives a noise schedule to a teacher that has none.
    """
    parameters = inspect.signature(hydra.utils.get_object(cfg.teacher._target_)).parameters
    if "_target_" in cfg.noise_scheduler and "noise_scheduler" not in parameters:
        raise ConfigError(
            f"noise_scheduler={cfg.noise_scheduler.get('name', '?')}: this teacher has none; leave it out"
        )
    schedule = {"noise_scheduler": build(cfg.noise_scheduler)} if "_target_" in cfg.noise_scheduler else {}
    return build(cfg.teacher, **schedule)


def build_other_teacher(cfg: DictConfig) -> NetworkBackbone:
    """Return the network at `distillation.teacher`; the options of the group `teacher` hold for it, too."""
    path = cfg.distillation.teacher
    try:
        find_model(path)
    except MissingData as error:
        raise MissingData(f"distillation.teacher={path}: {error}") from error
    return build_teacher(OmegaConf.merge(cfg, {"teacher": {"path": path}}))  # type: ignore[arg-type]


def load_distilling_teacher(cfg: DictConfig, own: NetworkBackbone) -> NetworkBackbone:
    """Return the network that a student is distilled from: `own`, which it was pruned from, or `distillation.teacher`.

    Raises ConfigError where the other one cannot teach the student, and MissingData where it is not found.
    """
    path, taps = (cfg.distillation.get(name) for name in ("teacher", "taps"))
    if path is None:
        return own
    other = build_other_teacher(cfg)
    try:
        check_other_teacher(other, own)
    except ValueError as error:
        raise ConfigError(
            f"distillation.teacher={path} cannot teach a student of teacher.path={cfg.teacher.path}: {error}; choose a "
            "network for the same inputs and outputs, or null"
        ) from error
    pairs = isinstance(taps, DictConfig) or has_same_layers(other.network, own.network)
    if cfg.distillation.get("w_feat") and not pairs:
        raise ConfigError(
            f"distillation.taps={taps}: distillation.teacher={path} has other layers than the pruned network, so that "
            "it is unknown which feature maps correspond; choose a mapping {teacher's path: student's path}, or "
            "distillation.w_feat=0"
        )
    return other


KEPT_BYTES = 2**32
"""The largest teacher that is kept for the next job of a sweep; of a larger one two copies may not fit into memory."""

_kept: dict[str, NetworkBackbone] = {}
"""{hash of configuration and files: teacher} of the jobs of a sweep in this process: at most one, never itself used"""


def load_teacher(cfg: DictConfig, teacher_id: str) -> NetworkBackbone:
    """Return the teacher of a job; jobs of a sweep that share a process read its files once, and get copies.

    A teacher of more than KEPT_BYTES is read again for each job. `teacher_id` is the fingerprint of its files.
    """
    if not shares_process():
        return build_teacher(cfg)
    settings = [OmegaConf.to_container(cfg[group], resolve=True) for group in ("teacher", "noise_scheduler")]
    key = digest([settings, teacher_id])
    if key not in _kept:
        _kept.clear()
        teacher = build_teacher(cfg)
        if sum(parameter.nbytes for parameter in teacher.network.parameters()) > KEPT_BYTES:
            return teacher
        teacher.macs()  # copies have the count
        _kept[key] = teacher
    return _kept[key].copy()


def build_data(cfg: DictConfig) -> DataModule:
    """Return the data module, which reads stored latents where `cfg.latents` names a folder of them.

    Raises ConfigError for latents of a data module that cannot read any.
    """
    data: DataModule = build(cfg.data)
    if cfg.latents is not None:
        data.use_latents(cfg.latents)
    return data


def build_calibration_data(cfg: DictConfig, data: DataModule) -> DataModule:
    """Return the data module of calibration samples: `data`, unless the configuration names another."""
    if cfg.calibration.data is None:
        return data
    calibration: DataModule = build(cfg.calibration.data)
    return calibration


def make_calibration_batches(
    cfg: DictConfig, data: DataModule, criterion: Criterion, network: NetworkBackbone
) -> DataLoader:
    """Return the batches of calibration samples.

    Args:
        cfg: the configuration of the stage.
        data: the data module of calibration samples.
        criterion: the criterion; some stop after part of the batches or weigh each batch alone. For these every batch
            is spread evenly over the samples, because the timesteps of diffusion networks follow the samples' numbers.
        network: the network that is scored.
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


def make_criterion_batches(
    criterion: Criterion, cfg: DictConfig, teacher: NetworkBackbone, data: DataModule, calibration: DataLoader | None
) -> DataLoader | None:
    """Return the batches that a criterion looks at: calibration samples, or seeds to generate samples from.

    Args:
        criterion: the criterion.
        cfg: the configuration of the stage.
        teacher: the network that is scored; one that takes text gets training captions with the seeds.
        data: the data module of calibration samples.
        calibration: the batches of calibration samples; None for a criterion that needs none.
    """
    if criterion.needs != "seeds":
        return calibration
    captions = data.captions("train", criterion.seeds) if teacher.takes_text else None
    return seed_batches(cfg.calibration.seed, criterion.seeds, cfg.calibration.batch_size, captions)


def make_held_out_batches(cfg: DictConfig, data: DataModule) -> DataLoader:
    """Return the held-out samples on which losses are measured."""
    count, seed, batch = (cfg.evaluation[key] for key in ("loss_samples", "seed", "batch_size"))
    return data.subset("holdout", count, seed, batch, field="evaluation.loss_samples")
