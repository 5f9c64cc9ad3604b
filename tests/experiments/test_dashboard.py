"""What users of dashboards find: in an offline run of Weights & Biases, in TensorBoard, and in the CSV file."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from omegaconf import OmegaConf
from support.dashboards import OfflineRun
from support.results import the_run
from support.tables import read_events, read_history

from experiments.engine.artefacts import read_json, write_json
from experiments.engine.identity import get_displayed_settings
from experiments.engine.pipeline import run_pipeline
from experiments.reporting import strip, upload
from experiments.reporting.dashboard import list_tags
from experiments.reporting.figures import KEPT, PROTECTED, REMOVED
from experiments.reporting.lineage import log_lineage
from experiments.reporting.run_files import Scoring, list_networks, read_plans, read_scorings
from experiments.reporting.upload import make_logger_group, read_literal_config, upload_run

LEVELS = ("down_blocks_1", "mid_block", "up_blocks_0", "up_blocks_1")
TRAINED = {
    *("epoch", "train/loss", "train/task", "train/output", "train/learning_rate", "train/gradient_norm"),
    *("train/samples_per_second", "train/peak_memory_gib"),
    *("train/eval/frechet_channels", "train/eval/teacher_frechet_channels"),
}
QUALITY = ("output_loss", "task_loss", "frechet_channels", "brightness")
COSTS = ("params", "macs", "macs_attention")

DONE: dict[str, Path] = {}
"""One finished run, made once for all tests of this file."""


@pytest.fixture
def run(configure, sampling, tmp_path_factory, unverified, monkeypatch) -> Path:
    """A finished run with all loggers, and with evaluations while training."""
    if not DONE:
        runs = tmp_path_factory.mktemp("dashboard") / "runs"
        job = [override for override in sampling if not override.startswith("paths.runs=")]
        loggers = ["logger=[wandb,tensorboard]", "logger.wandb=true", "logger.mode=offline"]
        run_pipeline(configure(*job, *loggers, f"paths.runs={runs}", "evaluation.every_n_steps=2"))
        DONE["run"] = the_run(runs)
    return DONE["run"]


def list_levels(keys: set[str], kind: str) -> set[str]:
    return {key.split("/")[2] for key in keys if key.startswith(f"train/{kind}/")}


@pytest.mark.slow
def test_all_loggers_have_the_same_keys_and_values(run):
    history, events, offline = (
        read_history(run / "history" / "distil.csv"),
        read_events(run / "logs" / "lightning_logs"),
        OfflineRun(run),
    )
    keys = set(history.columns)
    levels = list_levels(keys, "feature")
    assert levels and levels == list_levels(keys, "weighted_feature")
    assert keys == TRAINED | {f"train/{kind}/{level}" for kind in ("feature", "weighted_feature") for level in levels}
    assert set(events) == keys
    rows = [row for row in offline.history if "train/loss" in row or any("/eval/" in key for key in row)]
    assert {key for row in rows for key in row if key.startswith(("train/", "epoch"))} == keys
    for name in keys - {"epoch"}:
        expected = dict(history[name].dropna())
        assert {row["trainer/global_step"]: row[name] for row in rows if name in row} == expected
        assert events[name] == pytest.approx(expected, rel=1e-6)
    assert {metric.glob_name: metric.step_metric for metric in offline.select("metric")}["*"] == "trainer/global_step"


def test_the_summary_has_the_figures_that_runs_are_compared_by(run):
    offline, metrics = OfflineRun(run), read_json(run / "metrics.json")
    summary = offline.summary
    networks = list_networks(metrics)
    assert networks == ["teacher", "pruned", "distilled"]
    expected = {f"{network}/{name}" for network in networks[1:] for name in (*QUALITY, *COSTS)}
    expected |= {f"teacher/{name}" for name in (*COSTS, *QUALITY[1:], "latency_ms")}
    expected |= {f"student/{name}" for name in (*COSTS, "latency_ms")}
    expected |= {f"eval/{name}" for name in (*QUALITY, *COSTS, "weights")}
    expected |= {f"plan/{name}" for name in ("requested_ratio", "achieved_ratio", "budget", "removed_units")}
    expected |= {"plan/predicted_harm", "gap_closed", "latency_ratio", "peak_memory_bytes", "run_id"}
    assert expected <= summary.keys()
    sections = {key.split("/")[0] for key in summary.keys() - expected if "/" in key}
    assert sections == {"protocol", "provenance", "seconds", "train", "trainer", "units"}
    for key in ("eval/frechet_channels", "plan/achieved_ratio", "student/params"):
        assert summary[key] == metrics[key]
    media = {key.split(".")[0] for key in summary if "." in key and not key.startswith("_")}
    assert media == {"samples", "scores", "strip", "train/samples", "units/scores"}
    figures = {key for key in summary if key.split(".")[0] not in media | {"_wandb"}}
    assert all(re.fullmatch(r"[a-zA-Z0-9_/]+", key) for key in figures)
    # Panels draw quality over ratio from a row of the history that has both.
    (row,) = (row for row in offline.history if "plan/requested_ratio" in row)
    assert (row["plan/requested_ratio"], row["eval/frechet_channels"]) == (0.5, metrics["eval/frechet_channels"])
    assert {"latency_ratio", "student/latency_ms"} <= row.keys()


def test_pictures_and_tables_are_in_the_folder_of_the_offline_run(run):
    offline = OfflineRun(run)
    media = offline.folder / "files" / "media"
    names = {path.name.split("_")[0]: path for path in media.rglob("*.png")}
    assert set(names) == {"samples", "scores", "strip"}  # the curves of losses are drawn by W&B itself
    steps = [row["trainer/global_step"] for row in offline.history if "train/samples.path" in row]
    assert steps == [0, 1, 3]
    assert len(list((media / "images" / "train").glob("samples_*.png"))) == 3
    (table,) = media.rglob("*.table.json")
    content, (scoring,) = read_json(table), read_scorings(run, read_plans(run))
    assert content["columns"] == ["unit", "score", "standard_error", "decision"]
    assert [row[0] for row in content["data"]] == list(scoring.scores)
    assert {row[0] for row in content["data"] if row[3] == "removed"} == set(scoring.removed)


def test_artifacts_are_a_chain_from_the_teacher_to_the_export(run):
    offline, plan = OfflineRun(run), read_json(run / "plan.json")
    artifacts = [part for part in offline.select("artifact") if part.type != "run_table"]
    (whole,), chain = artifacts[:1], artifacts[1:]
    suffix = run.name[-8:]
    assert (whole.name, whole.type) == (f"debug-{suffix}", "prune")
    files = {part.path for part in whole.manifest.contents}
    assert {"metrics.json", "measured.json", "scores.json", "plan.json"} <= files
    assert [part.type for part in chain] == ["teacher", "scores", "plan", "network", "network", "export"]
    names = [part.name for part in chain]
    assert names == [
        *(f"teacher-{plan['teacher'][:8]}", f"scores-{plan['scores'][:8]}", f"plan-{suffix}"),
        *(f"pruned-{suffix}", f"distilled-{suffix}", f"export-{suffix}"),
    ]
    assert [json.loads(part.metadata).get("made_from") for part in chain] == [None, *names[:-1]]
    assert [part.use_after_commit for part in chain] == [True] * 5 + [False]
    for part in chain:  # only scores and the plan are uploaded
        references = {content.ref for content in part.manifest.contents}
        assert (references == {""}) == (part.type in ("scores", "plan")), part.name
        assert all(ref == "" or Path(ref.removeprefix("file://")).exists() for ref in references)


def test_a_finished_run_is_uploaded_later_with_the_same_content(run, tmp_path, capsys, monkeypatch):
    other = tmp_path / "runs" / "debug" / run.name
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("wandb"))
    report, previews = tmp_path / "runs" / "debug" / "report", other / "previews" / "distil"
    report.mkdir()
    write_json(previews / "step=0000002.json", {"prompt": ["a"], "teacher": ["b"], "step 2": ["c"]})
    options = ["--logger", "project=mine", "--logger", "artifacts=false"]
    monkeypatch.setattr(sys, "argv", ["upload", str(other), str(report), *options])
    with pytest.raises(SystemExit) as caught:
        upload.main()
    assert caught.value.code == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"{other}: logged",
        f"{report}: skipped, as it is no run (it has no config.yaml)",
    ]
    first, second = OfflineRun(run), OfflineRun(other)
    assert (second.start.project, second.start.run_id) == ("mine", first.start.run_id)
    assert second.config == first.config
    texts = {key for key in second.history_keys if key.startswith("train/texts")}
    assert texts and second.history_keys - texts == first.history_keys
    assert [row["trainer/global_step"] for row in second.history if texts & row.keys()] == [1]
    assert {key for key in second.summary if not key.startswith("train/texts")} == first.summary.keys()
    assert [part.type for part in second.select("artifact")] == ["run_table"] * 2  # scores and texts
    with pytest.raises(SystemExit) as caught:
        upload.main()
    assert caught.value.code == 1
    assert f"{other}: it was logged to W&B already: wandb sync {other}/wandb/offline-run-*" in capsys.readouterr().err


def test_only_finished_runs_are_uploaded(tmp_path):
    with pytest.raises(ValueError, match="is no folder of a finished run"):
        upload_run(tmp_path, make_logger_group([]))


def make_finished_run(folder: Path, cfg: Any) -> None:
    write_json(folder / "finished.json", {"run_id": "0123456789abcdef"})
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg))


def test_an_upload_goes_on_after_an_error_and_can_be_repeated(configure, overrides, tmp_path, monkeypatch, capsys):
    names, uploaded = [tmp_path / name for name in ("a", "b", "c")], []
    make_finished_run(names[0], configure(*overrides, "logger=csv"))
    make_finished_run(names[1], configure(*overrides, "logger=csv"))
    make_finished_run(names[2], configure(*overrides, "logger.wandb=true"))
    (names[2] / "wandb").mkdir()

    class NoDashboard:
        wandb = None

        def __init__(self, cfg, run) -> None:
            self.folder = run.folder

        def __enter__(self):
            (self.folder / "wandb").mkdir(exist_ok=True)
            return self

        def __exit__(self, *_) -> None: ...

        def finish(self, *_) -> None:
            uploaded.append(self.folder.name)

    monkeypatch.setattr(upload, "Dashboard", NoDashboard)
    monkeypatch.setattr(sys, "argv", ["upload", *map(str, names)])
    for name in ("metrics.json", "measured.json"):
        write_json(names[1] / name, {})
    for expected in (["b"], ["b", "a"]):
        with pytest.raises(SystemExit) as caught:
            upload.main()
        assert caught.value.code == 1 and uploaded == expected
        errors = capsys.readouterr().err.splitlines()
        assert errors[-1].startswith(f"{names[2]}: it was logged to W&B already")
        if expected == ["b"]:
            assert errors[0].startswith(f"{names[0]}: ") and "metrics.json" in errors[0]
        else:
            assert errors[0].startswith(f"{names[1]}: it was logged to W&B already")
        for name in ("metrics.json", "measured.json"):
            write_json(names[0] / name, {})


@pytest.mark.parametrize(
    "text", ["${oc.env:HF_TOKEN}", r"\${oc.env:HF_TOKEN}", r"a\\${oc.env:HF_TOKEN}", "${a.b}-${c}"]
)
def test_a_foreign_run_sends_no_environment_variable(configure, tmp_path, monkeypatch, text):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    cfg = OmegaConf.to_container(configure(), resolve=False)
    for group, field in (("logger", "project"), ("data", "name"), ("selection", "name")):
        cfg[group][field] = text
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg))
    literal = read_literal_config(tmp_path)
    assert (literal.logger.project, literal.data.name, literal.selection.name) == (text, text, text)
    assert make_logger_group(["entity=me"]) == {**make_logger_group([]), "project": "secateur", "entity": "me"}


def test_tags_have_no_value_of_an_environment_variable(configure, overrides, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    tags = list_tags(get_displayed_settings(configure(*overrides, "data.name=${oc.env:HF_TOKEN}")))
    assert tags[0] == "${oc.env:HF_TOKEN}" and "hf_secret" not in tags


@pytest.mark.parametrize("error", [AttributeError, TypeError, wandb.Error])
def test_artifacts_that_wandb_does_not_take_do_not_end_a_job(run, caplog, error):
    class Run:
        def _log_artifact(self, *_: Any, **__: Any) -> None:
            raise error("moved")

    log_lineage(Run(), run, "0123456789", "some/teacher")
    (warning,) = [record.getMessage() for record in caplog.records if record.name.endswith("lineage")]
    assert "does not log the artifact teacher-" in warning and warning.endswith(": moved")


def test_a_strip_colours_units_and_groups_of_channels(tmp_path):
    scores: dict[str, Any] = {name: {"score": 1.0} for name in ("down.0.a", "down.0.b", "mid.c")}
    scoring = Scoring("scores", "magnitude", scores, ["down.0.b"], ["mid.c"], False)
    assert strip.list_colours(scoring) == {"down.0.a": KEPT, "down.0.b": REMOVED, "mid.c": PROTECTED}
    assert strip.draw_strip(scoring, tmp_path / "strip.png").stat().st_size > 0
    scores = {f"{group}:{number}": {"score": 1.0} for group in ("a", "b") for number in range(2)}
    colours = strip.list_colours(Scoring("scores", "taylor", scores, ["a:0", "a:1"], [], True))
    assert list(colours.values()) == [strip.SHARE(1.0), strip.SHARE(0.0)]
    assert [strip.name_part(name) for name in ("down.0.a.1", "mid.c.0", "head")] == ["down.0", "mid", "head"]
