"""What every trained module shares: noise as a function of position, and no step taken on a loss that is not finite."""

import inspect
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hydra.utils
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from conf.schema import ConfigError
from datamodules.seeding import derive

FILLED = {
    "distillation": ("student", "teacher", "optimizer", "lr_scheduler", "seed", "dump"),
    "pretrain": ("optimizer", "lr_scheduler", "seed", "dump"),
}
"""Arguments of trained modules that the pipeline gives, by the group that names the module."""

METHODS = {"distillation": ("result",), "pretrain": ("save",)}
"""Methods of trained modules, beside those of a LightningModule, that the pipeline calls."""

CONTRACT = {
    "distillation": "a LightningModule (TrainedModule helps) that takes the keyword arguments student, teacher, "
    "optimizer, lr_scheduler, seed and dump, and has result() -> NetworkBackbone, the trained network",
    "pretrain": "a LightningModule (TrainedModule helps) that takes the keyword arguments optimizer, lr_scheduler, "
    "seed and dump, and has save(folder), which writes its weights, and metrics, a dictionary that its test loop fills",
}
"""What a module has to be, by the group that names it."""


def check_module(node: DictConfig, group: str) -> None:
    """Raise ConfigError, with the contract, where the pipeline could not train what a node of the configuration names.

    `group` is "distillation" or "pretrain".
    """
    for name in FILLED[group]:
        if name in node:
            raise ConfigError(f"{group}.{name}: the pipeline itself gives this argument; leave it out")
    target = hydra.utils.get_object(node._target_)
    fault = None
    parameters = inspect.signature(target).parameters.values()
    taken = {parameter.name for parameter in parameters}
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    missing = [name for name in FILLED[group] if name not in taken and not is_open]
    kind = target if inspect.isclass(target) else typing.get_type_hints(target).get("return", object)
    lacking = [name for name in METHODS[group] if kind is not object and not hasattr(kind, name)]
    if not node.get("_partial_"):
        fault = "_partial_: true is missing beside it, so that it would be made without its networks"
    elif missing:
        fault = f"it does not take {', '.join(missing)}"
    elif lacking:
        fault = f"it has no method {', '.join(lacking)}"
    if fault is not None:
        raise ConfigError(f"{group}._target_={node._target_!r} cannot be trained: {fault}. It names {CONTRACT[group]}")


Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Schedule = Callable[[torch.optim.Optimizer], Any]


def sum_over_ranks(module: pl.LightningModule, value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on the CPU."""
    if module.trainer.world_size == 1:
        return value
    total = value.to(module.device, copy=True)
    torch.distributed.all_reduce(total)
    return total.cpu()


class NonFiniteLoss(FloatingPointError):
    """A loss or gradient is NaN or infinite; no optimiser step was taken with it."""


class TrainedModule(pl.LightningModule):
    """A module that is trained on the batches of a datamodule; subclasses give `losses(batch)`.

    Before every batch the global generators are seeded from (seed, rank, batch counter), so that resuming needs no
    generator state; micro-batches of one accumulated step differ.
    """

    def __init__(self, optimizer: Optimizer, lr_scheduler: Schedule, seed: int, dump: Path) -> None:
        super().__init__()
        self.make_optimizer, self.make_schedule, self.seed, self.dump = optimizer, lr_scheduler, seed, dump

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars to log; "loss" is the one that is minimised."""
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
        """Save what is needed to look at it, then raise NonFiniteLoss."""
        self.dump.mkdir(parents=True, exist_ok=True)
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}  # captions are none
        tensors |= {f"losses/{name}": value.detach().reshape(1) for name, value in losses.items()}
        tensors["step"] = torch.tensor([self.global_step])
        path = self.dump / f"non_finite_rank{self.global_rank}.safetensors"
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path)
        values = ", ".join(f"{name}={float(value.detach()):.4g}" for name, value in losses.items())
        raise NonFiniteLoss(
            f"the {what} is not finite at optimiser step {self.global_step} ({values}); no step was taken with it. "
            f"The batch is in {path}; a lower optimizer.lr or trainer.precision=32-true usually mends it"
        )

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_schedule(optimizer), "interval": "step"},
        }
