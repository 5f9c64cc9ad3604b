"""Trials of a sweep that Weights & Biases directs, with the command line that its agent builds from our file."""

import os
import sys

import pytest
import wandb
import yaml
from support.dashboards import OfflineRun
from wandb import wandb_agent

import train
from conf.schema import ROOT
from experiments.engine.artefacts import read_json

SWEEP = yaml.safe_load((ROOT / "conf" / "wandb_sweep.yaml").read_text())


@pytest.fixture
def agent(monkeypatch, tmp_path):
    """Return a function that runs a trial as W&B's agent does: trial(run id, values of the parameters)."""
    commands = []

    class Process:
        """Stand for the process that the agent would start."""

        def __init__(self, command, env, **options):
            commands.append(command)

    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # which the agent sets
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "agent"))
    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)

    def run_trial(run_id: str, values: dict) -> float | None:
        agent = wandb_agent.Agent(api=None, queue=None, sweep_id="sweep1")
        agent._sweep_command = list(SWEEP["command"])
        arguments = {name: {"value": value} for name, value in values.items()}
        agent._command_run({"run_id": run_id, "program": SWEEP["program"], "args": arguments})
        assert commands[-1][:3] == ["/usr/bin/env", "python", "train.py"]
        monkeypatch.setattr(sys, "argv", commands[-1][2:])
        wandb.teardown()  # W&B reads its environment once per process
        train.main()

    yield run_trial
    wandb.teardown()


@pytest.mark.slow
def test_a_trial_lands_in_the_sweep_and_a_finished_one_reports_again(
    agent, overrides, data_folder, tmp_path, capsys, quick_end
):
    values = dict(item.split("=", 1) for item in overrides)
    values |= {"hydra.searchpath": f"[file://{data_folder}]", "logger.wandb": True, "distillation": "none"}
    measures = []
    for run_id in ("trial1", "trial2"):
        agent(run_id, values | {"criterion": "magnitude", "selection.ratio": 0.3})
        trial = OfflineRun(tmp_path / "runs", run_id)
        assert (trial.start.run_id, trial.start.sweep_id) == (run_id, "sweep1")
        measures.append(trial.summary["eval/output_loss"])
    (run,) = (tmp_path / "runs" / "debug").iterdir()
    assert measures == [read_json(run / "metrics.json")["eval/output_loss"]] * 2
    out = capsys.readouterr()
    assert "finished already" in out.out and "Ignoring" not in out.err


def test_the_metric_of_the_sweep_file_is_the_first_measure_of_the_default_job(configure):
    fixed = [f"{key}={setting['value']}" for key, setting in SWEEP["parameters"].items() if "value" in setting]
    lowest = [f"{key}={setting['min']}" for key, setting in SWEEP["parameters"].items() if "min" in setting]
    cfg = configure(*fixed, *lowest)
    assert SWEEP["metric"]["name"] == f"eval/{next(iter(cfg.evaluation.metrics))}"
    assert os.path.exists(ROOT / SWEEP["program"])
