"""A budget of measured latency: what units save, what the built student saves, and what identifies such a run."""

import json
from types import SimpleNamespace

import pytest
import torch
from support.networks import bypasses, tiny_backbone
from support.results import the_run

from experiments.engine.pipeline import run_pipeline
from experiments.engine.run import Run
from lightning_modules.metrics import unit_latency
from lightning_modules.metrics.unit_latency import WHOLE, UnitLatencies, measure_unit_latencies
from lightning_modules.modules.joint_loss import JointMeasure

CPU = torch.device("cpu")


def test_savings_are_the_differences_of_measured_times(monkeypatch):
    backbone = tiny_backbone("UNet2DModel")
    units, made = backbone.units(), []

    def timed(calls, repeats, device):
        """As if every unit that is left cost one millisecond, counted while the call runs."""
        found = {}
        for name, call in calls.items():
            with monkeypatch.context() as patch:
                patch.setattr(type(backbone), "predict", lambda self, inputs: made.append(len(self.survivors())))
                call()
            found[name] = float(made[-1])
        return found

    monkeypatch.setattr(unit_latency, "latencies", timed)
    protocol = SimpleNamespace(latency_batch=2, latency_repeats=1)
    found = measure_unit_latencies(backbone, units, protocol, CPU)
    assert found == UnitLatencies(1000 * len(units), {unit.name: 1000 for unit in units})
    assert WHOLE not in {unit.name for unit in units}


def test_the_joint_loss_is_the_mean_squared_output_difference():
    backbone = tiny_backbone("UNet2DModel")
    from support.networks import tiny_batch

    batch = tiny_batch(backbone, 4)
    halves = [{key: value[i : i + 2] for key, value in batch.items()} for i in (0, 2)]
    names = [unit.name for unit in backbone.units()][2:5]
    measure = JointMeasure(backbone, halves, 0, CPU)
    inputs = backbone.calibration_inputs(batch, 0)
    with torch.no_grad():
        student = backbone.pruned(bypasses(names)).predict(inputs)
        expected = float((student.double() - backbone.predict(inputs).double()).square().mean())
    assert measure(names) == pytest.approx(expected, rel=1e-5)
    assert measure([]) == 0


def test_a_job_with_a_latency_budget_states_what_the_built_student_saves(
    overrides, configure, tmp_path, quick_end, monkeypatch, capsys
):
    savings = iter(range(10**6))

    def measured_latencies(backbone, units, protocol, device):
        return UnitLatencies(1000, {unit.name: 100 + next(savings) % 3 for unit in units})

    monkeypatch.setattr("experiments.engine.stages.select.measure_unit_latencies", measured_latencies)
    run_pipeline(configure(*overrides, "selection.budget=latency", "distillation=none"))
    run = the_run(tmp_path / "runs")
    metrics, measured = (json.loads((run / name).read_text()) for name in ("metrics.json", "measured.json"))
    assert "plan/achieved_ratio" not in metrics and metrics["plan/budget"] == "latency"
    assert metrics["plan/removed_units"] == 5  # at 100 to 102 of 1000 each, 0.5 to 0.6 of them
    achieved = 1 - measured["student/latency_ms"] / measured["teacher/latency_ms"]
    assert measured["plan/achieved_ratio"] == pytest.approx(achieved)
    assert ("does not add up" in capsys.readouterr().out) == (not 0.5 <= achieved <= 0.6)


def test_measured_costs_identify_a_run_only_if_they_decide_the_plan(configure):
    def ids(*given: str) -> set[str]:
        batches = ("evaluation.latency_batch=1", "evaluation.latency_batch=16")
        return {Run(configure(*given, batch), "teacher").id for batch in batches}

    assert len(ids("selection.budget=params")) == 1
    assert len(ids("selection.budget=latency")) == 2


def test_latency_of_channels_is_refused_before_anything_is_scored(overrides, configure):
    given = ["criterion=magnitude", "criterion.level=channel", "selection=threshold", "selection.budget=latency"]
    with pytest.raises(ValueError, match=r"selection\.budget='latency' is for blocks and operators"):
        run_pipeline(configure(*overrides, *given, "distillation=none"))
