"""Sweeps, their report, and what they leave in Weights & Biases."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from support.dashboards import OfflineRun
from support.results import files, read_markdown, stamps

from conf.schema import ROOT
from experiments.engine.artefacts import read_json
from experiments.engine.pipeline import run_pipeline
from experiments.reporting.set_page import report_set

SWEEP = ["criterion=output_loss,magnitude,random", "selection.ratio=0.3,0.5,0.9999", "seed=0"]
WITHOUT_RELOAD = (
    "import experiments.engine.stages.export as export, train; export.verify = lambda *_: 0.0; train.main()"
)


def sweep(config_dir: Path, *arguments: str) -> subprocess.CompletedProcess:
    """train.py -m in a process of its own, without the reload of each export (which has tests of its own)."""
    command = [sys.executable, "-c", WITHOUT_RELOAD, "--config-dir", str(config_dir), "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_a_sweep_shares_scores_and_survives_a_failing_job(configure, sampling, data_folder, tmp_path, unverified):
    job = [*sampling, "distillation=none"]
    first = sweep(data_folder, *job, *SWEEP)
    assert first.returncode != 0
    assert (
        "selection.ratio=0.9999 (tolerance 0.1) of params cannot be had: the largest achievable ratio is"
        in first.stdout
    )
    assert first.stdout.count(" finished: ") == 6 and "6 finished, 3 failed of 9" in first.stdout
    study, cache = tmp_path / "runs" / "debug", tmp_path / "runs" / ".cache"
    labels = {re.sub("-[0-9a-f]{8}$", "", path.name): (path / "finished.json").exists() for path in study.iterdir()}
    methods = {"output_loss": "knapsack", "magnitude": "knapsack", "random": "ranked"}
    assert labels == {
        f"{criterion}-{methods[criterion]}-{ratio}-none-seed0": True for criterion in methods for ratio in (0.3, 0.5)
    }  # a configuration that is refused leaves no folder
    assert len(list(study.glob("*/metrics.json"))) == 6
    scored = [read_json(path)["key"]["criterion"]["name"] for path in cache.glob("scores/*.json")]
    assert sorted(scored) == sorted(methods)

    before = {path.name: stamps(path) for path in study.iterdir() if (path / "finished.json").exists()}
    second = sweep(data_folder, *job, *SWEEP)
    assert second.returncode != 0
    assert second.stdout.count(" finished before: ") == 6
    assert {name: stamps(study / name) for name in before} == before

    # The report of the same folder; random has a second seed.
    for ratio in (0.3, 0.5):
        run_pipeline(configure(*job, "criterion=random", "seed=1", f"selection.ratio={ratio}"))
    page = report_set(study)
    assert files(study / "report") == {
        *(".manifest.json", "index.html", "results.csv", "table.md", "output_loss_over_ratio.png"),
        *("quality_over_ratio.png", "quality_over_latency_ratio.png"),
    }
    runs = pd.read_csv(study / "report" / "results.csv")
    assert sorted(runs["run"]) == sorted(path.parent.name for path in study.glob("*/finished.json"))
    assert dict(runs["criterion"].value_counts()) == {"random": 4, "output_loss": 2, "magnitude": 2}
    table = read_markdown(study / "report" / "table.md")
    assert {tuple(row) for row in table[["criterion", "selection", "ratio", "runs"]].to_numpy()} == {
        (criterion, methods[criterion], ratio, "2" if criterion == "random" else "1")
        for criterion in methods
        for ratio in ("0.3", "0.5")
    }
    for ratio in (0.3, 0.5):
        seeds = runs[(runs["criterion"] == "random") & (runs["ratio"] == ratio)]
        row = table[(table["criterion"] == "random") & (table["ratio"] == str(ratio))].iloc[0]
        for column, shown, digits in (
            ("output_loss_pruned", "output loss, pruned", 4),
            ("quality", "frechet_channels", 2),
        ):
            mean, spread = seeds[column].mean(), seeds[column].std()
            assert row[shown] == f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread > 0 else "")
    html = page.read_text()
    assert html.count("<li><a href=") == 8
    for path in study.iterdir():
        if path.name == "report":
            continue
        link = f'<li><a href="../{path.name}/report.html">'
        assert (link in html) == (path / "finished.json").exists(), path.name
        assert (f"<li>{path.name}</li>" in html) == (not (path / "finished.json").exists()), path.name
        assert (page.parent / ".." / path.name / "report.html").exists() == (path / "finished.json").exists()


# Weights & Biases


@pytest.mark.slow
def test_each_job_is_one_finished_wandb_run_even_when_it_fails(overrides, data_folder, tmp_path):
    job = [*overrides, "logger.wandb=true", "logger.mode=offline", "distillation=task_only"]
    broken, works = 1e30, 1e-4  # the loss of the first is not finite after a step
    assert sweep(data_folder, *job, "optimizer.lr=1e30,1e-4", "trainer.gradient_clip_val=null").returncode != 0
    runs = sorted((tmp_path / "runs" / "debug").iterdir())
    assert len(runs) == 2
    codes = {}
    for run in runs:
        offline = OfflineRun(run)
        assert offline.start.run_id.startswith(f"debug-{run.name[-8:]}")
        assert (
            offline.start.display_name == f"{run.name} (tiny)"
        )  # the name of the data set, which the folder leaves out
        assert offline.config["selection_ratio"] == 0.5 and offline.config["criterion_name"] == "output_loss"
        assert not any("." in key or " " in key for key in offline.config)
        assert offline.start.run_group.startswith("sweep-") and offline.start.job_type == "prune"
        assert {"output_loss", "knapsack", "task_only"} <= set(offline.start.tags)
        codes[offline.config["optimizer_lr"]] = offline.exit_code
        assert (run / "finished.json").exists() == (offline.exit_code == 0)
    assert codes == {broken: 1, works: 0}
    assert not (tmp_path / "wandb").exists()
