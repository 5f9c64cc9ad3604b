"""Pipelines as lists: a stage twice, several rounds of pruning, and lists that cannot be run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.process import ROOT
from support.results import differences, files, read_repeatable_history, the_run

from conf.schema import ConfigError
from experiments.engine.artefacts import read_json
from experiments.engine.identity import get_effective_settings
from experiments.engine.pipeline import make_stages, run_pipeline
from experiments.engine.stage import Stage

pytestmark = pytest.mark.usefixtures("quick_end")

STAGES = "experiments.engine.stages"
TWICE = f"""name: twice
stages:
  score: {{_target_: {STAGES}.score.Score}}
  select: {{_target_: {STAGES}.select.Select}}
  build: {{_target_: {STAGES}.build.Build, makes: pruned}}
  distil: {{_target_: {STAGES}.distil.Distil, makes: distilled}}
  distil_again:
    _target_: {STAGES}.distil.Distil
    makes: distilled_again
    settings: {{trainer: {{steps: 2}}, distillation: {{w_feat: 0.0}}}}
  evaluate: {{_target_: {STAGES}.evaluate.Evaluate}}
  export: {{_target_: {STAGES}.export.Export}}
"""
ROUNDS = f"""name: rounds
stages:
  score: {{_target_: {STAGES}.score.Score}}
  select: {{_target_: {STAGES}.select.Select, settings: {{selection: {{ratio: 0.2}}}}}}
  build: {{_target_: {STAGES}.build.Build, makes: pruned}}
  distil: {{_target_: {STAGES}.distil.Distil, makes: distilled}}
  score_again: {{_target_: {STAGES}.score.Score}}
  select_again: {{_target_: {STAGES}.select.Select, settings: {{selection: {{ratio: 0.3}}}}}}
  build_again: {{_target_: {STAGES}.build.Build, makes: pruned_again}}
  distil_again: {{_target_: {STAGES}.distil.Distil, makes: distilled_again}}
  evaluate: {{_target_: {STAGES}.evaluate.Evaluate}}
  export: {{_target_: {STAGES}.export.Export}}
"""
PROGRESSIVE = (ROOT / "conf" / "pipeline" / "progressive.yaml").read_text()
OWN = {"twice": TWICE, "rounds": ROUNDS}
"""Lists of stages outside the repository"""
FEW_STEPS = (ROOT / "conf" / "pipeline" / "few_steps.yaml").read_text()
LISTS = {**OWN, "progressive": PROGRESSIVE, "few_steps": FEW_STEPS}
OPTIONS = {"progressive": ["repair=least_squares", "repair.samples=8"]}


@pytest.fixture
def lists(data_folder) -> None:
    """Write the pipelines of `OWN` as files outside the repository."""
    (data_folder / "pipeline").mkdir(exist_ok=True)
    for name, content in OWN.items():
        (data_folder / "pipeline" / f"{name}.yaml").write_text(content)


def results(run: Path) -> dict[str, Any]:
    """All that must not depend on interruptions."""
    names = files(run)
    kept = [name for name in names if name.endswith((".safetensors", ".npy"))]
    kept += [name for name in names if name.startswith(("scores", "plan", "metrics", "repair"))]
    histories = [name for name in names if name.startswith("history/")]
    return {name: (run / name).read_bytes() for name in kept} | {
        name: read_repeatable_history(run / name) for name in histories
    }


class Killed(BaseException):
    """As if the process had been killed between two stages."""


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.slow
def test_a_pipeline_stopped_between_stages_ends_in_the_same_bits(
    configure, sampling, lists, tmp_path, monkeypatch, name
):
    job = [override for override in sampling if not override.startswith("paths.runs=")]
    job += [f"pipeline={name}", *OPTIONS.get(name, [])]
    undisturbed = configure(*job, f"paths.runs={tmp_path}/undisturbed")
    run_pipeline(undisturbed)
    expected = results(the_run(tmp_path / "undisturbed"))
    stages, begun = [stage.name for stage in make_stages(undisturbed)], []
    assert len(stages) == len(set(stages)) == LISTS[name].count(f"_target_: {STAGES}")

    for kind in {type(stage) for stage in make_stages(undisturbed)}:
        run = kind.run

        def stopping(self: Stage, job: Any, run: Any = run) -> None:
            if self.name not in begun:
                begun.append(self.name)
                raise Killed
            run(self, job)

        monkeypatch.setattr(kind, "run", stopping)
    cfg = configure(*job, f"paths.runs={tmp_path}/killed")
    for _ in stages:
        with pytest.raises(Killed):
            run_pipeline(cfg)
    run_pipeline(cfg)
    assert begun == stages
    assert differences(results(the_run(tmp_path / "killed")), expected) == []


@pytest.mark.slow
def test_every_network_of_a_pipeline_is_measured_in_order(configure, sampling, lists, tmp_path):
    run_pipeline(configure(*sampling, "pipeline=rounds"))
    run = the_run(tmp_path / "runs")
    metrics, measured = read_json(run / "metrics.json"), read_json(run / "measured.json")
    names = ["teacher", "pruned", "distilled", "pruned_again", "distilled_again"]
    assert metrics["networks"] == names
    assert {path.name for path in (run / "networks").iterdir()} == set(names[1:])
    assert {path.name for path in (run / "samples").iterdir()} == set(names)
    params = [metrics[f"{name}/params"] for name in names]
    assert params[0] > params[1] == params[2] > params[3] == params[4] == metrics["student/params"]
    assert metrics["plan/achieved_ratio"] == 1 - params[-1] / params[0]
    assert 0.2 <= 1 - params[1] / params[0] <= 0.3 and 0.3 <= 1 - params[3] / params[2] <= 0.4
    assert metrics["eval/output_loss"] == metrics["distilled_again/output_loss"]
    assert measured["student/latency_ms"] > 0
    first, second = read_json(run / "plan.json"), read_json(run / "plan-select_again.json")
    assert metrics["plan/removed_units"] == len(first["changes"]) + len(second["changes"])
    assert not {change["unit"] for change in first["changes"]} & {change["unit"] for change in second["changes"]}
    assert set(read_json(run / "scores-score_again.json")["scores"]) == set(
        read_json(run / "scores.json")["scores"]
    ) - {change["unit"] for change in first["changes"]}


@pytest.mark.slow
def test_a_repair_comes_between_building_and_training(configure, overrides, lists, tmp_path):
    run_pipeline(configure(*overrides, "pipeline=progressive", *OPTIONS["progressive"]))
    run = the_run(tmp_path / "runs")
    metrics = read_json(run / "metrics.json")
    assert metrics["networks"][1:4] == ["pruned", "repaired", "distilled"]
    assert metrics["networks"][4:] == ["pruned_again", "repaired_again", "distilled_again"]
    for again in ("", "_again"):
        record = read_json(run / f"repair{'-repair_again' if again else ''}.json")
        assert record["output_loss"] < record["output_loss_before"]
        weights = [load_file(next((run / "networks" / f"{name}{again}").glob("*.safetensors"))) for name in NETWORKS]
        changed = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
        fitted = {site["layer"] for site in record["sites"] if "ridge" in site}
        assert changed == {name for name in weights[0] if name.rpartition(".")[0] in fitted}


def test_a_job_without_a_repair_is_the_job_from_before_there_were_repairs(configure, overrides, tmp_path):
    """The stage is in the list, but neither the run's id nor its folder shows it."""
    idle, removed = (
        get_effective_settings(configure(*overrides, *more)) for more in ((), ("~pipeline.stages.repair",))
    )
    assert idle == removed and "repair" not in idle["pipeline"]["stages"]
    of_stage = "+pipeline.stages.repair.settings={repair: {samples: 8}}"
    assert get_effective_settings(configure(*overrides, of_stage)) == idle  # the group chooses none
    ids = [get_effective_settings(configure(*overrides, "repair=least_squares", *more)) for more in ((), (of_stage,))]
    assert ids[0] != ids[1] and all("repair" in each["pipeline"]["stages"] for each in ids)
    chosen = get_effective_settings(configure(*overrides, "repair=least_squares"))
    assert list(chosen["pipeline"]["stages"])[3] == "repair" and chosen["repair"]["samples"] == 256


def test_a_repair_of_more_samples_than_there_are_is_refused_before_scoring(configure, overrides, tmp_path):
    with pytest.raises(ValueError, match=r"repair\.samples=1000: data\.train has 48 samples"):
        run_pipeline(configure(*overrides, "repair=least_squares", "repair.samples=1000"))
    assert not list((tmp_path / "runs").glob("*/*/scores.json"))


def test_settings_of_a_stage_apply_to_that_stage_only(configure, overrides, lists, tmp_path):
    run_pipeline(configure(*overrides, "pipeline=twice"))
    run = the_run(tmp_path / "runs")
    steps = {path.name: max(path.iterdir()).name for path in (run / "checkpoints").iterdir()}
    assert steps == {"distil": "step=0000004.ckpt", "distil_again": "step=0000002.ckpt"}
    terms = {path.stem: "feature" in path.read_text() for path in (run / "history").iterdir()}
    assert terms == {"distil": True, "distil_again": False}


NETWORKS = ("pruned", "repaired")
WRONG = {
    "a repair of nothing": ("~pipeline.stages.build", "there is no stage before it that prunes"),
    "no stage": ("~pipeline.stages.score", "there is no stage before it that scores"),
    "another class": ("pipeline.stages.score._target_=criteria.scores.output_loss.OutputLoss", "it is no Stage"),
    "one name twice": ("pipeline.stages.distil.makes=pruned", "there is a network of that name already"),
    "a name that is no name": ("pipeline.stages.build.makes=../x", "is no name; choose lower-case letters"),
    "settings": ("+pipeline.stages.distil.settings={trainer: {stepz: 1}}", "settings: .*stepz"),
    "a value": (
        "+pipeline.stages.distil.settings={trainer: {steps: 0}}",
        r"settings: trainer\.steps=0 is out of range",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_list_of_stages_is_refused_at_once(configure, overrides, tmp_path, wrong):
    override, message = WRONG[wrong]
    with pytest.raises(ConfigError, match=message):
        run_pipeline(configure(*overrides, override, "teacher.path=/nowhere"))
    assert not (tmp_path / "runs").exists()


def test_a_stage_that_is_null_is_left_out(configure, overrides, tmp_path):
    run_pipeline(configure(*overrides, "pipeline.stages.export=null", "evaluation=none"))
    run = the_run(tmp_path / "runs")
    assert (run / "finished.json").exists() and not (run / "export").exists()
