"""Loading networks and building students without random weights first."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import FAMILIES, bypasses, same_tensors, tiny_backbone
from torch import nn

from lightning_modules.backbones.files import is_finite
from lightning_modules.backbones.loading import load_network

DRAWING = ("pixart",)
"""Families whose constructor draws a small table of random numbers; for all others, no number is drawn"""


def list_tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers by name, also the buffers that are in no file, such as positions."""
    return dict(network.named_parameters()) | dict(network.named_buffers())


def list_buffers_outside_files(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that are not in the network's file of weights."""
    return {name: buffer for name, buffer in network.named_buffers() if name not in network.state_dict()}


@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
def test_a_loaded_network_equals_the_saved_one_with_buffers_that_are_in_no_file(family: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(family)
    backbone.save(tmp_path)
    before = torch.get_rng_state()
    loaded = load_network(tmp_path)
    assert same_tensors(list_tensors(loaded), list_tensors(backbone.network))
    assert family in DRAWING or torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
def test_a_student_has_the_buffers_of_a_network_that_is_built_as_usual(family: str) -> None:
    backbone = tiny_backbone(family)
    before = torch.get_rng_state()
    student = backbone.pruned(bypasses([backbone.units()[0].name])).network
    assert family in DRAWING or torch.equal(torch.get_rng_state(), before)
    build: Any = type(student) if family == "llama" else type(student).from_config
    usual = build(student.config)
    assert list_tensors(student).keys() == list_tensors(usual).keys()
    assert same_tensors(list_buffers_outside_files(student), list_buffers_outside_files(usual))
    assert all(parameter.isfinite().all() for parameter in student.parameters())


def test_some_network_has_buffers_that_are_in_no_file() -> None:
    assert [name for name in [*FAMILIES, "llama"] if list_buffers_outside_files(tiny_backbone(name).network)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype, value: float) -> None:
    weights = torch.linspace(-1, 1, 300).to(dtype).view(3, 100)
    assert is_finite(weights)
    for place in (0, 150, 299):
        broken = weights.clone()
        broken.view(-1)[place] = value
        assert not is_finite(broken)


@pytest.mark.parametrize("tensor", [torch.zeros(0), torch.tensor(3), torch.tensor([True]), torch.zeros(())])
def test_an_empty_tensor_and_whole_numbers_are_finite(tensor: torch.Tensor) -> None:
    assert is_finite(tensor)
