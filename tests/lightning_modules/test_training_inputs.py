"""The inputs of a training batch: captions that are dropped."""

import re
from typing import Any

import pytest
import torch
from support.distillation import REMOVED, distillation, losses_of
from support.networks import bypasses, tiny_backbone, tiny_batch
from torch import Tensor

from conf.schema import ConfigError
from datamodules.latents import SHARED
from lightning_modules.losses.timesteps import Timesteps
from lightning_modules.modules.distillation import Distillation
from lightning_modules.modules.training_inputs import draw_training_inputs, drop_captions
from lightning_modules.nested import tensors_by_path
from lightning_modules.training.ranks import DrawsForGlobalBatch

WITH_TEXT = ("sd", "sdxl", "pixart", "sd3", "flux")


def inputs_of(backbone: Any, batch: dict[str, Any], drop_text: float) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return tensors_by_path(draw_training_inputs(backbone, batch, Timesteps(), drop_text))


@pytest.mark.parametrize("family", WITH_TEXT)
def test_dropped_captions_leave_the_conditions_of_the_empty_one(family):
    backbone = tiny_backbone(family)
    batch = tiny_batch(backbone)
    kept, dropped = inputs_of(backbone, batch, 0.0), inputs_of(backbone, batch, 1.0)
    torch.manual_seed(3)
    assert all(
        torch.equal(value, kept[name]) for name, value in tensors_by_path(backbone.training_inputs(batch)).items()
    )
    empty = tensors_by_path(backbone.pipeline_parts.encode_empty_text(4, torch.device("cpu")), "conditions")
    assert dropped.keys() == kept.keys() >= empty.keys()
    for name, value in dropped.items():
        assert torch.equal(value, empty.get(name, kept[name])), name
    changed = {name for name in kept if not torch.equal(kept[name], dropped[name])}
    assert "conditions/encoder_hidden_states" in changed
    assert not any(name.endswith(SHARED) for name in changed)


def test_student_and_teacher_get_the_same_captions():
    teacher = tiny_backbone("sd")
    student, batch = teacher.pruned(bypasses(REMOVED)), tiny_batch(teacher)
    dropped = losses_of(distillation(student, teacher, drop_text=1.0), batch)
    empty = losses_of(distillation(student, teacher), batch | {"caption": [""] * 4})
    own = losses_of(distillation(student, teacher), batch)
    for name, value in dropped.items():
        torch.testing.assert_close(value, empty[name])
    assert not torch.isclose(dropped["output"], own["output"], rtol=1e-5)


def test_two_ranks_drop_the_captions_that_one_process_drops():
    backbone = tiny_backbone("sd")
    batch = tiny_batch(backbone)
    states = backbone.conditions(batch, torch.device("cpu"))["encoder_hidden_states"]

    def drop(rows: slice) -> Tensor:
        torch.manual_seed(5)
        inputs = {"sample": torch.zeros(4, 1)[rows], "conditions": {"encoder_hidden_states": states[rows]}}
        return drop_captions(backbone, inputs, {}, 0.5)["encoder_hidden_states"]

    whole = drop(slice(None))
    for rank in range(2):
        with DrawsForGlobalBatch(2, rank, 2):
            assert torch.equal(drop(slice(rank, None, 2)), whole[rank::2])
    assert 0 < sum(torch.equal(row, own) for row, own in zip(whole, states, strict=True)) < 4


def test_a_probability_for_a_network_without_captions_is_refused(configure):
    settings = configure("distillation.drop_text=0.1").distillation
    message = "distillation.drop_text=0.1: a UNet2DModel takes no captions; choose 0"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Distillation.check_settings(settings, tiny_backbone("UNet2DModel"), narrower=False)
    Distillation.check_settings(settings, tiny_backbone("sd"), narrower=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["distillation.drop_text=1.5"], "distillation.drop_text=1.5 is out of range; choose a probability, 0 to 1"),
        (
            [
                *("distillation=output_only", "distillation.teacher_outputs=stored", "latents=/somewhere"),
                "distillation.drop_text=0.1",
            ],
            "distillation.drop_text=0.1: the outputs for distillation.teacher_outputs='stored' are those for ",
        ),
    ],
)
def test_a_probability_that_cannot_be_used_is_refused(configure, given, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        configure(*given)
