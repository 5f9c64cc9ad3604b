"""A job that its user stops with Ctrl-C, or that is refused, and what is left of it."""

import signal
from pathlib import Path

import pytest
from support.results import files, the_run
from support.stops import ctrl_c_after_step

from conf.schema import ConfigError
from experiments.engine import pipeline
from experiments.engine.pipeline import run_pipeline
from experiments.reporting import dashboard
from experiments.reporting.dashboard import Dashboard


@pytest.fixture(autouse=True)
def interrupt_handler():
    """Restore the handler of SIGINT, which Lightning replaces on Ctrl-C."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def press_ctrl_c(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_ctrl_c_in_training_names_the_step_to_go_on_from(
    configure, overrides, tmp_path, monkeypatch, capsys, quick_end
):
    cfg = configure(*overrides)
    with ctrl_c_after_step(monkeypatch, 3), pytest.raises(SystemExit) as caught:
        run_pipeline(cfg)
    assert caught.value.code == 130
    run = the_run(tmp_path / "runs")
    assert f"stopped: the same command goes on from step 2 of stage distil ({run})" in capsys.readouterr().out
    run_pipeline(cfg)
    assert "distil: resuming from step 2 of 4" in capsys.readouterr().out


def test_ctrl_c_elsewhere_names_the_stage(configure, overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.engine.stages.select.Select.run", press_ctrl_c)
    with pytest.raises(SystemExit) as caught:
        run_pipeline(configure(*overrides, "criterion=magnitude"))
    assert caught.value.code == 130
    assert "stopped: the same command goes on from stage select (" in capsys.readouterr().out


def test_sigterm_keeps_its_own_code(configure, overrides, monkeypatch):
    monkeypatch.setattr("experiments.engine.stages.score.Score.run", lambda *_: (_ for _ in ()).throw(SystemExit(143)))
    with pytest.raises(SystemExit) as caught:
        run_pipeline(configure(*overrides))
    assert caught.value.code == 143


# Refused configurations


def refuse(*_: object, **__: object) -> None:
    raise ConfigError("refused")


REFUSALS = {
    "a check of the whole": (pipeline, "check_parts", refuse, ConfigError),
    "a dashboard that cannot be reached": (dashboard.wandb, "init", refuse, ConfigError),
    "Ctrl-C before the first stage": (pipeline, "load_teacher", press_ctrl_c, KeyboardInterrupt),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refused_job_leaves_no_folder(configure, overrides, tmp_path, monkeypatch, refusal):
    owner, name, function, error = REFUSALS[refusal]
    monkeypatch.setattr(owner, name, function)
    with pytest.raises(error):
        run_pipeline(configure(*overrides, "name=a/b", "logger.wandb=true", "logger.mode=offline"))
    assert {Path(name).parts[0] for name in files(tmp_path / "runs")} <= {".cache"}
    assert not (tmp_path / "runs" / "a").exists()


def test_a_refused_job_opens_no_logger(configure, overrides, monkeypatch):
    monkeypatch.setattr(Dashboard, "open_loggers", lambda _: pytest.fail("a logger was opened for a refused job"))
    monkeypatch.setattr(pipeline, "check_parts", refuse)
    with pytest.raises(ConfigError, match="refused"):
        run_pipeline(configure(*overrides))


def test_the_hub_is_checked_for_a_finished_run_too(configure, overrides, monkeypatch, quick_end):
    run_pipeline(configure(*overrides, "criterion=magnitude", "distillation=none"))
    monkeypatch.setattr(pipeline, "push", lambda *_: pytest.fail("pushed without a check"))
    with pytest.raises(ValueError, match=r"export\.push_to_hub='nobody' is not the id of a model on the hub"):
        run_pipeline(configure(*overrides, "criterion=magnitude", "distillation=none", "export.push_to_hub=nobody"))


def test_a_push_without_an_export_is_refused_at_once(configure, overrides, tmp_path):
    for word, named in (("push_to_hub=a/b", "push_to_hub='a/b'"), ("onnx=true", "onnx=True")):
        with pytest.raises(ConfigError, match=rf"export\.{named}: no stage of this pipeline makes an export"):
            run_pipeline(configure(*overrides, "pipeline.stages.export=null", f"export.{word}"))
    assert not (tmp_path / "runs").exists()
