"""AdamWOfMatrices: it is AdamW, with decay for what has more than one dimension."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.networks import tiny_backbone, tiny_batch
from support.results import the_run
from torch import Tensor, nn

from conf.schema import ConfigError, build
from experiments.engine.pipeline import run_pipeline
from lightning_modules.modules.base import can_be_fused
from lightning_modules.training.optimizers import AdamWOfMatrices

RATES = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}


def train(make_optimizer: Any) -> dict[str, Tensor]:
    """The weights of a tiny network after three steps."""
    backbone = copy.deepcopy(tiny_backbone("UNet2DModel"))
    optimizer = make_optimizer(list(backbone.network.parameters()))
    for step in range(3):
        optimizer.zero_grad()
        backbone.loss(backbone.calibration_inputs(tiny_batch(backbone), step)).backward()
        optimizer.step()
    return dict(backbone.network.state_dict())


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_one_step_is_adamws_with_decay_for_matrices_alone(decay):
    weights = [nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0))) for size in ((4, 3), (4,))]

    def step(cls: Any, weight_decay: float) -> list[Tensor]:
        copies = [nn.Parameter(weight.detach().clone()) for weight in weights]
        optimizer = cls(copies, weight_decay=weight_decay, **RATES)
        for number, weight in enumerate(copies):
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()
        return [weight.detach() for weight in copies]

    (matrix, bias), (decayed, _), (_, free) = (
        step(*arguments)
        for arguments in ((AdamWOfMatrices, decay), (torch.optim.AdamW, decay), (torch.optim.AdamW, 0.0))
    )
    assert torch.equal(matrix, decayed) and torch.equal(bias, free)
    assert torch.equal(bias, step(torch.optim.AdamW, decay)[1]) == (decay == 0)


def test_a_training_without_decay_has_adamws_bits():
    own, theirs = (
        train(functools.partial(cls, weight_decay=0.0, **RATES)) for cls in (AdamWOfMatrices, torch.optim.AdamW)
    )
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)


def test_biases_and_norms_are_the_group_without_decay():
    network = tiny_backbone("UNet2DModel").network
    optimizer = AdamWOfMatrices(network.parameters(), weight_decay=0.3)
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    norms = {name for name, part in network.named_modules() if isinstance(part, nn.GroupNorm)}
    expected = {name for name in names.values() if name.endswith("bias") or name.rpartition(".")[0] in norms}
    assert {names[id(parameter)] for parameter in free["params"]} == expected
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_networks_of_one_kind_have_one_group():
    for size, decay in (((2, 2), 0.1), ((2,), 0.0)):
        (group,) = AdamWOfMatrices([nn.Parameter(torch.zeros(size))], weight_decay=0.1).param_groups
        assert group["weight_decay"] == decay


@pytest.mark.usefixtures("quick_end")
def test_a_job_trains_with_it(configure, overrides, tmp_path: Path):
    cfg = configure(*overrides, "optimizer=adamw_matrices", "optimizer.weight_decay=0.1")
    assert (cfg.optimizer.lr, list(cfg.optimizer.betas)) == (3e-4, [0.9, 0.999])
    with torch.device("meta"):
        weights = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))]
    assert can_be_fused(build(cfg.optimizer), weights, "32-true")
    run_pipeline(cfg)
    assert (the_run(tmp_path / "runs") / "networks" / "distilled").exists()


def test_an_unknown_setting_of_it_is_refused(configure):
    with pytest.raises(
        ConfigError, match=r"^optimizer\.momentum is unknown; there are: params, lr, betas, eps, weight"
    ):
        configure("optimizer=adamw_matrices", "+optimizer.momentum=0.9")
