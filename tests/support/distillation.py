"""A Distillation of a tiny student and its teacher, and the tensors that its terms are computed from."""

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
    network: DiffusionBackbone, names: list[str], batch: dict[str, Any], seed: int = 3, index: int = 0
) -> dict[str, Tensor]:
    """Return the feature maps of modules, the output and the target, with the noise that `losses_of` draws.

    If a module returns several values, its feature map is the one at `index`.
    """
    torch.manual_seed(seed)
    inputs = network.training_inputs(batch)
    tensors: dict[str, Tensor] = {}
    for name in names:

        def keep(module: Any, given: Any, output: Any, name: str = name) -> None:
            tensors[name] = output[index] if isinstance(output, tuple) else output

        network.network.get_submodule(name).register_forward_hook(keep)
    tensors["output"] = network.predict(inputs)
    for module in network.modules():
        module._forward_hooks.clear()
    return tensors | {"target": inputs["target"]}
