"""Base classes of the modules that are trained, and the contract that the pipeline checks before it trains one.

The noise of a training step is a function of its position, and no step is taken on a loss that is not finite.
"""

import inspect
import typing
from collections.abc import Callable, Iterable
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


class NonFiniteLoss(FloatingPointError):
    """A loss or a gradient is NaN or infinite; no optimiser step was taken with it."""


class TrainedModule(pl.LightningModule):
    """Base class of the modules that are trained on the batches of a datamodule; subclasses implement `losses(batch)`.

    Before every batch the global generators are seeded from (seed, rank, batch counter), so that resuming needs no
    generator state; micro-batches of one accumulated step differ.

    Args:
        optimizer: makes the optimiser of the parameters that require a gradient.
        lr_scheduler: makes the schedule of an optimiser's learning rate, which advances with every optimiser step.
        seed: seed of training.
        dump: folder into which a batch with a non-finite loss is written.
    """

    def __init__(self, optimizer: Optimizer, lr_scheduler: Schedule, seed: int, dump: Path) -> None:
        super().__init__()
        self.make_optimizer, self.make_schedule, self.seed, self.dump = optimizer, lr_scheduler, seed, dump

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the scalars of a batch by name: "loss" is minimised, and all are logged as `train/<name>`."""
        raise NotImplementedError

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        counter = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(derive(self.seed, "noise", self.global_rank, counter))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        if not torch.isfinite(losses["loss"]):
            self.stop_on_non_finite("loss", batch, losses)
        self.log("loss", losses["loss"], prog_bar=True, logger=False)
        self.log_dict({f"train/{name}": value for name, value in losses.items()})
        return losses["loss"]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.trainer.precision == "16-mixed":
            return  # its scaler skips such steps by itself, and needs to see them
        gradients = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        if not torch.isfinite(nn.utils.get_total_norm(gradients.values())):
            bad = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
            self.stop_on_non_finite(f"gradient of {', '.join(bad[:3]) or 'all parameters together'}", {}, {})

    def stop_on_non_finite(self, what: str, batch: dict[str, Any], losses: dict[str, Tensor]) -> None:
        """Write the batch and the losses into `dump`, then raise NonFiniteLoss; `what` is the value's name."""
        self.dump.mkdir(parents=True, exist_ok=True)
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}  # not captions
        tensors |= {f"losses/{name}": value.detach().reshape(1) for name, value in losses.items()}
        tensors["step"] = torch.tensor([self.global_step])
        path = self.dump / f"non_finite_rank{self.global_rank}.safetensors"
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path)
        values = ", ".join(f"{name}={float(value.detach()):.4g}" for name, value in losses.items())
        raise NonFiniteLoss(
            f"the {what} is not finite at optimiser step {self.global_step} ({values}); no step was taken with it. "
            f"The batch is in {path}; a lower optimizer.lr or trainer.precision=32-true usually helps"
        )

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
