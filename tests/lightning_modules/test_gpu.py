"""Training on a GPU: the teacher's rounded weights, one kernel per optimiser step, and the same bits twice."""

from collections.abc import Iterator

import pytest
import torch
from omegaconf import OmegaConf
from support.distillation import REMOVED, distillation
from support.networks import bypasses, same_tensors, tiny_backbone, tiny_batch

from conf import schema
from experiments.benchmarks.distillation.__main__ import OneBatch
from lightning_modules.backbones.rounding import round_weights
from lightning_modules.modules.distillation import Distillation
from lightning_modules.training.ema import WarmedUpEMA
from lightning_modules.training.parts import compute_in_parts
from lightning_modules.training.trainer import fit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch) -> Iterator[None]:
    """What Lightning sets for trainer.deterministic=true."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def train(compiles: bool, activations: str = "none") -> Distillation:
    """Return a module after three steps on a GPU in bf16 mixed precision."""
    teacher = tiny_backbone("UNet2DModel")
    module = distillation(teacher.pruned(bypasses(REMOVED)), teacher).cuda()
    module.prepare("bf16-mixed")
    module.teacher.cuda()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    batch = {key: value.cuda() if torch.is_tensor(value) else value for key, value in tiny_batch(teacher, 4).items()}
    torch.manual_seed(0)
    with compute_in_parts(module, compiles, activations):
        for _ in range(3):
            with torch.autocast("cuda", torch.bfloat16):
                loss = module.losses(batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return module


def test_rounded_weights_give_the_outputs_of_autocast():
    backbone = tiny_backbone("UNet2DConditionModel").eval()
    inputs = backbone.calibration_inputs(tiny_batch(backbone, 2), seed=0)
    rounded = round_weights(backbone, "bf16-mixed").cuda()
    backbone.cuda()
    inputs = {key: move_to_gpu(value) for key, value in inputs.items()}
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(rounded.predict(inputs), backbone.predict(inputs))


def move_to_gpu(value: torch.Tensor | dict) -> torch.Tensor | dict:
    return {key: move_to_gpu(part) for key, part in value.items()} if isinstance(value, dict) else value.cuda()


@pytest.mark.parametrize(("compiles", "activations"), [(False, "none"), (False, "blocks"), (True, "none")])
def test_the_same_steps_have_the_same_bits(compiles, activations):
    first, second = (train(compiles, activations).student.state_dict() for _ in range(2))
    assert same_tensors(first, second)


def test_compiled_steps_equal_eager_ones_up_to_rounding():
    eager, compiled = (dict(train(compiles).student.named_parameters()) for compiles in (False, True))
    for name, weight in eager.items():
        torch.testing.assert_close(compiled[name], weight, rtol=0, atol=5e-3)  # three steps of at most 1e-3 each


@pytest.mark.parametrize("compiles", [False, True])
def test_a_resumed_training_ends_in_the_weights_of_an_undisturbed_one(tmp_path, compiles):
    batch = tiny_batch(tiny_backbone("UNet2DModel"), 4)
    weights, moments = [], []
    for folder, ends in (("undisturbed", (4,)), ("resumed", (2, 4))):
        for steps in ends:  # the second training goes on from the checkpoint of the first
            teacher = tiny_backbone("UNet2DModel")
            module = distillation(teacher.pruned(bypasses(REMOVED)), teacher)
            fields = {"accelerator": "gpu", "steps": steps, "checkpoint_every": 2, "compile": compiles}
            conf = OmegaConf.merge(OmegaConf.structured(schema.Trainer), fields)
            callbacks = [WarmedUpEMA(0.9)]
            fit(module, OneBatch(batch, steps), conf, tmp_path / folder, "distil", callbacks=callbacks)
        weights.append(module.student.state_dict())
        file = tmp_path / folder / "checkpoints" / "distil" / "step=0000004.ckpt"
        (optimizer,) = torch.load(file, map_location="cpu", weights_only=True)["optimizer_states"]
        assert optimizer["param_groups"][0]["fused"]
        moments.append(optimizer["state"][0]["exp_avg"])
    assert same_tensors(*weights) and torch.equal(*moments)


def test_fully_sharded_training_on_one_gpu_equals_that_of_the_whole_module(tmp_path):
    trained = []
    for strategy in ("auto", "fsdp"):
        teacher = tiny_backbone("UNet2DModel")
        module = distillation(teacher.pruned(bypasses(REMOVED)), teacher)
        fields = {"accelerator": "gpu", "steps": 3, "precision": "32-true", "strategy": strategy}
        conf = OmegaConf.merge(OmegaConf.structured(schema.Trainer), fields)
        fit(module, OneBatch(tiny_batch(teacher, 4), 3), conf, tmp_path / strategy, "distil")
        trained.append(module.student.cpu().state_dict())
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-4, atol=1e-4)
