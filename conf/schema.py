"""The schema of a configuration: a typo, a wrong type or an impossible value fails before a model loads.

Fields that all choices of a group share are dataclasses. A node with a `_target_` is checked against the signature of
the class or function that it names, so that a class outside the repository is checked without registering it.
"""

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra.utils
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.environment import read_environment

ROOT = Path(__file__).resolve().parent.parent


PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
"""Precisions of the computation. Weights stay float32 (a `-true` half precision would round those of the teacher)."""


NOTES = ("name", "license")
"""Keys beside a `_target_` that are not passed to it."""


RESERVED = ("output_loss", "task_loss", "params", "macs", "macs_attention", "flops", "latency_ms", "weights")
"""Names of figures in metrics.json and measured.json, which `evaluation.metrics` must not use."""


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
    """auto is bf16-mixed on a GPU that has it, else 32-true; or one of PRECISIONS"""
    steps: int = MISSING
    """optimiser steps"""
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = 1.0
    checkpoint_every: int = 50
    """optimiser steps between checkpoints; the last two are kept"""
    log_every_n_steps: int = 1
    resume: str = "auto"
    """auto starts anew where there is no checkpoint; required fails there"""
    options: dict[str, Any] = field(default_factory=dict)
    """further arguments of Lightning's Trainer for training, not for scoring or evaluation: {detect_anomaly: true}"""


@dataclass
class Calibration:
    data: Any = None
    """another data set whose training samples are used, such as /data@calibration.data=bookcorpus; null: data.train"""
    samples: int = 128
    batch_size: int = 16
    seed: int = 0
    """of the choice of samples, their noise and timesteps"""
    augment: bool = False
    """augment the samples (mirror, shift) as in training"""
    precision: str = "32-true"
    memory_gib: float | None = None
    """memory for the activations of prefix reuse (output_loss, task_loss), kept by splitting batches; null: no bound"""
    compile: bool = False
    """compile the parts of the network for scoring; changes scores by rounding"""


@dataclass
class Evaluation:
    name: str = MISSING
    metrics: dict[str, Any] = field(default_factory=dict)
    """measures by name, each a `_target_`; figures show the first one. Without any, no samples are generated"""
    samples: int = 256
    resize: int | None = None
    """edge in pixels to which samples and reference images are resized before they are stored and measured"""
    prompts: Any = None
    """a `_target_` that returns a list of prompts, one per sample; null: the captions of the held-out samples"""
    tokens: int = 48
    """number of tokens with which a language model continues a prompt"""
    reference_images: int = 10000
    """maximum number of training images for measures that need more than the mean and covariance of features"""
    batch_size: int = 32
    seed: int = 0
    """of the samples, and of the noise of the joint output loss"""
    precision: str = "32-true"
    images: int | None = None
    """number of held-out images for the accuracy of a classifier, a fixed random choice; null: all"""
    loss_samples: int = 128
    """number of held-out samples for losses, and for the accuracy of a classifier after `pretrain`"""
    latency_batch: int = 16
    latency_repeats: int = 10


@dataclass
class Sampler:
    name: str = MISSING
    scheduler: Any = MISSING
    """makes a diffusers scheduler from the noise schedule's configuration"""
    steps: int = MISSING
    guidance: float = 1.0
    """scale of classifier-free guidance; 1 is none"""


@dataclass
class Export:
    dense_twin: bool = False
    """also write a network of the original architecture, with zeros in place of bypassed units"""
    push_to_hub: str | None = None
    """an id on the Hugging Face hub to push the export to; null pushes nothing"""


@dataclass
class Precompute:
    dtype: str = "float16"
    """of stored latents: float16 | float32; with float32, training has the same bits as from pictures"""
    batch_size: int = 16
    samples_per_shard: int = 1024


@dataclass
class Pipeline:
    name: str = MISSING
    stages: dict[str, Any] = field(default_factory=dict)
    """the stages by name in the order in which they run, each a `_target_`; null leaves one out"""


@dataclass
class Task:
    name: str = MISSING


@dataclass
class Logger:
    wandb: bool = False
    """one run of Weights & Biases per job"""
    project: str = "secateur"
    entity: str | None = None
    mode: str = "auto"
    """auto is online when there is a key, else offline; or online | offline"""
    loggers: dict[str, Any] = field(default_factory=dict)
    """further loggers of Lightning by name, each a `_target_`; `save_dir` is logs/ of the run's folder unless given"""


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
    """run a finished job again"""
    pipeline: Pipeline = field(default_factory=Pipeline)
    task: Task = field(default_factory=Task)
    teacher: Any = None
    criterion: Any = None
    calibration: Calibration = field(default_factory=Calibration)
    selection: Any = None
    data: Any = MISSING
    latents: str | None = None
    """folder of latents by `python -m experiments.precompute`; training then needs no VAE and no text encoder"""
    distillation: Any = None
    pretrain: Any = None
    noise_scheduler: Any = None
    sampler: Sampler = field(default_factory=Sampler)
    optimizer: Any = MISSING
    lr_scheduler: Any = MISSING
    ema_decay: float | None = 0.999
    """null switches the moving average of the weights off"""
    evaluation: Evaluation = field(default_factory=Evaluation)
    export: Export = field(default_factory=Export)
    precompute: Precompute = field(default_factory=Precompute)
    trainer: Trainer = field(default_factory=Trainer)
    callbacks: dict[str, Any] = field(default_factory=dict)
    """callbacks of Lightning for every training, by name, each a `_target_`. They are not part of the run's identity,
    so they must watch the training and not change its result"""
    logger: Logger = field(default_factory=Logger)
    paths: Paths = field(default_factory=Paths)


def register() -> None:
    """Make the schema known to Hydra, and resolvers to OmegaConf.

    They are `${root:}` (this repository's folder), `${either:a,b}` (the first that is not null), `${at_most:a,b}` (the
    smaller number), and an `${oc.env:NAME}` that notes what it reads.
    """
    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("root", lambda: str(ROOT), replace=True)
    OmegaConf.register_new_resolver("either", either, replace=True)
    OmegaConf.register_new_resolver("at_most", min, replace=True)
    OmegaConf.register_new_resolver("oc.env", read_environment, replace=True)


def either(*given: Any) -> Any:
    """Return the first value that is not null, for the names of folders; 0.0 becomes 0."""
    value = next((value for value in given if value is not None), None)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check(cfg: DictConfig) -> None:
    """Raise ConfigError for mistakes that Hydra does not find: unknown parameters of a `_target_`, types and ranges."""
    try:
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from error
    check_keys("", cfg)
    check_names(cfg)
    for group in ("criterion", "selection", "distillation", "data", "teacher", "noise_scheduler"):
        if isinstance(cfg[group], DictConfig) and "_target_" not in cfg[group]:
            unknown(group, [key for key in cfg[group] if key != "name"], ["name"])
    if cfg.calibration.data is not None and not isinstance(cfg.calibration.data, DictConfig):
        name = cfg.calibration.data
        raise ConfigError(f"calibration.data={name!r} is no data set; say +data@calibration.data={name}")
    for path, kind in (("evaluation.metrics", "measure"), ("callbacks", "callback"), ("logger.loggers", "logger")):
        for name, node in OmegaConf.select(cfg, path).items():
            if not isinstance(node, DictConfig) or "_target_" not in node:
                raise ConfigError(f"{path}.{name}={node} is no {kind}: choose a class as its _target_")
    for name in cfg.evaluation.metrics:
        if name in RESERVED:
            raise ConfigError(f"evaluation.metrics.{name}: that name is taken; choose none of: {', '.join(RESERVED)}")
    for path, node in targets(cfg):
        check_target(path, node)
    check_trainer_options(cfg.trainer.options)
    check_ranges(cfg)
    choices = {
        "trainer.accelerator": ("auto", "cpu", "gpu"),
        "trainer.resume": ("auto", "required"),
        "trainer.precision": PRECISIONS,
        "calibration.precision": PRECISIONS,
        "evaluation.precision": PRECISIONS,
        "logger.mode": ("auto", "online", "offline"),
        "precompute.dtype": ("float16", "float32"),
    }
    for path, valid in choices.items():
        if (value := OmegaConf.select(cfg, path)) not in valid:
            raise ConfigError(f"{path}={value!r} is unknown; choose one of: {', '.join(valid)}")


RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(
        (
            *("trainer.steps", "trainer.accumulate_grad_batches", "trainer.checkpoint_every", "trainer.devices"),
            *("trainer.num_nodes", "trainer.log_every_n_steps", "calibration.samples", "calibration.batch_size"),
            *("evaluation.batch_size", "evaluation.loss_samples", "evaluation.latency_batch", "data.batch_size"),
            *("evaluation.resize", "evaluation.reference_images", "evaluation.tokens", "evaluation.images"),
            *("evaluation.latency_repeats", "sampler.steps"),
            *("precompute.batch_size", "precompute.samples_per_shard"),
        ),
        (1, math.inf, "a whole number of 1 or more"),
    ),
    "calibration.memory_gib": (math.nextafter(0, 1), math.inf, "more than 0, or null for no bound"),
    "sampler.guidance": (0, math.inf, "0 or more"),
    "evaluation.samples": (2, math.inf, "a whole number of 2 or more"),
    "data.num_workers": (0, math.inf, "0 or more"),
    "ema_decay": (0, math.nextafter(1, 0), "0 <= ema_decay < 1, or null for none"),
    "trainer.gradient_clip_val": (0, math.inf, "0 or more, or null"),
    "optimizer.lr": (0, math.inf, "0 or more"),
    "lr_scheduler.num_warmup_steps": (0, math.inf, "a whole number from 0 to trainer.steps"),
    "distillation.w_task": (0, math.inf, "0 or more"),
    "distillation.w_out": (0, math.inf, "0 or more"),
    "distillation.w_feat": (0, math.inf, "0 or more"),
}
"""The lowest and the highest value of a field, and the range in words."""


LONGEST_NAME = 200
"""Bytes of a folder's name: file systems allow 255, and nine are needed for the run's id."""


def check_names(cfg: DictConfig) -> None:
    """`name` and `label` make up a run's folder below paths.runs: neither may lead out of it."""
    for key, separators, parts in (("name", "\\", cfg.name.split("/")), ("label", "/\\", [cfg.label])):
        wrong = any(part.startswith(".") or not part.strip() for part in parts) or any(
            letter in separators or not letter.isprintable() for letter in getattr(cfg, key)
        )
        if wrong:
            raise ConfigError(
                f"{key}={getattr(cfg, key)!r} is no name of a folder below paths.runs; choose one of letters, digits, "
                f"spaces and - _ + = , . that begins with no dot{' (several, joined by /)' if key == 'name' else ''}"
            )
        if any(len(part.encode()) > LONGEST_NAME for part in parts):
            raise ConfigError(f"{key} has {len(getattr(cfg, key))} characters; choose at most {LONGEST_NAME}")


def check_ranges(cfg: DictConfig) -> None:
    """Raise ConfigError for a value outside of RANGES, and for a warm-up that is longer than the training."""
    for path, (low, high, valid) in RANGES.items():
        value = OmegaConf.select(cfg, path)
        if value is not None and not (low <= value <= high and value < math.inf):
            raise ConfigError(f"{path}={value} is out of range; choose {valid}")
    warm_up, steps = OmegaConf.select(cfg, "lr_scheduler.num_warmup_steps"), cfg.trainer.steps
    if warm_up is not None and warm_up > steps:
        raise ConfigError(
            f"lr_scheduler.num_warmup_steps={warm_up} is longer than the training, trainer.steps={steps}: the learning "
            f"rate would never reach optimizer.lr; choose lr_scheduler.num_warmup_steps of {steps} or less"
        )


def check_keys(path: str, node: DictConfig) -> None:
    """Raise ConfigError for keys of dataclass nodes that are no fields; a `+` on the command line can add them."""
    kind = OmegaConf.get_type(node)
    if not dataclasses.is_dataclass(kind):
        return
    names = [field.name for field in dataclasses.fields(kind)]
    unknown(path, [key for key in node if key not in names], names)
    for name in names:
        if isinstance(node[name], DictConfig):
            check_keys(f"{path}.{name}" if path else name, node[name])


def unknown(path: str, keys: list[Any], there: Iterable[str]) -> None:
    """Raise ConfigError for the first of some unknown keys, with the nearest valid one."""
    for key in keys:
        close = difflib.get_close_matches(str(key), list(there), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"{f'{path}.' if path else ''}{key} is unknown; {hint}there are: {', '.join(there)}")


def targets(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the node of every `_target_`."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in node:
            yield from targets(node[key], f"{path}.{key!s}" if path else str(key))
    elif isinstance(node, ListConfig):
        for index, item in enumerate(node):
            yield from targets(item, f"{path}.{index}")


def check_target(path: str, node: Any) -> None:
    """Raise ConfigError unless the keys of a node are parameters of its `_target_`, with values of their types."""
    try:
        target = hydra.utils.get_object(node._target_)
        parameters = dict(inspect.signature(target).parameters)
    except Exception as error:
        raise ConfigError(f"{path}._target_={node._target_!r} cannot be imported: {error}") from error
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    given = {str(key): value for key, value in node.items() if key not in NOTES and not str(key).startswith("_")}
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if open_ended and inspect.isclass(getattr(target, "__self__", None)):  # Scheduler.from_config(config, **fields)
        parameters |= inspect.signature(target.__self__).parameters
        open_ended = False
    if path == "criterion" and "level" in given and not open_ended and "level" not in parameters:
        raise ConfigError(
            f"criterion={node.name} takes no criterion.level={given['level']!r}, as its units are of one kind; choose "
            "one that does, such as: bottleneck, magnitude, taylor, random"
        )
    if not open_ended:
        unknown(path, [key for key in given if key not in parameters], parameters)
    for key, value in given.items():
        hint = hints.get(key, Any)
        if not fits(value, hint):
            name = hint.__name__ if inspect.isclass(hint) else str(hint)
            raise ConfigError(f"{path}.{key}={value!r} is of the wrong type: {node._target_} takes {name}")


PROJECT_ARGUMENTS = (
    *(
        "accelerator",
        "devices",
        "num_nodes",
        "strategy",
        "precision",
        "deterministic",
        "plugins",
        "callbacks",
        "logger",
    ),
    *("enable_model_summary", "enable_checkpointing", "use_distributed_sampler", "default_root_dir", "max_epochs"),
    *("max_steps", "limit_train_batches", "limit_val_batches", "accumulate_grad_batches", "gradient_clip_val"),
    *("log_every_n_steps", "num_sanity_val_steps"),
)
"""Arguments of Lightning's Trainer that this project sets in a training, from other fields or on its own."""


def check_trainer_options(options: DictConfig) -> None:
    """Raise ConfigError for a name that Lightning's Trainer does not know, or that the project sets itself."""
    for name, value in options.items():
        if name in PROJECT_ARGUMENTS:
            raise ConfigError(
                f"trainer.options.{name}={value}: this project sets it from another field or on its own; choose none "
                f"of: {', '.join(PROJECT_ARGUMENTS)}"
            )
    if options:  # else Lightning need not be imported yet
        check_target("trainer.options", OmegaConf.create({"_target_": "pytorch_lightning.Trainer", **options}))


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value from YAML can be an argument with this annotation; types unknown to YAML always pass."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (list, tuple):
        if not isinstance(value, list | ListConfig) or (
            origin is tuple and ... not in arguments and len(value) != len(arguments)
        ):
            return False
        each = arguments * len(value) if origin is list else [a for a in arguments if a is not ...] * len(value)
        return all(fits(item, kind) for item, kind in zip(value, each, strict=False))
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    return not (inspect.isclass(hint) and hint.__name__ == "Tensor")


def build(node: DictConfig, **extra: Any) -> Any:
    """Return the object of a `_target_` node, with plain Python values; nodes inside it are instantiated first."""
    return hydra.utils.instantiate(without_names(OmegaConf.to_container(node, resolve=True)), _convert_="all", **extra)


def without_names(content: Any) -> Any:
    """Return content without the NOTES beside a `_target_`, which are for tables and model cards."""
    if isinstance(content, dict):
        return {
            key: without_names(value) for key, value in content.items() if key not in NOTES or "_target_" not in content
        }
    return [without_names(value) for value in content] if isinstance(content, list) else content
