"""The benchmark of stored outputs of the teacher, on a few pictures."""

import sys

import pandas as pd
import pytest
import torch

from experiments.benchmarks.stored_teacher import __main__ as stored_teacher
from lightning_modules.modules.distillation import Distillation


@pytest.mark.slow
def test_the_benchmark_compares_stored_outputs_with_a_live_teacher(tmp_path, monkeypatch, quick_end):
    words = ["--draws", "1", "2", "--seeds", "3", "--images", "8", "--steps", "4", "--batch", "4", "--repeats", "1"]
    words += ["--output", str(tmp_path / "results.csv"), "debug=tiny", "evaluation.loss_samples=4"]
    words += ["calibration.samples=4", "trainer=cpu", "trainer.precision=bf16-mixed"]
    steps, losses = set(), Distillation.losses

    def record(module, batch):
        steps.add((module.has_stored_outputs, "teacher_output" in batch, module.teacher.network.conv_in.weight.dtype))
        return losses(module, batch)

    monkeypatch.setattr(Distillation, "losses", record)
    monkeypatch.setattr(stored_teacher, "TIMED_STEPS", 1)
    monkeypatch.setattr(sys, "argv", ["stored_teacher", *words])
    stored_teacher.main()
    # A live teacher reads no stored outputs, and is prepared for the precision, also where no Trainer does it.
    assert steps == {(False, False, torch.bfloat16), (True, True, torch.float32)}
    table = pd.read_csv(tmp_path / "results.csv")
    assert list(table["teacher"]) == ["live", "stored, 1 draw", "stored, 2 draws"]
    assert table["seed"].eq(3).all() and table["steps"].eq(4).all() and table["passes over the pictures"].eq(2).all()
    assert table["output loss, pruned"].nunique() == 1 and table["output loss"].nunique() == 3
    ratios = table["step, of the live teacher's"]
    assert ratios[0] == 1 and ratios[1] == ratios[2] > 0
    costs = table["storing, in steps of the live teacher"]
    assert costs[0] == 0 and (costs[1:] > 0).all()
