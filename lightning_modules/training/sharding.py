"""Weights, gradients and optimiser states that are distributed over the ranks: FSDP2 (torch's `fully_shard`)."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.modules.base import Reference, TrainedModule


class FullySharded(DDPStrategy):
    """Trains a copy of a module of which every rank holds a part, and keeps the module itself whole.

    The units of a network (blocks, attentions, decoder layers) are gathered one by one when they compute, all other
    parameters together for the whole step. Gradients are the mean over ranks, as under DDP. Checkpoints are those of a
    training in one process: every tensor is gathered before rank 0 writes it, and each rank takes its part of what is
    read. Lightning's ModelParallelStrategy shards too early, as its hook `configure_model` comes before the moving
    average is made, and a sharded module cannot be copied.

    Args:
        whole: the module. It stays on the CPU and gets the trained weights at the end, on all ranks.
    """

    def __init__(self, whole: pl.LightningModule) -> None:
        super().__init__()
        self.whole = whole

    def make_trained_copy(self) -> pl.LightningModule:
        """Return the copy of the module that is to be trained; it is sharded when training starts."""
        return copy.deepcopy(self.whole.cpu())

    def separate(self, trained: pl.LightningModule) -> None:
        """Copy the frozen networks that the copy shares with the module itself, for which they stay whole."""
        for name, value in list(vars(trained).items()):
            if isinstance(value, Reference) and vars(self.whole)[name].network is value.network:
                setattr(trained, name, Reference(copy.deepcopy(value.network.cpu())))

    @functools.cached_property
    def mesh(self) -> DeviceMesh:
        """All ranks in a row."""
        return init_device_mesh(self.root_device.type, (self.world_size,))

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.lightning_module is not None
        for network in find_networks(self.lightning_module, trained=False):
            shard_frozen(network, self.mesh)
        shard_module(self.lightning_module, self.mesh)
        register_fsdp_forward_method(self.lightning_module, "training_step")
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """Wrap nothing: the module is sharded."""

    def on_train_end(self) -> None:
        self.copy_weights_back()

    def teardown(self) -> None:
        """End as Lightning's strategies do, but leave the copy where it is: nothing reads it any more."""
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    @torch.no_grad()
    def copy_weights_back(self) -> None:
        """Copy weights and buffers of the sharded module into the whole one; all ranks have to call it."""
        assert self.lightning_module is not None
        targets = self.whole.state_dict()
        for name, value in self.lightning_module.state_dict().items():
            targets[name].copy_(value.full_tensor() if isinstance(value, DTensor) else value)

    # Checkpoints

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(tree_map_only(DTensor, self.gather_on_rank_zero, checkpoint), filepath, storage_options)

    def gather_on_rank_zero(self, tensor: DTensor) -> Tensor | None:
        """Return a whole tensor on the CPU, None on other ranks; all ranks have to call it."""
        whole = tensor.full_tensor()
        return whole.cpu() if self.is_global_zero else None

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> dict[str, Any]:
        assert self.lightning_module is not None
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        own = self.lightning_module.state_dict()
        for key in ("state_dict", "current_model_state"):
            if key in checkpoint:
                checkpoint[key] = {name: shard_like(value, own.get(name)) for name, value in checkpoint[key].items()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state["state"] = {
                number: shard_moments(values, parameters[number]) for number, values in state["state"].items()
            }
        return checkpoint


def find_networks(module: nn.Module, trained: bool) -> list[NetworkBackbone]:
    """Return the networks that a TrainedModule runs: those that are parts of it, or those that it only refers to."""
    parts = set(module.modules())
    networks = module.networks() if isinstance(module, TrainedModule) else ()
    return [network for network in networks if (network in parts) is trained]


def shard_frozen(backbone: NetworkBackbone, mesh: DeviceMesh) -> None:
    """Distribute a network that is called by itself; nothing of it stays gathered after a forward pass."""
    shard_units(backbone, mesh)
    fully_shard(backbone.network, mesh=mesh, reshard_after_forward=True)


def shard_module(module: nn.Module, mesh: DeviceMesh) -> None:
    """Distribute the parameters of a module over the ranks: each unit of its networks by itself, then the rest.

    Buffers stay whole. Parameters are moved to the device of `mesh` part by part.
    """
    for network in find_networks(module, trained=True):
        shard_units(network, mesh)
    fully_shard(module, mesh=mesh)


def shard_units(backbone: NetworkBackbone, mesh: DeviceMesh) -> None:
    """Distribute each unit of depth that computes by itself, units inside of others first."""
    for name in sorted(backbone.self_contained(), key=lambda name: -name.count(".")):
        fully_shard(backbone.network.get_submodule(name), mesh=mesh)


def shard_like(value: Tensor, own: Tensor | None) -> Tensor:
    """Return this rank's part of a whole tensor, distributed as `own` is; nothing is communicated."""
    if not isinstance(own, DTensor):
        return value
    # No rank is the source: all of them have read the same file.
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def shard_moments(values: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Return an optimiser's state of one parameter in which tensors of its shape are distributed as it is."""
    return {
        name: shard_like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
        for name, value in values.items()
    }
