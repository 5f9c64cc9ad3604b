"""Estimates of the device memory that a training needs: one step on the meta device, whose tensors are counted."""

import copy
import functools
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from criteria.base import Batch
from lightning_modules.backbones.rounding import AUTOCAST_DTYPES
from lightning_modules.modules.base import DistillationModule, Reference, TrainedModule, can_be_fused
from lightning_modules.modules.distillation import Distillation
from lightning_modules.training.cuda_on_meta import CudaOnMeta
from lightning_modules.training.parts import compute_in_parts, find_recomputed


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations inside the context make, for as long as each of them lives.

    It counts storages, so that views count once. Of the tensors made before, only those in `count_all` are counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.storages = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(storage := leaf.untyped_storage()) not in before:
                self.count(storage)
        return result

    def count_all(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made before."""
        for tensor in tensors:
            self.count(tensor.untyped_storage())

    def count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        if storage in self.storages:
            return
        self.storages[storage] = None
        weakref.finalize(storage, self.free, storage.nbytes()).atexit = False
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def free(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class TrainingSettings:
    """What the memory of a training depends on, besides its networks."""

    batch_size: int
    """samples of one device in one pass"""
    precision: str = "32-true"
    """by Lightning's name"""
    checkpoint_activations: str = "none"
    averages: bool = True
    """whether there is a moving average of the weights"""
    copies_gradients: bool = False
    """whether gradients are copied to be summed over ranks, as DDP does"""
    encodes: bool = False
    """whether pictures and captions are encoded in the training, by the VAE and the text encoders"""
    shards: int = 1
    """over how many devices weights, gradients and states are distributed (FSDP)"""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of device memory that a training needs."""

    networks: int
    """weights and buffers of the trained network, of its teacher, and of the VAE and text encoders"""
    gradients: int
    optimizer: int
    """state of the optimiser"""
    average: int
    """moving average of the weights"""
    activations: int = 0
    """what else is alive at the peak: saved activations, weights in half precision, temporary tensors"""

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def estimate_memory(
    module: TrainedModule, settings: TrainingSettings, sample_shape: tuple[int, ...] = ()
) -> MemoryEstimate:
    """Return the memory that the training of a module needs on a CUDA device.

    A step is taken on the meta device, where tensors have a shape and no values. Everything is alive that is alive in
    a later step: the optimiser's state and, during the forward pass, the gradients of the step before. What CUDA itself
    takes (context, workspaces, fragments) is not in it.

    Args:
        module: the module; its networks may have values or be on the meta device, and are not changed.
        settings: batch, precision and options.
        sample_shape: shape of a sample of the data: (channels, height, width) of an image, or (tokens,) of a text.
    """
    module = copy_to_meta(module)
    module.prepare(settings.precision)
    optimizer = make_optimizer_with_state(module, settings.precision)
    held = count_held_memory(module, optimizer, settings)
    images = torch.zeros(settings.batch_size, *sample_shape, device="meta")
    batch: dict[str, Any] = {
        "image": images,
        "label": torch.zeros(settings.batch_size, dtype=torch.long, device="meta"),
    }
    memory, cuda = LiveMemory(), CudaOnMeta(AUTOCAST_DTYPES.get(settings.precision))
    for backbone in module.networks():
        inputs = backbone.example_training_inputs(settings.batch_size, "meta", sample_shape)
        backbone.training_inputs = functools.partial(return_copy, inputs)  # type: ignore[method-assign]
        if backbone.takes_text:
            batch["empty_text"] = backbone.example_training_inputs(1, "meta", sample_shape)["conditions"]
        for part in find_recomputed(backbone, settings.checkpoint_activations):
            part.forward = cuda.wrap(part.forward)  # torch leaves the mode for the backward pass
    if isinstance(module, Distillation) and module.has_stored_outputs:
        with torch.no_grad(), cuda:
            batch["teacher_output"] = module.student.predict(module.student.training_inputs(batch)).float()
    memory.count_all([*list_gradients(module), *list_state(optimizer)])
    start = memory.now
    with torch.random.fork_rng(devices=[]), compute_in_parts(module, False, settings.checkpoint_activations), memory:
        if settings.encodes:
            encode(module, images)
        with cuda:
            take_step(module, optimizer, batch)
    return replace(held, activations=memory.peak - start)


def estimate_held_memory(module: TrainedModule, settings: TrainingSettings) -> MemoryEstimate:
    """Return the memory that a training holds all the time: without activations. This is fast."""
    module = copy_to_meta(module)
    module.prepare(settings.precision)
    return count_held_memory(module, make_optimizer_with_state(module, settings.precision), settings)


def count_held_memory(
    module: TrainedModule, optimizer: torch.optim.Optimizer, settings: TrainingSettings
) -> MemoryEstimate:
    """Return the memory that a training of a module on the meta device holds all the time."""
    teachers = [module.teacher] if isinstance(module, DistillationModule) and module.needs_teacher else []
    parts = list_encoders(module) if settings.encodes else []
    gradients, state = (
        sum(tensor.nbytes for tensor in tensors) for tensors in (list_gradients(module), list_state(optimizer))
    )
    return MemoryEstimate(
        networks=count_bytes([module, *teachers]) // settings.shards + count_bytes(parts),
        gradients=gradients * (2 if settings.copies_gradients else 1) // settings.shards,
        optimizer=state // settings.shards,
        average=count_bytes([module]) // settings.shards if settings.averages else 0,
    )


def return_copy(inputs: Batch, batch: Batch) -> Batch:
    """Return a copy of some inputs, whatever the batch."""
    return dict(inputs)


def copy_to_meta(module: Any) -> Any:
    """Return a copy of a module on the meta device, without a copy of its weights; a teacher beside it, too."""
    memo: dict[int, Any] = {}
    if isinstance(module, DistillationModule):
        memo[id(module.reference)] = Reference(copy_to_meta(module.teacher))
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(module, memo).to("meta")


def count_bytes(modules: Iterable[nn.Module]) -> int:
    """Return the bytes of the weights and buffers of modules; what they share counts once."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def list_gradients(module: nn.Module) -> list[Tensor]:
    """Return the gradients of a module."""
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def list_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors of an optimiser's state that are on the device; counts of steps are on the CPU."""
    values = tree_leaves(list(optimizer.state.values()))
    return [value for value in values if isinstance(value, Tensor) and value.is_meta]


def list_encoders(module: TrainedModule) -> list[nn.Module]:
    """Return the VAE and the text encoders of a module's networks."""
    parts = [backbone.pipeline_parts for backbone in module.networks() if backbone.pipeline_parts is not None]
    return parts[0].modules() if parts else []


def make_optimizer_with_state(module: TrainedModule, precision: str) -> torch.optim.Optimizer:
    """Return the optimiser of a module on the meta device, with the state and gradients that it has after a step.

    A fused optimiser makes no temporary tensors. The meta device has no fused kernels; updating one tensor at a time
    needs as little memory. Otherwise CUDA updates all tensors at once, unless something else was configured.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer, fused = module.make_optimizer(trained), can_be_fused(module.make_optimizer, trained, precision)
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None:
            group["foreach"] = not fused
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


@torch.no_grad()
def encode(module: TrainedModule, images: Tensor) -> None:
    """Encode images (N,C,H,W) as the training does: in float32."""
    vae = next((backbone.pipeline_parts.vae for backbone in module.networks() if backbone.pipeline_parts), None)
    if vae is not None:
        with CudaOnMeta(None):
            copy_to_meta(vae).encode(images)


def take_step(module: TrainedModule, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> None:
    """Take an optimiser step in the order of Lightning: forward pass, gradients to None, backward pass, update."""
    loss = module.losses(batch)["loss"]
    optimizer.zero_grad()
    loss.backward()
    del loss
    optimizer.step()
