"""Base classes of the modules that are trained, and the contract that the pipeline checks before it trains one.

The noise of a training step is a function of its position, and no step is taken on a loss that is not finite.
"""

import contextlib
import inspect
import json
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import hydra.utils
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from conf.schema import ConfigError
from datamodules.seeding import derive
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.nested import tensors_by_path
from lightning_modules.training.ranks import DrawsForGlobalBatch, mean_over_ranks, world_size

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Schedule = Callable[[torch.optim.Optimizer], Any]

FILLED = {
    "distillation": ("student", "teacher", "optimizer", "lr_scheduler", "seed", "dump"),
    "pretrain": ("optimizer", "lr_scheduler", "seed", "dump"),
}
"""Constructor arguments of a trained module that the pipeline passes by keyword, by the group that names the module."""

METHODS = {"distillation": ("result",), "pretrain": ("save",)}
"""Methods that the pipeline calls, beside those of a LightningModule."""

CONTRACT = {
    "distillation": "a LightningModule, such as a subclass of DistillationModule, whose constructor takes the keyword "
    "arguments student, teacher, optimizer, lr_scheduler, seed and dump, and whose result() returns the trained "
    "NetworkBackbone",
    "pretrain": "a LightningModule, such as a subclass of TrainedModule, whose constructor takes the keyword arguments "
    "optimizer, lr_scheduler, seed and dump, whose save(folder) writes the weights, and whose test loop sets "
    "`metrics`, a dictionary",
}
"""What the pipeline requires of a module, by the group that names it."""


def check_module(node: DictConfig, group: str) -> None:
    """Raise ConfigError, with the contract in its message, where the pipeline could not train the module of a node.

    Nothing is constructed. `_target_` may be a function that returns a module: its annotated return type is checked.

    Args:
        node: the part of the configuration with the module's `_target_`.
        group: "distillation" or "pretrain".
    """
    for name in FILLED[group]:
        if name in node:
            raise ConfigError(f"{group}.{name}={node[name]}: the pipeline passes {name} itself; remove the key")
    target: Any = hydra.utils.get_object(node._target_)
    parameters = inspect.signature(target).parameters.values()
    names = [parameter.name for parameter in parameters]
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    refused = [] if takes_any else [name for name in FILLED[group] if name not in names]
    kind: Any = target if inspect.isclass(target) else typing.get_type_hints(target).get("return")
    is_known = inspect.isclass(kind)  # a function may have no annotation
    lacking = [name for name in METHODS[group] if is_known and not hasattr(kind, name)]
    if not node.get("_partial_"):
        fault = "`_partial_: true` is missing beside it"
    elif is_known and not issubclass(kind, pl.LightningModule):
        fault = f"{kind.__name__} is no LightningModule"
    elif refused:
        fault = f"it does not take the argument {', '.join(refused)}"
    elif lacking:
        fault = f"it has no method {', '.join(lacking)}"
    else:
        return
    raise ConfigError(f"{group}._target_={node._target_!r} cannot be trained: {fault}. It has to be {CONTRACT[group]}")


def sum_over_ranks(module: pl.LightningModule, value: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, on the CPU."""
    if module.trainer.world_size == 1:
        return value
    total = value.to(module.device, copy=True)
    torch.distributed.all_reduce(total)
    return total.cpu()


def advise_on_non_finite(step: int, precision: str, rate_field: str, precision_field: str, otherwise: str) -> str:
    """Return what to try against a loss or gradient that is not finite, as a sentence.

    Args:
        step: number of optimiser steps that were taken.
        precision: precision of the computation, as Lightning names it.
        rate_field: field of the configuration with the learning rate.
        precision_field: field of the configuration with the precision.
        otherwise: what to try where neither can be the cause.
    """
    wider = [] if precision == "32-true" else [f"{precision_field}=32-true"]
    if step:
        return f"{' or '.join([f'A lower {rate_field}', *wider])} usually helps"
    return f"No step was taken before, so the learning rate is not the cause; try {' or '.join([*wider, otherwise])}"


def is_list_of_texts(value: Any) -> bool:
    """Return whether a part of a batch is a list of captions or the like."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


class NonFiniteLoss(FloatingPointError):
    """A loss or a gradient is NaN or infinite; no optimiser step was taken with it."""


class TrainedModule(pl.LightningModule):
    """Base class of the modules that are trained on the batches of a datamodule; subclasses implement `losses(batch)`.

    Before every batch the global generators are seeded from (seed, batch counter), so that resuming needs no generator
    state, and micro-batches of one accumulated step differ. What `losses` draws for the samples of a batch is a
    function of their positions in the global batch, whatever the number of ranks (see DrawsForGlobalBatch).

    Args:
        optimizer: makes the optimiser of the parameters that require a gradient.
        lr_scheduler: makes the schedule of an optimiser's learning rate, which advances with every optimiser step.
        seed: seed of training.
        dump: folder into which a batch with a loss or gradient that is not finite is written.
    """

    def __init__(self, optimizer: Optimizer, lr_scheduler: Schedule, seed: int, dump: Path) -> None:
        super().__init__()
        self.make_optimizer, self.make_schedule, self.seed, self.dump = optimizer, lr_scheduler, seed, dump
        self.batch_counter = 0
        self.newest_batch: Mapping[str, Any] = {}
        """the newest batch"""
        self.network_inputs: Mapping[str, Any] = {}
        """what `losses` gave the networks for the newest batch (timesteps, noised samples), where it sets this"""
        self.loss_values: dict[str, Tensor] = {}
        """the losses of the newest batch, without gradients"""

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the scalars of a batch by name: "loss" is minimised, and all are logged as `train/<name>`."""
        raise NotImplementedError

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.batch_counter = self.trainer.fit_loop.epoch_loop.total_batch_idx
        # 0 was the rank: a single process has the same draws as ever.
        torch.manual_seed(derive(self.seed, "noise", 0, self.batch_counter))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        with self.draws_for_global_batch(batch):
            losses = self.losses(batch)
        self.newest_batch = batch
        self.loss_values = {name: value.detach() for name, value in losses.items()}
        means = mean_over_ranks(losses)
        if not torch.isfinite(means["loss"]):  # on all ranks, so that none of them waits for the others' gradients
            self.stop_on_non_finite("loss")
        self.log("loss", means["loss"], prog_bar=True, logger=False)
        self.log_dict({f"train/{name}": value for name, value in means.items()})
        return losses["loss"]

    def draws_for_global_batch(self, batch: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which this rank draws its samples' part of what one process would draw."""
        world = world_size()
        if world == 1:
            return contextlib.nullcontext()
        samples = len(next(value for value in batch.values() if isinstance(value, Tensor)))
        return DrawsForGlobalBatch(samples, torch.distributed.get_rank(), world)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.trainer.precision == "16-mixed":
            return  # its scaler skips such steps by itself, and needs to see them
        gradients = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        if not torch.isfinite(nn.utils.get_total_norm(gradients.values())):
            bad = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
            self.stop_on_non_finite(f"gradient of {', '.join(bad[:3]) or 'all parameters together'}")

    def stop_on_non_finite(self, quantity: str) -> None:
        """Write the newest batch, its inputs and losses into `dump`, and raise NonFiniteLoss with fitting advice.

        Of an accumulated step these are those of the last micro-batch.

        Args:
            quantity: name of the value that is not finite.
        """
        self.dump.mkdir(parents=True, exist_ok=True)
        given = tensors_by_path(self.newest_batch) | tensors_by_path(self.network_inputs, "inputs")
        tensors = given | tensors_by_path(self.loss_values, "losses")
        tensors |= {"step": torch.tensor(self.global_step), "batch_counter": torch.tensor(self.batch_counter)}
        texts = {name: json.dumps(value) for name, value in self.newest_batch.items() if is_list_of_texts(value)}
        path = self.dump / f"non_finite_rank{self.global_rank}.safetensors"
        # Copies, as safetensors refuses tensors that share their memory; scalars get a dimension.
        save_file({name: torch.atleast_1d(tensor.cpu()).clone() for name, tensor in tensors.items()}, path, texts)
        values = ", ".join(f"{name}={float(value):.4g}" for name, value in self.loss_values.items())
        raise NonFiniteLoss(
            f"the {quantity} is not finite at optimiser step {self.global_step} ({values}); no step was taken with it. "
            f"The batch, what the networks were given and the losses are in {path}. {self.advise(given)}"
        )

    def advise(self, given: Mapping[str, Tensor]) -> str:
        """Return what to try, as a sentence; `given` are the tensors that the networks were given."""
        broken = [
            name for name, tensor in given.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()
        ]
        if broken:
            return (
                f"Not finite before any network saw them: {', '.join(broken[:3])}; look at these samples (`index` has "
                "their numbers) and at what encodes them"
            )
        otherwise = "trainer.options={detect_anomaly: true}, which names the operation that failed"
        precision = str(self.trainer.precision)
        return advise_on_non_finite(self.global_step, precision, "optimizer.lr", "trainer.precision", otherwise)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_schedule(optimizer), "interval": "step"},
        }


class Reference:
    """A network that is used by a module but is not part of it: neither trained, nor saved, nor copied with it."""

    def __init__(self, network: NetworkBackbone) -> None:
        self.network = network.eval().requires_grad_(False)

    def __deepcopy__(self, memo: Any) -> Self:
        return self


class DistillationModule(TrainedModule):
    """Base class of the modules that train a student with the help of its teacher: the contract of `distillation`.

    A module outside the repository is a class and a file `distillation/<name>.yaml` with its `_target_` and
    `_partial_: true`. The pipeline passes the six arguments below by keyword; all other arguments of the constructor
    are keys of the YAML file. It calls `result()` after the training. A subclass implements `losses(batch)`: `student`
    and `teacher` are there, and `student.training_inputs(batch)` makes the inputs of both networks. Any other
    LightningModule with this constructor and `result()` can be trained as well.

    A class method `check_settings(settings, teacher, narrower)` is optional. It is called before anything expensive
    and raises ValueError for settings that cannot work: `settings` are the fields of the group, `teacher` is the
    network, and `narrower` says whether the student's feature maps have fewer channels than the teacher's.

    Args:
        student: the pruned network, whose parameters are trained.
        teacher: the unpruned network: frozen, in eval mode, and in no checkpoint.
        optimizer: see TrainedModule.
        lr_scheduler: see TrainedModule.
        seed: see TrainedModule.
        dump: see TrainedModule.
    """

    def __init__(
        self,
        student: NetworkBackbone,
        teacher: NetworkBackbone,
        optimizer: Optimizer,
        lr_scheduler: Schedule,
        seed: int,
        dump: Path,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, dump)
        self.student, self.reference = student.train(), Reference(teacher)

    @property
    def teacher(self) -> NetworkBackbone:
        return self.reference.network

    def on_fit_start(self) -> None:
        self.teacher.to(self.device)

    def result(self) -> NetworkBackbone:
        """Return the trained student."""
        return self.student
