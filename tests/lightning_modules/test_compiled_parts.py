"""Networks in training: compiled parts, recomputed activations, and weights that are rounded once."""

from typing import Any

import pytest
import torch
from support.classification import tiny_classifier
from support.distillation import REMOVED, distillation, losses_of
from support.networks import FAMILIES, bypasses, same_tensors, tiny_backbone, tiny_batch
from support.results import the_run
from torch import Tensor, nn

from conf.schema import CHECKPOINT_ACTIVATIONS
from experiments.engine.pipeline import run_pipeline
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.rounding import ROUNDED_LAYERS, round_weights
from lightning_modules.modules.distillation import Distillation
from lightning_modules.training.parts import compute_in_parts, find_compiled, recompute
from lightning_modules.training.ranks import DrawsForGlobalBatch

ALL = (*FAMILIES, "classifier")


def backbone_of(family: str) -> NetworkBackbone:
    return tiny_classifier() if family == "classifier" else tiny_backbone(family)


def batch_of(backbone: NetworkBackbone) -> dict[str, Any]:
    if backbone.classifies:
        return {"image": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), "label": torch.arange(2)}
    return tiny_batch(backbone, 2)


def distil(family: str, **options: Any) -> tuple[Distillation, dict[str, Any]]:
    """Return a Distillation of a network into a copy of it, and a batch."""
    teacher = backbone_of(family)
    return distillation(teacher.copy(), teacher, **options), batch_of(teacher)


# Weights that are rounded once


@pytest.mark.parametrize("family", ALL)
def test_rounded_weights_give_the_outputs_of_autocast(family):
    backbone = backbone_of(family).eval()
    rounded = round_weights(backbone, "bf16-mixed")
    inputs = backbone.calibration_inputs(batch_of(backbone), seed=0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rounded.predict(inputs), backbone.predict(inputs))
    layers = [part for part in rounded.network.modules() if isinstance(part, ROUNDED_LAYERS)]
    assert layers and any(part.weight.dtype == torch.bfloat16 for part in layers)
    assert all(weight.dtype == torch.float32 for weight in backbone.parameters())
    assert rounded.pipeline_parts is backbone.pipeline_parts


def test_a_weight_that_an_embedding_shares_is_not_rounded():
    backbone = tiny_backbone("llama")
    assert backbone.network.config.tie_word_embeddings
    rounded = round_weights(backbone, "bf16-mixed").network
    assert rounded.lm_head.weight is rounded.model.embed_tokens.weight
    assert rounded.lm_head.weight.dtype == torch.float32
    assert rounded.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_without_autocast_the_network_itself_is_used():
    backbone = tiny_backbone("UNet2DModel")
    assert round_weights(backbone, "32-true") is backbone


# Recomputed activations


def gradients(module: Distillation, batch: dict[str, Any]) -> dict[str, Tensor]:
    losses_of(module, batch)["loss"].backward()
    return {name: weight.grad for name, weight in module.named_parameters()}


def saved_bytes(module: Distillation, batch: dict[str, Any]) -> int:
    """Return the bytes that are saved for the backward pass; tensors that are saved twice count twice."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses_of(module, batch)
    return sum(sizes)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_give_the_same_gradients_with_less_memory(family):
    module, batch = distil(family, w_feat=0.1)
    expected, memory = gradients(module, batch), saved_bytes(module, batch)
    module.zero_grad()
    with compute_in_parts(module, False, "blocks"):
        assert same_tensors(gradients(module, batch), expected)
        assert saved_bytes(module, batch) < memory


def test_activations_of_batch_norms_are_not_recomputed():
    module, _ = distil("classifier")
    message = r"^trainer\.checkpoint_activations='blocks': the batch norms .* choose none$"
    with pytest.raises(ValueError, match=message), compute_in_parts(module, False, "blocks"):
        pass


def count_calls(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(("choice", "expected"), [("none", 1), ("blocks", 2)])
def test_the_student_alone_is_computed_twice(choice, expected):
    module, batch = distil("UNet2DModel")
    inner = "down_blocks.0.resnets.0.conv1"
    calls = [count_calls(network.network.get_submodule(inner)) for network in (module.student, module.teacher)]
    with compute_in_parts(module, False, choice):
        gradients(module, batch)
    assert [len(each) for each in calls] == [expected, 1]


def test_dropout_is_repeated_for_the_same_part_of_the_global_batch():
    weight, values = torch.ones(4, requires_grad=True), torch.rand(2, 4)
    passes: list[Tensor] = []

    def forward(values: Tensor) -> Tensor:
        passes.append(torch.nn.functional.dropout(values * weight, 0.5, training=True))
        return passes[-1].square()

    torch.manual_seed(0)
    with DrawsForGlobalBatch(samples=2, rank=1, world=2):
        output = recompute(forward, values)
    output.sum().backward()
    assert len(passes) == 2 and torch.equal(passes[0], passes[1])
    assert 0 < passes[0].count_nonzero() < passes[0].numel()
    assert DrawsForGlobalBatch.active is None


def test_networks_are_restored_after_an_error():
    module, _ = distil("UNet2DModel")
    with pytest.raises(RuntimeError, match="stop"), compute_in_parts(module, False, "blocks"):
        assert "forward" in module.student.network.mid_block.resnets[0].__dict__
        raise RuntimeError("stop")
    assert not any("forward" in part.__dict__ for part in module.student.modules())


# Compiled parts


@pytest.mark.parametrize("taps", ["stages", "units"])
@pytest.mark.parametrize("choice", CHECKPOINT_ACTIVATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_one_part_and_no_hook_is_inside(family, choice, taps):
    module, _ = distil(family, taps=taps)
    for backbone, read in module.networks().items():
        student = backbone is module.student
        recomputed = {"none": [], "blocks": backbone.survivors()}[choice]
        boundaries = {*read, *(backbone.network.get_submodule(name) for name in recomputed if student)}
        parts = find_compiled(backbone.network, boundaries)
        inside = [id(weight) for part in parts for weight in part.parameters()]
        outside = [
            id(weight)
            for part in backbone.network.modules()
            if not boundaries.isdisjoint(set(part.modules()) - {part})
            for weight in part.parameters(recurse=False)
        ]
        assert len(inside) == len(set(inside)) or backbone.writes_text  # tied weights are in two parts
        assert set(inside) | set(outside) == {id(weight) for weight in backbone.network.parameters()}
        for part in parts:
            assert boundaries.isdisjoint(set(part.modules()) - {part})


@pytest.fixture
def compiled(monkeypatch) -> list[Any]:
    """The functions that torch.compile is called with; it returns them as they are."""
    functions: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: functions.append(function) or function)
    return functions


def test_student_teacher_and_the_comparison_are_compiled(compiled):
    module, batch = distil("UNet2DModel")
    expected = gradients(module, batch)
    module.zero_grad()
    with compute_in_parts(module, True, "blocks"):
        assert same_tensors(gradients(module, batch), expected)
    owners = [function.__self__ for function in compiled]
    assert module.teacher.network.mid_block in owners  # whose activations are not recomputed
    assert module.student.network.mid_block.resnets[0] in owners
    assert compiled[-1].__name__ == "compare_maps"
    assert not {"compare_maps"} & module.__dict__.keys()


def test_the_network_without_taps_is_one_part(compiled):
    module, batch = distil("UNet2DModel", w_feat=0)
    with compute_in_parts(module, True, "none"):
        losses_of(module, batch)
    networks = [module.student.network, module.teacher.network]
    assert [function.__self__ for function in compiled[:2]] == networks


@pytest.mark.slow
def test_compiled_training_steps_equal_eager_ones_up_to_rounding():
    teacher = tiny_backbone("UNet2DModel")
    module = distillation(teacher.pruned(bypasses(REMOVED)), teacher)
    batch = tiny_batch(teacher, 2)
    expected = gradients(module, batch)
    for choice in ("none", "blocks"):
        module.zero_grad()
        with compute_in_parts(module, True, choice):
            found = gradients(module, batch)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


# In a job


@pytest.mark.usefixtures("quick_end")
@pytest.mark.slow
def test_a_job_with_recomputed_activations_has_the_same_id_and_bits(configure, overrides, tmp_path, compiled):
    runs = []
    for number, options in enumerate(([], ["trainer.checkpoint_activations=blocks"])):
        run_pipeline(configure(*overrides, *options, f"paths.runs={tmp_path}/runs{number}"))
        runs.append(the_run(tmp_path / f"runs{number}"))
    assert not compiled
    assert runs[0].name == runs[1].name
    (first,), (second,) = ([*(run / "networks" / "distilled").rglob("*.safetensors")] for run in runs)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.usefixtures("quick_end")
def test_a_job_compiles_for_training_alone(configure, overrides, tmp_path, compiled):
    run_pipeline(configure(*overrides, "trainer.compile=true", "trainer.deterministic=false"))
    networks = {type(function.__self__).__name__ for function in compiled}
    assert "Distillation" in networks and "DownBlock2D" in networks
    assert (the_run(tmp_path / "runs") / "networks" / "distilled").exists()
