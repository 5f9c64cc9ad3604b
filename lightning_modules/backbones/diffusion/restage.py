"""BK-SDM's students: a stock configuration of fewer blocks, and which teacher tensor each of theirs starts from.

BK-SDM (arXiv 2305.15798) removes blocks together with their skip connections, so that what is left is a diffusers
U-Net of `layers_per_block: 1` that any tool can load. Its variants:

- base: the second pair of ResNet block and attention of every stage; of the three in an up stage that is the middle one
- small: base, and the middle block
- tiny: small, and the innermost stage

All of it follows from the teacher's own configuration, so it holds for SD1.x, SD2.x, networks of other sizes, and
for UNet2DModel, whose stages are built alike.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from criteria.selection.bk_sdm import VARIANTS

DOWN_ORDER = (
    *("block_out_channels", "down_block_types", "only_cross_attention", "cross_attention_dim"),
    *("attention_head_dim", "transformer_layers_per_block"),
)
"""Fields that hold one entry a stage, outermost first; most may also be one value for all stages."""
UP_ORDER = ("up_block_types", "reverse_transformer_layers_per_block")
"""The same, innermost first."""


def student_config(config: Mapping[str, Any], variant: str) -> dict[str, Any]:
    """The student's configuration, from the complete one of its teacher and one of VARIANTS.

    Keys with a leading underscore are diffusers' notes on the teacher (among them, which fields to set back to their
    defaults) and are left out. Raises ValueError for an unknown variant, and for a teacher that is no such network:
    not two layers a block, no middle block, units that are removed already, or, for tiny, two innermost stages of
    other widths.
    """
    if variant not in VARIANTS:
        raise ValueError(f"selection.variant={variant!r} is unknown; choose one of: {', '.join(VARIANTS)}")
    layers = config.get("layers_per_block")
    if any(count != 2 for count in (layers if isinstance(layers, list | tuple) else [layers])):
        raise ValueError(
            f"teacher.layers_per_block={layers}: BK-SDM removes the second of two layers a block, so choose a teacher "
            "of layers_per_block=2 (one that it has made has 1)"
        )
    if config.get("mid_block_type", "the class' default") is None:
        raise ValueError(
            "teacher.mid_block_type=None: BK-SDM starts from a network with a middle block (its small and tiny have "
            "none); choose such a teacher"
        )
    if config.get("removed_units"):
        raise ValueError(
            f"teacher.removed_units={list(config['removed_units'])}: BK-SDM's sets are those of a whole network; "
            "choose a teacher without removed units"
        )
    student = {key: value for key, value in config.items() if not key.startswith("_")} | {"layers_per_block": 1}
    if variant == "base":
        return student
    student["mid_block_type"] = None
    if variant == "small":
        return student
    widths = list(config["block_out_channels"])
    if len(widths) < 2 or widths[-1] != widths[-2]:
        raise ValueError(
            f"teacher.block_out_channels={widths}: selection.variant='tiny' removes the innermost stage, and the next "
            "one's weights fit what is left only where both are equally wide; choose one of: base, small"
        )
    for names, kept in ((DOWN_ORDER, slice(None, -1)), (UP_ORDER, slice(1, None))):
        for name in names:
            if isinstance(student.get(name), list | tuple):
                student[name] = student[name][kept]
    return student


def origin(key: str, variant: str) -> str:
    """The teacher's name of the tensor that a student's parameter starts from."""
    stage = re.match(r"up_blocks\.(\d+)\.(.*)", key)
    if not stage:
        return key
    place, rest = int(stage[1]), re.sub(r"^(resnets|attentions)\.1\.", r"\1.2.", stage[2])
    return f"up_blocks.{place + 1 if variant == 'tiny' else place}.{rest}"


def goes(key: str, variant: str, stages: int) -> bool:
    """Is a teacher's parameter in a part that is removed? `stages` counts the teacher's."""
    parts = [r"(down|up)_blocks\.\d+\.(resnets|attentions)\.1"]
    if variant != "base":
        parts.append("mid_block")
    if variant == "tiny":
        parts += [rf"down_blocks\.{stages - 1}", rf"down_blocks\.{stages - 2}\.downsamplers", r"up_blocks\.0"]
    return any(re.match(rf"{part}\.", key) for part in parts)


def restage(teacher: nn.Module, variant: str) -> nn.Module:
    """A student of its own, of the teacher's class and with copies of its weights, in eval mode.

    It is on the CPU, or on the meta device where the teacher is. Raises ValueError where `student_config` does, and
    where the two networks do not correspond: each tensor of the student must have a teacher's of the same shape, and
    each that the teacher has in the parts that stay must be taken (layers of a stage that differ in their number of
    transformer blocks fail this).
    """
    config: Any = teacher.config
    cls: Any = type(teacher)
    device = torch.device("meta" if next(teacher.parameters()).is_meta else "cpu")
    with device:
        student = cls.from_config(student_config(config, variant))
    theirs, ours = teacher.state_dict(), student.state_dict()
    taken = {key: origin(key, variant) for key in ours}
    stages = len(config["block_out_channels"])
    wrong = [key for key, source in taken.items() if source not in theirs or theirs[source].shape != ours[key].shape]
    left = [key for key in theirs.keys() - set(taken.values()) if not goes(key, variant, stages)]
    if wrong or left:
        raise ValueError(
            f"selection.variant={variant!r} does not fit this teacher, {cls.__name__} of {config['down_block_types']}: "
            f"without an equal in the teacher {wrong[:5]}, without a place in the student {sorted(left)[:5]}"
        )
    copies: dict[str, Tensor] = {key: theirs[source].to(device, copy=True) for key, source in taken.items()}
    student.load_state_dict(copies, assign=True)  # keeps the teacher's precision
    return student.eval()
