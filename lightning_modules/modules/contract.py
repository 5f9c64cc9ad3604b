"""The contract between the pipeline and the modules that it trains, checked before anything expensive runs."""

import inspect
import typing
from typing import Any

import hydra.utils
import pytorch_lightning as pl
from omegaconf import DictConfig

from conf.checks import PIPELINE_ARGUMENTS
from conf.schema import ConfigError

PIPELINE_METHODS = {"distillation": ("result",), "pretrain": ("save",)}
"""Methods that the pipeline calls in addition to those of a LightningModule, by group."""

REQUIREMENTS = {
    "distillation": "a LightningModule, such as a subclass of DistillationModule, whose constructor takes the keyword "
    "arguments student, teacher, optimizer, lr_scheduler, seed and dump, and whose result() returns the trained "
    "NetworkBackbone",
    "pretrain": "a LightningModule, such as a subclass of TrainedModule, whose constructor takes the keyword arguments "
    "optimizer, lr_scheduler, seed and dump, whose save(folder) writes the weights, and whose test loop sets "
    "`metrics`, a dictionary",
}
"""What the pipeline requires of a module, by the group that names it."""


def check_module(node: DictConfig, group: str) -> None:
    """Raise ConfigError, which states the requirements, if the pipeline could not train the module that a node names.

    Nothing is constructed. If `_target_` is a function that returns a module, its annotated return type is checked.

    Args:
        node: the part of the configuration with the module's `_target_`.
        group: "distillation" or "pretrain".
    """
    target: Any = hydra.utils.get_object(node._target_)
    parameters = inspect.signature(target).parameters.values()
    names = [parameter.name for parameter in parameters]
    takes_any_argument = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    missing_arguments = [] if takes_any_argument else [n for n in PIPELINE_ARGUMENTS[group] if n not in names]
    cls: Any = target if inspect.isclass(target) else typing.get_type_hints(target).get("return")
    is_known = inspect.isclass(cls)  # a function may have no annotation
    missing_methods = [name for name in PIPELINE_METHODS[group] if is_known and not hasattr(cls, name)]
    if not node.get("_partial_"):
        fault = "`_partial_: true` is missing beside it"
    elif is_known and not issubclass(cls, pl.LightningModule):
        fault = f"{cls.__name__} is no LightningModule"
    elif missing_arguments:
        fault = f"it does not take the argument {', '.join(missing_arguments)}"
    elif missing_methods:
        fault = f"it has no method {', '.join(missing_methods)}"
    else:
        return
    raise ConfigError(
        f"{group}._target_={node._target_!r} cannot be trained: {fault}. It has to be {REQUIREMENTS[group]}"
    )
