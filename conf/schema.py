"""The shape of a configuration: what makes a typo, a wrong type or an impossible value fail before a model loads.

Fields that every choice of a group shares are dataclasses. A node with a `_target_` is checked against the signature
of what it names, so that a class of a user's own gets the same checks without registering anything.
"""

import dataclasses
import difflib
import inspect
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra.utils
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parent.parent


class ConfigError(ValueError):
    """A configuration that cannot be run: the message names the field, its value and the valid choices."""


@dataclass
class Trainer:
    accelerator: str = "auto"
    """auto | cpu | gpu"""
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    """a strategy of Lightning's: auto, ddp, fsdp"""
    precision: str = "auto"
    """auto is bf16-mixed on a GPU that has it, else 32-true; or any precision of Lightning's"""
    steps: int = MISSING
    """optimiser steps"""
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = 1.0
    checkpoint_every: int = 50
    """optimiser steps between checkpoints; the last two are kept"""
    log_every_n_steps: int = 1
    resume: str = "auto"
    """auto may start afresh and says so; required fails when there is no checkpoint"""


@dataclass
class Calibration:
    samples: int = 128
    batch_size: int = 16
    seed: int = 0
    """which samples, their noise and timesteps"""
    precision: str = "32-true"


@dataclass
class Evaluation:
    name: str = MISSING
    metric: Any = None
    """the Frechet distance to compute; null generates nothing"""
    samples: int = 256
    batch_size: int = 32
    seed: int = 0
    """of the samples, and of the noise under which the joint output loss is measured"""
    precision: str = "32-true"
    loss_samples: int = 128
    """held-out samples on which losses are measured (and, of a classifier, the accuracy)"""
    latency_batch: int = 16
    latency_repeats: int = 10


@dataclass
class Logger:
    wandb: bool = True
    project: str = "secateur"
    entity: str | None = None
    mode: str = "auto"
    """auto is online when there is a key, else offline; or online | offline"""


@dataclass
class Paths:
    runs: str = "${root:}/runs"
    cache: str = "${.runs}/.cache"
    """scores, teacher evaluations and fingerprints, shared by all runs"""


@dataclass
class Config:
    name: str = "prune"
    """the folder of the run under paths.runs: a study"""
    label: str = MISSING
    """the readable part of the run directory"""
    seed: int = 0
    """training: data order, noise, initialisation"""
    force: bool = False
    """run again what is finished"""
    pipeline: Any = MISSING
    task: Any = MISSING
    teacher: Any = None
    criterion: Any = None
    calibration: Calibration = field(default_factory=Calibration)
    selection: Any = None
    data: Any = MISSING
    distillation: Any = None
    pretrain: Any = None
    noise_scheduler: Any = None
    sampler: Any = None
    optimizer: Any = MISSING
    lr_scheduler: Any = MISSING
    ema_decay: float | None = 0.999
    """null switches the moving average of the weights off"""
    evaluation: Evaluation = field(default_factory=Evaluation)
    trainer: Trainer = field(default_factory=Trainer)
    logger: Logger = field(default_factory=Logger)
    paths: Paths = field(default_factory=Paths)


def register() -> None:
    """Make the schema known to Hydra, and `${root:}` (this repository's folder) to OmegaConf."""
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("root", lambda: str(ROOT), replace=True)


def check(cfg: DictConfig) -> None:
    """Raise ConfigError for what composing could not see: unknown parameters of a `_target_`, types, ranges."""
    try:
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from error
    for path, node in targets(cfg):
        check_target(path, node)
    for path, value, valid in positive(cfg):
        if not value > 0 or not math.isfinite(value):
            raise ConfigError(f"{path}={value} is out of range; choose {valid}")
    if cfg.trainer.resume not in ("auto", "required"):
        raise ConfigError(f"trainer.resume={cfg.trainer.resume!r} is unknown; choose one of: auto, required")
    if cfg.logger.mode not in ("auto", "online", "offline"):
        raise ConfigError(f"logger.mode={cfg.logger.mode!r} is unknown; choose one of: auto, online, offline")


def positive(cfg: DictConfig) -> Iterator[tuple[str, float, str]]:
    fields = {
        "trainer": ("steps", "accumulate_grad_batches", "checkpoint_every", "devices"),
        "calibration": ("samples", "batch_size"),
        "evaluation": ("samples", "batch_size", "loss_samples", "latency_batch", "latency_repeats"),
        "data": ("batch_size",),
    }
    for group, names in fields.items():
        for name in names:
            if name in cfg[group]:
                yield f"{group}.{name}", cfg[group][name], "a whole number of 1 or more"


def targets(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every node with a `_target_`, and where it is."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in node:
            yield from targets(node[key], f"{path}.{key!s}" if path else str(key))
    elif isinstance(node, ListConfig):
        for index, item in enumerate(node):
            yield from targets(item, f"{path}.{index}")


def check_target(path: str, node: Any) -> None:
    """The keys of a node are parameters of its `_target_`, with values of the annotated types."""
    try:
        target = hydra.utils.get_object(node._target_)
        parameters = dict(inspect.signature(target).parameters)
    except Exception as error:
        raise ConfigError(f"{path}._target_={node._target_!r} cannot be imported: {error}") from error
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    given = {key: value for key, value in node.items() if key != "name" and not str(key).startswith("_")}
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if open_ended and inspect.isclass(getattr(target, "__self__", None)):  # Scheduler.from_config(config, **fields)
        parameters |= inspect.signature(target.__self__).parameters
        open_ended = False
    for key in given:
        if key not in parameters and not open_ended:
            close = difflib.get_close_matches(str(key), parameters, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(
                f"{path}.{key} is not a parameter of {node._target_}; {hint}it has: {', '.join(parameters)}"
            )
    plain = {str(key): hints[str(key)] for key in given if is_plain(hints.get(str(key)))}
    typed = dataclasses.make_dataclass(
        "Parameters", [(key, hint, field(default=MISSING)) for key, hint in plain.items()]
    )
    for key in plain:
        try:
            OmegaConf.merge(OmegaConf.structured(typed), {key: given[key]})
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{path}.{key}={given[key]!r} is of the wrong type: {reason}") from error


def is_plain(hint: Any) -> bool:
    """Types that OmegaConf can check."""
    if hint in (int, float, bool, str):
        return True
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return arguments in ((int,), (float,), (str,))
    return len(arguments) == 2 and type(None) in arguments and arguments[0] in (int, float, bool, str)


def build(node: DictConfig, **extra: Any) -> Any:
    """Instantiate a `_target_` node, and those inside it, with plain Python values."""
    return hydra.utils.instantiate(without_names(OmegaConf.to_container(node, resolve=True)), _convert_="all", **extra)


def without_names(content: Any) -> Any:
    """The `name` beside a `_target_` is for people and tables, not a parameter."""
    if isinstance(content, dict):
        return {
            key: without_names(value) for key, value in content.items() if key != "name" or "_target_" not in content
        }
    return [without_names(value) for value in content] if isinstance(content, list) else content
