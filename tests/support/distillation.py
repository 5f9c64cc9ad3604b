"""A tiny student and its teacher in a Distillation, and what its terms are made of."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.modules.distillation import Distillation

REMOVED = ["down_blocks.0.resnets.0", "mid_block.resnets.1", "up_blocks.0.resnets.0"]  # one stage is emptied
STAGES = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]


def distillation(
    student: DiffusionBackbone, teacher: DiffusionBackbone, cls=Distillation, dump=Path("/nowhere"), **options: Any
) -> Distillation:
    return cls(
        student,
        teacher,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.ConstantLR, factor=1.0),
        seed=0,
        dump=dump,
        **options,
    )


def losses_of(module: Distillation, batch: dict[str, Any], seed: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return module.losses(batch)


@torch.no_grad()
def outputs_of(
    network: DiffusionBackbone, names: list[str], batch: dict[str, Any], seed: int = 3, which: int = 0
) -> dict[str, Tensor]:
    """The feature maps, the output and the target under the noise that `losses_of` draws.

    `which` says where the feature map stands among the outputs of a module that gives several.
    """
    torch.manual_seed(seed)
    inputs = network.training_inputs(batch)
    found: dict[str, Tensor] = {}
    for name in names:

        def keep(module: Any, given: Any, output: Any, name: str = name) -> None:
            found[name] = output[which] if isinstance(output, tuple) else output

        network.network.get_submodule(name).register_forward_hook(keep)
    found["output"] = network.predict(inputs)
    for module in network.modules():
        module._forward_hooks.clear()
    return found | {"target": inputs["target"]}
