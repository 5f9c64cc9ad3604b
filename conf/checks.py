"""Checks of a configuration: a typo, a wrong type or an impossible value fails before a model loads.

Hydra itself checks the fields of the dataclasses in schema.py. A node with a `_target_` is checked here against the
signature of the class or function that it names, so that a class outside the repository needs no registration.
"""

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

import hydra.utils
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema import CHECKPOINT_ACTIVATIONS, NOTES, PRECISIONS, RESERVED, STRATEGIES, ConfigError

CHOSEN_GROUPS = (
    *("criterion", "selection", "repair", "distillation"),
    *("data", "teacher", "noise_scheduler", "timesteps"),
)
"""Groups whose choices have a `_target_`, or nothing but a name."""


def check_config(cfg: DictConfig) -> None:
    """Raise ConfigError for what Hydra does not check: parameters of a `_target_` and their types, ranges, choices."""
    check_values(cfg)
    check_targets(cfg)


def check_targets(cfg: DictConfig) -> None:
    """Raise ConfigError for keys that are no parameters of a node's `_target_`, and for values of the wrong type.

    It imports what the `_target_`s name, and so torch.
    """
    for path, node in iterate_targets(cfg):
        check_target(path, node)
    check_trainer_options(cfg.trainer.options)


def check_values(cfg: DictConfig) -> None:
    """Raise ConfigError for what the configuration alone shows: missing values, unknown keys, ranges, choices."""
    try:
        content = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error)) from error
    check_keys("", cfg)
    check_names(cfg)
    refuse_pipeline_arguments(cfg)
    for group in CHOSEN_GROUPS:
        if isinstance(cfg[group], DictConfig) and "_target_" not in cfg[group]:
            refuse_unknown_keys(group, [key for key in cfg[group] if key != "name"], ["name"])
    if cfg.calibration.data is not None and not isinstance(cfg.calibration.data, DictConfig):
        name = cfg.calibration.data
        raise ConfigError(f"calibration.data={name!r} is no data set; choose one with +data@calibration.data={name}")
    for path, kind in (("evaluation.metrics", "measure"), ("callbacks", "callback"), ("logger.loggers", "logger")):
        for name, node in OmegaConf.select(cfg, path).items():
            if not isinstance(node, DictConfig) or "_target_" not in node:
                raise ConfigError(f"{path}.{name}={node} is no {kind}: choose a class as its _target_")
    for name in cfg.evaluation.metrics:
        if name in RESERVED:
            raise ConfigError(f"evaluation.metrics.{name}: that name is taken; choose none of: {', '.join(RESERVED)}")
    check_ranges(content)
    check_distilling_teacher(content)
    check_teacher_outputs(content)
    check_timesteps(content)
    choices = {
        "trainer.accelerator": ("auto", "cpu", "gpu"),
        "trainer.strategy": STRATEGIES,
        "trainer.resume": ("auto", "required"),
        "trainer.precision": PRECISIONS,
        "trainer.checkpoint_activations": CHECKPOINT_ACTIVATIONS,
        "calibration.precision": PRECISIONS,
        "evaluation.precision": PRECISIONS,
        "logger.mode": ("auto", "online", "offline"),
        "precompute.dtype": ("float16", "float32"),
    }
    for path, valid in choices.items():
        if (value := select(content, path)) not in valid:
            raise ConfigError(f"{path}={value!r} is unknown; choose one of: {', '.join(valid)}")
    if cfg.trainer.strategy == "fsdp":
        check_sharding(cfg.trainer)


PIPELINE_ARGUMENTS = {
    "distillation": ("student", "teacher", "optimizer", "lr_scheduler", "seed", "dump"),
    "pretrain": ("optimizer", "lr_scheduler", "seed", "dump"),
    "optimizer": ("params",),
    "lr_scheduler": ("optimizer",),
    "teacher": ("noise_scheduler",),
    "sampler.scheduler": ("config",),
}
"""Arguments that the pipeline passes to what a node names, by the path of the node. One of them is a field as well:
`distillation.teacher` names another network for it."""


def refuse_pipeline_arguments(cfg: DictConfig) -> None:
    """Raise ConfigError for a key that names one of the PIPELINE_ARGUMENTS, as its value would not be used."""
    for path, names in PIPELINE_ARGUMENTS.items():
        node = OmegaConf.select(cfg, path)
        for name in names if isinstance(node, DictConfig) and "_target_" in node else ():
            if name in node and (path, name) != ("distillation", "teacher"):
                raise ConfigError(f"{path}.{name}={node[name]}: the pipeline passes {name} itself; remove the key")


def check_distilling_teacher(content: Any) -> None:
    """Raise ConfigError for a `distillation.teacher` that is no path; `content` are plain values of a configuration."""
    path = select(content, "distillation.teacher")
    if path is not None and not (isinstance(path, str) and path):
        raise ConfigError(
            f"distillation.teacher={path!r} names no network; choose a folder or hub id, or null for the network that "
            "is pruned"
        )


def check_sharding(trainer: DictConfig) -> None:
    """Raise ConfigError for what networks that are distributed over ranks cannot be trained with."""
    if trainer.precision == "16-mixed":
        raise ConfigError(
            "trainer.precision='16-mixed': with trainer.strategy='fsdp' each rank would scale its own gradients; "
            "choose bf16-mixed, 32-true or auto"
        )
    if trainer.compile:
        raise ConfigError(
            "trainer.compile=true: with trainer.strategy='fsdp' weights are gathered inside the functions that would "
            "be compiled; choose trainer.compile=false, or trainer.strategy=ddp"
        )


RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(
        (
            *("trainer.steps", "trainer.accumulate_grad_batches", "trainer.checkpoint_every", "trainer.devices"),
            *("trainer.num_nodes", "trainer.log_every_n_steps", "calibration.samples", "calibration.batch_size"),
            *("evaluation.batch_size", "evaluation.loss_samples", "evaluation.latency_batch", "data.batch_size"),
            *("evaluation.resize", "evaluation.reference_images", "evaluation.tokens", "evaluation.images"),
            *("evaluation.every_n_steps", "evaluation.latency_repeats", "sampler.steps", "distillation.ddim_steps"),
            *("precompute.batch_size", "precompute.samples_per_shard"),
        ),
        (1, math.inf, "a whole number of 1 or more"),
    ),
    "calibration.memory_gib": (math.nextafter(0, 1), math.inf, "more than 0, or null for no bound"),
    "sampler.guidance": (0, math.inf, "0 or more"),
    "selection.ratio": (
        math.nextafter(0, 1),
        math.nextafter(1, 0),
        "0 < ratio < 1 (a fraction, not a percentage)",
    ),
    **dict.fromkeys(
        ("evaluation.samples", "evaluation.training_samples"), (2, math.inf, "a whole number of 2 or more")
    ),
    **dict.fromkeys(("data.num_workers", "precompute.teacher_draws"), (0, math.inf, "a whole number of 0 or more")),
    "ema_decay": (0, math.nextafter(1, 0), "0 <= ema_decay < 1, or null for none"),
    "trainer.gradient_clip_val": (0, math.inf, "0 or more, or null"),
    "optimizer.lr": (0, math.inf, "0 or more"),
    "lr_scheduler.num_warmup_steps": (0, math.inf, "a whole number from 0 to trainer.steps"),
    "distillation.w_task": (0, math.inf, "0 or more"),
    "distillation.w_out": (0, math.inf, "0 or more"),
    "distillation.w_feat": (0, math.inf, "0 or more"),
    "distillation.drop_text": (0, 1, "a probability, 0 to 1"),
    "distillation.guidance_embedding": (4, math.inf, "a whole number of 4 or more, or null"),
    "distillation.guidance_min": (1, math.inf, "1 (no guidance) or more"),
    "distillation.guidance_max": (1, math.inf, "1 (no guidance) or more"),
    "distillation.target_decay": (0, math.nextafter(1, 0), "0 <= target_decay < 1, or null for the student itself"),
    "distillation.huber": (math.nextafter(0, 1), math.inf, "more than 0, or null for the mean squared error"),
}
"""{field: (lowest value, highest value, the range in words)}"""


LONGEST_NAME = 200
"""Maximum number of bytes in the name of a folder: file systems allow 255, and the run's id needs nine of them."""


def check_names(cfg: DictConfig) -> None:
    """Raise ConfigError for a `name` or `label`, the parts of a run's folder, that would lead out of paths.runs."""
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


def select(content: Any, path: str) -> Any:
    """Return the value at "outer.inner" in plain values of a configuration; None where there is none."""
    for key in path.split("."):
        content = content.get(key) if isinstance(content, dict) else None
    return content


def check_ranges(content: Any) -> None:
    """Raise ConfigError for a value outside of RANGES, steps of `sampler` that repeat, and a too long warm-up.

    `content` are the plain values of a configuration.
    """
    for path, (low, high, valid) in RANGES.items():
        value = select(content, path)
        is_number = isinstance(value, int | float)  # check_targets refuses another type
        if is_number and not (low <= value <= high and value < math.inf):
            raise ConfigError(f"{path}={value} is out of range; choose {valid}")
    steps, also = content["sampler"]["steps"], content["sampler"]["also_steps"]
    if min(also, default=1) < 1 or len({steps, *also}) <= len(also):
        valid = "different whole numbers of 1 or more, without that of sampler.steps"
        raise ConfigError(f"sampler.also_steps={also} with sampler.steps={steps}; choose {valid}")
    warm_up, steps = select(content, "lr_scheduler.num_warmup_steps"), content["trainer"]["steps"]
    if isinstance(warm_up, int | float) and warm_up > steps:
        raise ConfigError(
            f"lr_scheduler.num_warmup_steps={warm_up} is longer than the training, trainer.steps={steps}: the learning "
            f"rate would never reach optimizer.lr; choose lr_scheduler.num_warmup_steps of {steps} or less"
        )


def check_teacher_outputs(content: Any) -> None:
    """Raise ConfigError where the teacher's outputs are to be read from a folder, or stored, and cannot be.

    `content` are the plain values of a configuration.
    """
    if content["precompute"]["teacher_draws"] and content["pretrain"] is not None:
        raise ConfigError(
            f"precompute.teacher_draws={content['precompute']['teacher_draws']}: a pretraining has no teacher; choose 0"
        )
    choice = select(content, "distillation.teacher_outputs")
    if choice not in (None, "live", "stored"):
        raise ConfigError(f"distillation.teacher_outputs={choice!r} is unknown; choose one of: live, stored")
    if choice != "stored":
        return
    if features := select(content, "distillation.w_feat"):
        raise ConfigError(
            f"distillation.w_feat={features}: feature maps of the teacher are not stored, so that they need "
            "distillation.teacher_outputs=live, not stored; choose that, or distillation.w_feat=0 (as in "
            "distillation=output_only)"
        )
    if select(content, "distillation.w_out") == 0:
        raise ConfigError(
            "distillation.w_out=0: no term of the loss uses the teacher's outputs; choose "
            "distillation.teacher_outputs=live, or distillation.w_out above 0"
        )
    if select(content, "distillation.timesteps.distribution") is not None:
        raise ConfigError(
            f"timesteps={content['timesteps']['name']}: the outputs for distillation.teacher_outputs='stored' are "
            "those at uniform timesteps; choose timesteps=uniform or one that only weighs, or "
            "distillation.teacher_outputs=live"
        )
    if drop_text := select(content, "distillation.drop_text"):
        raise ConfigError(
            f"distillation.drop_text={drop_text}: the outputs for distillation.teacher_outputs='stored' are those for "
            "the samples' own captions; choose distillation.drop_text=0, or distillation.teacher_outputs=live"
        )
    if content["latents"] is None:
        raise ConfigError(
            "distillation.teacher_outputs='stored', but latents=null: the outputs lie beside stored latents; choose "
            "latents=FOLDER, which python -m experiments.precompute fills with precompute.teacher_draws=8 (or another "
            "number), or distillation.teacher_outputs=live"
        )


def check_timesteps(content: Any) -> None:
    """Raise ConfigError where timesteps are chosen and the module that is trained does not take the choice.

    `content` are the plain values of a configuration.
    """
    chosen = content["timesteps"]
    group = "distillation" if content["pretrain"] is None else "pretrain"
    if not chosen or chosen.get("distribution") is chosen.get("weight") is None:
        return
    if "_target_" in content[group] and not content[group].get("timesteps"):
        raise ConfigError(
            f"timesteps={chosen['name']}: {content[group]['_target_']} does not take timesteps; choose "
            f"timesteps=uniform, or give the class a parameter `timesteps` and its file `timesteps: ${{timesteps}}`"
        )


def check_keys(path: str, node: DictConfig) -> None:
    """Raise ConfigError for keys of dataclass nodes that are not fields; a `+` on the command line can add some."""
    kind = OmegaConf.get_type(node)
    if not dataclasses.is_dataclass(kind):
        return
    names = [field.name for field in dataclasses.fields(kind)]
    refuse_unknown_keys(path, [key for key in node if key not in names], names)
    for name in names:
        if isinstance(node[name], DictConfig):
            check_keys(f"{path}.{name}" if path else name, node[name])


def refuse_unknown_keys(path: str, unknown: list[Any], valid: Iterable[str]) -> None:
    """Raise ConfigError for the first of the unknown keys of the node at `path`, if any, with the nearest valid key."""
    for key in unknown:
        close = difflib.get_close_matches(str(key), list(valid), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"{f'{path}.' if path else ''}{key} is unknown; {hint}there are: {', '.join(valid)}")


def iterate_targets(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, node) of every node below `node` that has a `_target_`."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in node:
            yield from iterate_targets(node[key], f"{path}.{key!s}" if path else str(key))
    elif isinstance(node, ListConfig):
        for index, item in enumerate(node):
            yield from iterate_targets(item, f"{path}.{index}")


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
        refuse_unknown_keys(path, [key for key in given if key not in parameters], parameters)
    for key, value in given.items():
        hint = hints.get(key, Any)
        if not fits_annotation(value, hint):
            name = hint.__name__ if inspect.isclass(hint) else str(hint)
            raise ConfigError(f"{path}.{key}={value!r} is of the wrong type: {node._target_} takes {name}")


PROJECT_ARGUMENTS = (
    *("accelerator", "devices", "num_nodes", "strategy", "precision", "deterministic", "benchmark"),
    *(
        "plugins",
        "callbacks",
        "logger",
        "enable_model_summary",
        "enable_checkpointing",
        "use_distributed_sampler",
        "default_root_dir",
    ),
    *(
        "max_epochs",
        "max_steps",
        "limit_train_batches",
        "limit_val_batches",
        "accumulate_grad_batches",
        "gradient_clip_val",
    ),
    *("log_every_n_steps", "num_sanity_val_steps"),
)
"""Arguments of Lightning's Trainer that this project itself sets for a training, some of them from other fields."""


def check_trainer_options(options: DictConfig) -> None:
    """Raise ConfigError for an argument that Lightning's Trainer does not have, or that this project sets itself."""
    for name, value in options.items():
        if name in PROJECT_ARGUMENTS:
            raise ConfigError(
                f"trainer.options.{name}={value}: this project sets it from another field or on its own; choose none "
                f"of: {', '.join(PROJECT_ARGUMENTS)}"
            )
    if options:  # without options, Lightning need not be imported yet
        check_target("trainer.options", OmegaConf.create({"_target_": "pytorch_lightning.Trainer", **options}))


def fits_annotation(value: Any, hint: Any) -> bool:
    """Tell whether a value from YAML can be an argument with this annotation; types that YAML lacks always fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits_annotation(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is dict:
        return isinstance(value, dict | DictConfig) and all(
            fits_annotation(item, arguments[1]) for item in value.values()
        )
    if origin in (list, tuple):
        if not isinstance(value, list | ListConfig) or (
            origin is tuple and ... not in arguments and len(value) != len(arguments)
        ):
            return False
        each = arguments * len(value) if origin is list else [a for a in arguments if a is not ...] * len(value)
        return all(fits_annotation(item, kind) for item, kind in zip(value, each, strict=False))
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    return not (inspect.isclass(hint) and hint.__name__ == "Tensor")
