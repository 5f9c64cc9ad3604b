"""BK-SDM's students: stock U-Nets with fewer blocks, each tensor of which starts from one of the teacher's.

BK-SDM (arXiv 2305.15798) removes blocks together with their skip connections, so that the student is a U-Net of
diffusers with `layers_per_block: 1`, which any tool can load. Its variants remove:

- base: the second pair of ResNet block and attention in every stage; in an up stage, which has three, the middle one
- small: the same, and the middle block
- tiny: the same as small, and the innermost stage

The student's configuration is derived from the teacher's, so this works for SD1.x, SD2.x, networks of other sizes, and
UNet2DModel, whose stages are built alike.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn

from criteria.selection.bk_sdm import VARIANTS

DOWN_ORDER = (
    *("block_out_channels", "down_block_types", "only_cross_attention", "cross_attention_dim"),
    *("attention_head_dim", "transformer_layers_per_block"),
)
"""Fields with one entry per stage, outermost first; most may also be one value for all stages"""
UP_ORDER = ("up_block_types", "reverse_transformer_layers_per_block")
"""Fields with one entry per stage, innermost first"""


def make_student_config(config: Mapping[str, Any], variant: str) -> dict[str, Any]:
    """Return the student's configuration for one of VARIANTS, from the complete configuration of its teacher.

    Keys with a leading underscore are left out: they are notes of diffusers on the teacher, such as which fields to
    reset to their defaults. Raises ValueError for an unknown variant, and for a teacher that does not have two layers
    per block, has no middle block, has lost units, or, for tiny, has innermost stages of different widths.
    """
    if variant not in VARIANTS:
        raise ValueError(f"selection.variant={variant!r} is unknown; choose one of: {', '.join(VARIANTS)}")
    layers = config.get("layers_per_block")
    if any(count != 2 for count in (layers if isinstance(layers, list | tuple) else [layers])):
        raise ValueError(
            f"teacher.layers_per_block={layers}: BK-SDM removes the second of two layers per block, so choose a "
            "teacher of layers_per_block=2 (a student of BK-SDM has 1)"
        )
    if config.get("mid_block_type", "the class' default") is None:
        raise ValueError(
            "teacher.mid_block_type=None: BK-SDM starts from a network with a middle block (its small and tiny have "
            "none); choose such a teacher"
        )
    if config.get("removed_units"):
        raise ValueError(
            f"teacher.removed_units={list(config['removed_units'])}: BK-SDM starts from a whole network; choose a "
            "teacher without removed units"
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
            f"teacher.block_out_channels={widths}: selection.variant='tiny' removes the innermost stage, and the rest "
            "fits together only where the two innermost stages are equally wide; choose one of: base, small"
        )
    for names, kept in ((DOWN_ORDER, slice(None, -1)), (UP_ORDER, slice(1, None))):
        for name in names:
            if isinstance(student.get(name), list | tuple):
                student[name] = student[name][kept]
    return student


def find_source(key: str, variant: str) -> str:
    """Return the name of the teacher's tensor that a student's tensor `key` starts from."""
    stage = re.match(r"up_blocks\.(\d+)\.(.*)", key)
    if not stage:
        return key
    number, rest = int(stage[1]), re.sub(r"^(resnets|attentions)\.1\.", r"\1.2.", stage[2])
    return f"up_blocks.{number + 1 if variant == 'tiny' else number}.{rest}"


def is_removed(key: str, variant: str, stages: int) -> bool:
    """Tell whether a teacher's tensor is in a part that a variant removes; `stages` is the teacher's number of them."""
    parts = [r"(down|up)_blocks\.\d+\.(resnets|attentions)\.1"]
    if variant != "base":
        parts.append("mid_block")
    if variant == "tiny":
        parts += [rf"down_blocks\.{stages - 1}", rf"down_blocks\.{stages - 2}\.downsamplers", r"up_blocks\.0"]
    return any(re.match(rf"{part}\.", key) for part in parts)


def restage(teacher: nn.Module, variant: str) -> nn.Module:
    """Return a student of the teacher's class with copies of its weights, in eval mode.

    It is on the CPU, or on the meta device where the teacher is there. Raises ValueError where `make_student_config`
    does, and where the two networks do not correspond: each tensor of the student must have one of the same shape in
    the teacher, and each tensor in the teacher's remaining parts must be used. (Both fail where the layers of a stage
    have different numbers of transformer blocks.)
    """
    config: Any = teacher.config
    cls: Any = type(teacher)
    device = torch.device("meta" if next(teacher.parameters()).is_meta else "cpu")
    with device, no_init_weights():
        student = cls.from_config(make_student_config(config, variant))
    teacher_state, student_state = teacher.state_dict(), student.state_dict()
    sources = {key: find_source(key, variant) for key in student_state}
    stages = len(config["block_out_channels"])
    unmatched = [
        key
        for key, source in sources.items()
        if source not in teacher_state or teacher_state[source].shape != student_state[key].shape
    ]
    unused = [key for key in teacher_state.keys() - set(sources.values()) if not is_removed(key, variant, stages)]
    if unmatched or unused:
        raise ValueError(
            f"selection.variant={variant!r} does not fit this teacher, {cls.__name__} of {config['down_block_types']}: "
            f"tensors of the student without one in the teacher: {unmatched[:5]}; tensors of the teacher without one "
            f"in the student: {sorted(unused)[:5]}"
        )
    copies: dict[str, Tensor] = {key: teacher_state[source].to(device, copy=True) for key, source in sources.items()}
    student.load_state_dict(copies, assign=True)  # keeps the teacher's precision
    return student.eval()
