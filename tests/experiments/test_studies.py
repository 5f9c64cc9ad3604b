"""The studies' own programs, on tiny networks."""

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from support.networks import UNETS, tiny_backbone

from experiments.benchmarks.result_speed import __main__ as result_speed
from experiments.studies.additivity import __main__ as additivity
from lightning_modules.backbones.diffusion.unet import UNetBackbone


def test_additivity_compares_summed_scores_with_joint_losses(overrides, data_folder, tmp_path, monkeypatch):
    words = ["additivity", "--subsets", "3", "--ratios", "0.1", "0.6", "--criteria", "output_loss", "magnitude"]
    given = [o for o in overrides if not o.startswith("selection")]
    monkeypatch.setattr(
        sys, "argv", [*words, "--out", str(tmp_path), f"hydra.searchpath=[file://{data_folder}]", *given]
    )
    additivity.main()
    table, summary = pd.read_csv(tmp_path / "results.csv"), pd.read_csv(tmp_path / "correlations.csv")
    assert list(table) == ["ratio", "units", "joint", "output_loss", "magnitude"] and len(table) == 6
    assert list(summary["criterion"]) == ["output_loss", "magnitude"]
    assert np.isfinite(table).all(axis=None) and (table["joint"] > 0).all()
    assert (tmp_path / "additivity.png").stat().st_size > 10_000
    # A set of one unit is its own sum: the measure and the criterion are the same thing.
    alone = table[table["units"] == 1]
    np.testing.assert_allclose(alone["joint"], alone["output_loss"], rtol=1e-5)


def test_random_subsets_keep_to_their_ratio_and_are_repeatable():
    backbone = tiny_backbone("UNet2DModel")
    costs = {unit.name: unit.params for unit in backbone.units()}
    found = additivity.draw_subsets(backbone, 0.4, 5)
    assert found == additivity.draw_subsets(backbone, 0.4, 5)
    assert len({tuple(sorted(names)) for names in found}) > 1
    for names in found:
        spent = sum(costs[name] for name in names)
        rest = [cost for name, cost in costs.items() if name not in names]
        assert spent <= 0.4 * backbone.params() < spent + min(rest)


@pytest.mark.parametrize("steps", [0, 2])
def test_speed_of_results_has_a_row_for_every_student_and_batch(tmp_path, monkeypatch, steps, capsys):
    cls, config = UNETS["UNet2DConditionModel"]
    assert cls is UNet2DConditionModel

    def tiny(name: str, latents: int | None) -> UNetBackbone:
        with torch.device("meta"):
            return UNetBackbone(UNet2DConditionModel(**config), DDPMScheduler(), sample_size=latents)

    monkeypatch.setattr(result_speed, "build_on_meta", tiny)
    given = ["--dtype", "bfloat16"] if steps else []
    out = tmp_path / "rows.csv"
    arguments = ["--ratios", "0.3", "--repeats", "1", "--batch", "1", "2", "--steps", str(steps), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["result_speed", *arguments, *given])
    result_speed.main()
    table = pd.read_csv(out)
    assert list(table["network"]) == [
        *["teacher"] * 2,
        *["bypass 0.3, fewest MACs saved"] * 2,
        *["bypass 0.3, most MACs saved"] * 2,
    ]
    removed = table.set_index("network")["parameters removed"]
    assert removed["teacher"].eq(0).all() and removed.drop("teacher").between(0.3, 0.32).all()
    fewest, most = (table[table["network"].str.contains(word)]["MACs removed"].iloc[0] for word in ("fewest", "most"))
    assert fewest < most
    assert ("2 guided steps s" in table) == bool(steps)
