"""Scoring by prefix reuse under a memory bound, and with compiled parts."""

import pytest
import torch
from support.networks import tiny_backbone, tiny_batch

from lightning_modules.backbones import prefix_reuse
from lightning_modules.backbones.prefix_reuse import Replay


def outputs(backbone, inputs):
    with torch.no_grad():
        return dict(backbone.predict_without_each(inputs, [unit.name for unit in backbone.units()]))


@pytest.fixture
def case():
    backbone = tiny_backbone("UNet2DConditionModel")
    return backbone, backbone.calibration_inputs(tiny_batch(backbone, 5), seed=0)


def held_of_one(backbone, inputs) -> int:
    recorder = Replay(backbone.network, [backbone.network.get_submodule(unit.name) for unit in backbone.units()])
    with torch.no_grad(), recorder.recording():
        backbone.predict(prefix_reuse.take_samples(inputs, slice(0, 1)))
    return recorder.recorded_bytes()


@pytest.mark.parametrize(("samples", "parts"), [(1, 5), (2, 3), (4, 2), (5, 1)])
def test_a_memory_bound_is_kept_by_taking_the_batch_in_parts(case, samples, parts, monkeypatch):
    backbone, inputs = case
    whole, one = outputs(backbone, inputs), held_of_one(backbone, inputs)
    held = []

    class Watched(Replay):
        def first_change(self) -> int:
            held.append(self.recorded_bytes())
            return super().first_change()

    monkeypatch.setattr(prefix_reuse, "Replay", Watched)
    backbone.memory_bound = samples * one
    found = outputs(backbone, inputs)
    assert max(held) == samples * one and len(held) == parts * len(backbone.units())
    assert list(found) == list(whole)
    for name, output in found.items():
        torch.testing.assert_close(output, whole[name], rtol=1e-4, atol=1e-5)


def test_a_bound_below_one_sample_is_refused(case):
    backbone, inputs = case
    backbone.memory_bound = held_of_one(backbone, inputs) - 1
    with pytest.raises(ValueError, match=r"calibration\.memory_gib=.* is less than the activations of one sample"):
        outputs(backbone, inputs)


@pytest.mark.slow
def test_compiled_parts_give_the_same_outputs_and_bypasses_compile_nothing(case, monkeypatch):
    """Traced, but not lowered: what is tested is which graphs are made."""
    backbone, inputs = case
    eager, compile_part, graphs = outputs(backbone, inputs), torch.compile, []

    def counted(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda forward: compile_part(forward, backend=counted))
    backbone.compiled = {}
    names = [unit.name for unit in backbone.units()]
    with torch.no_grad():
        stream = backbone.predict_without_each(inputs, names)
        found = dict([next(stream)])
        dense = len(graphs)
        found |= dict(stream)
    assert dense > 0 and len(graphs) == dense
    assert len(backbone.compiled) > len(names)
    for name, output in found.items():
        torch.testing.assert_close(output, eager[name], rtol=1e-5, atol=1e-6)
    outputs(backbone, inputs)  # another batch
    assert len(graphs) == dense
