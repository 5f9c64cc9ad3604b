"""Estimates of the memory of a training, against what tensors of the same training take on a CPU."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.distillation import distillation
from support.networks import bypasses, same_tensors, tiny_backbone
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from lightning_modules.modules.autoencoder import new_autoencoder
from lightning_modules.modules.classifier import new_classifier
from lightning_modules.modules.denoiser import Denoiser
from lightning_modules.training.cuda_on_meta import CudaOnMeta, attend
from lightning_modules.training.memory import (
    LiveMemory,
    MemoryEstimate,
    TrainingSettings,
    copy_to_meta,
    count_bytes,
    estimate_held_memory,
    estimate_memory,
    make_optimizer_with_state,
    take_step,
)
from lightning_modules.training.parts import compute_in_parts

BATCH = 8
UNETS = ("UNet2DModel", "sd", "sdxl")
EXACT = (*UNETS, "dit", "pixart", "sd3")


def small_training(family: str) -> Any:
    """A distillation of a student without the first unit; its optimiser takes all tensors at once, as on CUDA."""
    teacher = tiny_backbone(family)
    module = distillation(teacher.pruned(bypasses([unit.name for unit in teacher.units()][:1])), teacher)
    module.make_optimizer = functools.partial(torch.optim.AdamW, lr=1e-4, foreach=True)
    return module


def total_of(estimate: MemoryEstimate) -> int:
    """What of an estimate a step allocates: all but networks and average."""
    return estimate.gradients + estimate.optimizer + estimate.activations


def give_inputs(module: Any, device: str) -> None:
    """Replace the inputs of a module's networks by examples, which need no data."""
    for backbone in module.networks():
        inputs = backbone.example_training_inputs(BATCH, device)
        backbone.training_inputs = lambda batch, inputs=inputs: dict(inputs)


def measure_live(module: Any, level: str) -> int:
    """The peak of a step on the CPU, by the tensors that are alive, with gradients and states from a step before."""
    give_inputs(module, "cpu")
    memory = LiveMemory()
    with compute_in_parts(module, False, level), memory:
        optimizer = make_optimizer_with_state(module, "32-true")
        take_step(module, optimizer, {})
    return memory.peak


def measure_allocated(module: Any) -> int:
    """The peak of a second step on the CPU above what is held before it, by the allocator of torch."""
    give_inputs(module, "cpu")
    optimizer = make_optimizer_with_state(module, "32-true")
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        take_step(module, optimizer, {})
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# Counting


def test_tensors_are_counted_once_and_until_they_are_freed() -> None:
    with LiveMemory() as memory:
        first = torch.ones(1000)  # 4000 bytes
        view = first.view(10, 100)[2:]
        assert memory.now == 4000
        second = first + 1
        assert memory.now == memory.peak == 8000
        del first
        assert memory.now == 8000  # a view still needs it
        del view
        assert memory.now == 4000
        second.add_(1)
        assert (memory.now, memory.peak) == (4000, 8000)
        del second
    assert (memory.now, memory.peak) == (0, 8000)


def test_tensors_made_before_are_counted_where_they_are_named() -> None:
    kept, other = torch.ones(10), torch.ones(20)
    memory = LiveMemory()
    memory.count_all([kept])
    with memory:
        (kept + 1).sum()  # 40 bytes and 4
        del kept, other
    assert (memory.now, memory.peak) == (0, 84)


# Estimates against measurements


@pytest.mark.parametrize("level", ["none", "blocks"])
@pytest.mark.parametrize("family", ["UNet2DModel", "sd", "pixart", "llama"])
def test_an_estimate_is_what_the_tensors_of_a_step_take(family: str, level: str) -> None:
    module = small_training(family)
    estimate = estimate_memory(module, TrainingSettings(BATCH, checkpoint_activations=level))
    assert total_of(estimate) == pytest.approx(measure_live(module, level), rel=0.05)


@pytest.mark.parametrize("family", ["UNet2DModel", "sd"])
def test_an_estimate_is_within_15_percent_of_what_is_allocated(family: str) -> None:
    module = small_training(family)
    estimate = estimate_memory(module, TrainingSettings(BATCH))
    allocated = measure_allocated(module) + estimate.gradients + estimate.optimizer
    assert total_of(estimate) == pytest.approx(allocated, rel=0.15)


def test_recomputed_activations_take_less_memory() -> None:
    module = small_training("sd")
    none, blocks = (
        estimate_memory(module, TrainingSettings(BATCH, checkpoint_activations=level)) for level in ("none", "blocks")
    )
    assert blocks.activations < 0.7 * none.activations
    assert dataclasses.replace(blocks, activations=0) == dataclasses.replace(none, activations=0)


def test_activations_grow_with_the_batch() -> None:
    module = small_training("UNet2DModel")
    one, two, four = (estimate_memory(module, TrainingSettings(n)).activations for n in (64, 128, 256))
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)


# Precisions


class CudaAttention(TorchFunctionMode):
    """Attention of CUDA under autocast, for tensors that only pretend to be on a GPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            args = tuple(tensor.bfloat16() for tensor in args[:3]) + tuple(args[3:])
            return attend(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def autocast_of_cuda() -> Iterator[None]:
    """What `torch.autocast("cuda")` does, which refuses to on a machine without a GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_cache_enabled(False)  # as Lightning does
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.set_autocast_cache_enabled(True)
        torch.set_autocast_enabled("cuda", False)


def count_saved(module: Any) -> int:
    """The bytes of what the loss of a module saves for the backward pass, without its weights."""
    networks = (module, module.teacher)
    weights = {id(tensor.untyped_storage()) for network in networks for tensor in network.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in weights:
            saved[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module.losses({})["loss"]
    assert loss.dtype == torch.float32
    return sum(storage.nbytes() for storage in saved.values())


def pretend_to_be_on_cuda(module: nn.Module) -> None:
    """Replace the tensors of a module by those of FakeTensorMode."""
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                part._parameters[name] = nn.Parameter(empty, tensor.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")


@pytest.mark.parametrize("family", EXACT)
def test_as_much_is_saved_as_under_the_autocast_of_cuda(family: str) -> None:
    module = copy_to_meta(small_training(family))
    module.prepare("bf16-mixed")
    fake = copy.deepcopy(module)
    fake.reference = copy_to_meta(module).reference
    give_inputs(module, "meta")
    cuda = CudaOnMeta(torch.bfloat16)
    with cuda:
        saved = count_saved(module)
    with FakeTensorMode(allow_non_fake_inputs=True):
        pretend_to_be_on_cuda(fake)
        pretend_to_be_on_cuda(fake.teacher)
        give_inputs(fake, "cuda")
        with CudaAttention(), autocast_of_cuda():
            assert saved == count_saved(fake)


def test_half_precision_halves_activations_and_the_weights_of_the_teachers_layers() -> None:
    module = small_training("sd")
    full, half = (estimate_memory(module, TrainingSettings(64, precision)) for precision in ("32-true", "bf16-mixed"))
    assert (half.gradients, half.optimizer, half.average) == (full.gradients, full.optimizer, full.average)
    assert half.activations < 0.85 * full.activations
    student = count_bytes([module.student])
    assert student + 0.5 * count_bytes([module.teacher]) < half.networks < student + 0.6 * count_bytes([module.teacher])


def test_without_autocast_functions_are_those_of_the_device() -> None:
    cuda, weight = CudaOnMeta(None), torch.ones(3, 3)
    with cuda:
        assert F.linear(weight, weight).dtype == torch.float32


def test_functions_have_the_dtypes_of_autocast() -> None:
    image, weight = torch.ones(1, 3, device="meta"), nn.Parameter(torch.ones(3, 3, device="meta"))
    with CudaOnMeta(torch.bfloat16):
        assert F.linear(image, weight).dtype == torch.bfloat16
        assert F.group_norm(image.bfloat16(), 1).dtype == torch.float32


def test_the_training_of_a_text_to_image_model_can_be_estimated() -> None:
    backbone = tiny_backbone("sd")
    module = Denoiser(
        backbone,
        drop_text=0.1,
        captions=None,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-4),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
        seed=0,
        dump=Path("nowhere"),
    )
    estimate = estimate_memory(module, TrainingSettings(BATCH, "bf16-mixed"))
    assert estimate.networks == count_bytes([module]) and estimate.activations > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_has_the_shape_of_the_queries(dtype: torch.dtype, masked: bool) -> None:
    query = torch.zeros(2, 4, 6, 8, device="meta", dtype=dtype)
    key = torch.zeros(2, 2, 10, 8, device="meta", dtype=dtype)
    mask = torch.zeros(2, 1, 6, 10, device="meta") if masked else None
    output = attend(query, key, key, mask, enable_gqa=True)
    assert output.shape == query.shape and output.dtype == dtype


# Everything else that takes memory


def test_everything_held_is_counted_exactly() -> None:
    module = small_training("UNet2DModel")
    student, teacher = module.student.params(), module.teacher.params()
    held = estimate_held_memory(module, TrainingSettings(BATCH))
    assert held.networks == count_bytes([module, module.teacher]) >= 4 * (student + teacher)
    assert (held.gradients, held.optimizer) == (4 * student, 8 * student)  # AdamW has two moments
    assert held.average == count_bytes([module]) >= 4 * student
    assert held.activations == 0 and held.total == held.networks + 12 * student + held.average
    assert dataclasses.replace(estimate_memory(module, TrainingSettings(BATCH)), activations=0) == held


def test_stored_outputs_take_the_place_of_the_teacher() -> None:
    teacher = tiny_backbone("UNet2DModel")
    live, stored = (
        distillation(tiny_backbone("UNet2DModel"), teacher, w_feat=0.0, teacher_outputs=choice)
        for choice in ("live", "stored")
    )
    with_teacher, without = (estimate_memory(module, TrainingSettings(BATCH)) for module in (live, stored))
    assert without.networks == with_teacher.networks - count_bytes([teacher])
    assert without.activations <= with_teacher.activations


def test_a_fused_optimiser_makes_no_temporary_tensors() -> None:
    module = small_training("UNet2DModel")
    parameters = 4 * module.student.params()
    assert estimate_memory(module, TrainingSettings(1)).activations >= parameters  # foreach: a copy of all weights
    module.make_optimizer = functools.partial(torch.optim.AdamW, lr=1e-4)
    assert estimate_memory(module, TrainingSettings(1)).activations < parameters
    assert estimate_memory(module, TrainingSettings(1, "16-mixed")).activations >= parameters  # is not fused


def test_ranks_copy_gradients_or_share_everything() -> None:
    module = small_training("UNet2DModel")
    one = estimate_held_memory(module, TrainingSettings(BATCH))
    ddp = estimate_held_memory(module, TrainingSettings(BATCH, copies_gradients=True, averages=False))
    assert ddp == dataclasses.replace(one, gradients=2 * one.gradients, average=0)
    shared = estimate_held_memory(module, TrainingSettings(BATCH, shards=4))
    assert all(vars(shared)[name] == size // 4 for name, size in vars(one).items())


def test_encoders_count_where_pictures_are_encoded() -> None:
    module = small_training("sd")
    parts = module.student.pipeline_parts
    settings = TrainingSettings(BATCH, encodes=True)
    shape = module.student.image_shape()
    with_encoders, without = (
        estimate_memory(module, dataclasses.replace(settings, encodes=encodes), shape) for encodes in (True, False)
    )
    assert with_encoders.networks == without.networks + count_bytes(parts.modules())
    assert with_encoders.activations >= without.activations
    large = estimate_memory(module, settings, (3, 64 * shape[1], 64 * shape[2]))  # the VAE's activations are the peak
    assert large.activations > 2 * with_encoders.activations
    assert not any(parameter.is_meta for part in parts.modules() for parameter in part.parameters())


def test_a_module_without_a_teacher_that_it_calls_holds_none() -> None:
    teacher = tiny_backbone("UNet2DModel")
    module = distillation(teacher.copy(), teacher, w_out=0.0, w_feat=0.0)
    assert estimate_held_memory(module, TrainingSettings(BATCH)).networks == count_bytes([module])


@pytest.mark.parametrize("family", ["sd", "llama"])
def test_an_estimate_leaves_module_and_random_numbers_as_they_are(family: str) -> None:
    module = small_training(family)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    teacher = {name: tensor.clone() for name, tensor in module.teacher.state_dict().items()}
    state = torch.get_rng_state()
    estimate_memory(module, TrainingSettings(BATCH, "bf16-mixed", "blocks"))
    assert torch.equal(torch.get_rng_state(), state)
    assert same_tensors(dict(module.state_dict()), before)
    assert same_tensors(dict(module.teacher.state_dict()), teacher)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert "training_inputs" not in vars(module.student)


def test_modules_that_take_images_themselves_are_estimated() -> None:
    common: dict[str, Any] = {
        "optimizer": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "lr_scheduler": functools.partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
        "seed": 0,
        "dump": Path("/nowhere"),
    }
    vae = {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 2}
    vae |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    for module in (new_classifier("resnet8", **common), new_autoencoder(vae, 1e-6, **common)):
        estimate = estimate_memory(module, TrainingSettings(BATCH), (3, 32, 32))
        weights = sum(parameter.nbytes for parameter in module.parameters())
        assert estimate.gradients == estimate.optimizer == weights  # one moment
        assert estimate.activations > BATCH * 8 * 32 * 32 * 4
