"""Every family of networks as a backbone: what removing a unit means, in place and for good, and what comes back."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.downsampling import Downsample2D
from helpers_networks import (
    FAMILIES,
    SMALLER,
    TRANSFORMERS,
    UNETS,
    bypasses,
    replacements,
    same_tensors,
    tiny_backbone,
    tiny_batch,
    with_zeroed,
)
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(params=FAMILIES)
def backbone(request) -> Any:
    return tiny_backbone(request.param)


@pytest.fixture
def inputs(backbone) -> dict:
    return backbone.calibration_inputs(tiny_batch(backbone, 2), seed=0)


@torch.no_grad()
def test_bypassing_any_one_unit_equals_zeroing_its_last_layers(backbone, inputs):
    dense = backbone.predict(inputs)
    for unit in backbone.units():
        expected = with_zeroed(backbone, [unit.name]).predict(inputs)
        with backbone.without([unit.name]):
            found = backbone.predict(inputs)
        assert torch.equal(found, expected), (unit.name, (found-expected).abs().max())
        assert not torch.equal(found, dense), f"{unit.name} does nothing in this network: the test says nothing of it"
