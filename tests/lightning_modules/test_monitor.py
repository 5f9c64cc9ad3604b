"""What a training logs beside its losses, and under which names."""

import math
from typing import Any

import pytest
from pytorch_lightning.callbacks import Callback
from support.results import the_run
from support.tables import read_events, read_history
from torch import nn

from experiments.engine.pipeline import run_pipeline

MONITORED = {"learning_rate", "gradient_norm", "samples_per_second", "peak_memory_gib"}

STAGES = "experiments.engine.stages"
AGAIN = f"""name: again
stages:
  score: {{_target_: {STAGES}.score.Score}}
  select: {{_target_: {STAGES}.select.Select}}
  build: {{_target_: {STAGES}.build.Build, makes: pruned}}
  distil: {{_target_: {STAGES}.distil.Distil, makes: distilled}}
  distil_again: {{_target_: {STAGES}.distil.Distil, makes: distilled_again}}
  evaluate: {{_target_: {STAGES}.evaluate.Evaluate}}
"""


class Gradients(Callback):
    """Keeps the norm of all gradients and the learning rate of each optimiser step."""

    def __init__(self) -> None:
        self.norms, self.rates = [], []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        squares = [float(p.grad.double().square().sum()) for p in module.parameters() if p.grad is not None]
        self.norms.append(math.sqrt(sum(squares)))
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.usefixtures("quick_end")
@pytest.mark.parametrize(("accumulated", "every"), [(1, 1), (2, 2)])
def test_the_values_are_those_of_the_step(configure, overrides, tmp_path, monkeypatch, accumulated, every):
    recorder = Gradients()
    monkeypatch.setattr("experiments.engine.training.make_callbacks", lambda _: [recorder])
    more = [f"trainer.accumulate_grad_batches={accumulated}", f"trainer.log_every_n_steps={every}"]
    run_pipeline(configure(*overrides, "trainer.gradient_clip_val=0.001", *more))
    history = read_history(the_run(tmp_path / "runs") / "history" / "distil.csv")
    logged = slice(every - 1, None, every)
    assert list(history.index) == list(range(4))[logged]
    assert list(history["train/gradient_norm"]) == pytest.approx(recorder.norms[logged], rel=1e-5)
    assert min(recorder.norms) > 0.001  # before clipping
    assert list(history["train/learning_rate"]) == pytest.approx(recorder.rates[logged], rel=1e-6)
    assert (history["train/samples_per_second"] > 0).all()
    assert (history["train/peak_memory_gib"] > 0.1).all() and (history["train/peak_memory_gib"] < 64).all()


@pytest.mark.usefixtures("quick_end")
def test_two_trainings_of_a_job_have_keys_of_their_own(configure, data_folder, overrides, tmp_path):
    (data_folder / "pipeline").mkdir(exist_ok=True)
    (data_folder / "pipeline" / "again.yaml").write_text(AGAIN)
    run_pipeline(configure(*overrides, "pipeline=again", "logger=[csv,tensorboard]"))
    run = the_run(tmp_path / "runs")
    first, second = (read_history(run / "history" / f"{stage}.csv") for stage in ("distil", "distil_again"))
    names = {name.removeprefix("train/") for name in first.columns}
    assert {"loss", "task", "output", *MONITORED} <= names
    assert set(second.columns) == {f"distil_again/{name}" for name in names - {"epoch"}} | {"epoch"}
    levels = {name.split("/")[1] for name in names if "/" in name}
    assert levels and {f"{kind}/{level}" for kind in ("feature", "weighted_feature") for level in levels} < names
    assert not any("." in name or " " in name for name in [*first.columns, *second.columns])
    events = read_events(run / "logs" / "lightning_logs")
    assert set(events) == set(first.columns) | set(second.columns)
    for history in (first, second):
        for name in set(history.columns) - {"epoch"}:
            assert events[name] == pytest.approx(dict(history[name]), rel=1e-6)


def test_the_monitor_excludes_the_time_of_others(monkeypatch):
    from lightning_modules.training import monitor

    class Trainer:
        global_step, log_every_n_steps, world_size = 0, 1, 2

        class strategy:
            root_device = monitor.torch.device("cpu")

    times, rows = iter([10.0, 14.0]), []
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: next(times))
    module = nn.Module()
    module.log_dict = rows.append
    watcher = monitor.TrainingMonitor("train")
    watcher.on_train_start(Trainer, module)
    watcher.exclude(3.0)
    Trainer.global_step = 1
    watcher.on_train_batch_end(Trainer, module, None, {"image": monitor.torch.zeros(4, 3)}, 0)
    assert rows[0]["train/samples_per_second"] == 8.0
