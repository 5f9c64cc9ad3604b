"""Measures where the time of a distillation goes: forward and backward passes, and everything beside them.

    python -m experiments.benchmarks.distillation.job                  # the default job, 20 steps
    python -m experiments.benchmarks.distillation.job --steps 10 task=t2i

Runs `train.py` with `criterion=magnitude`, which needs no forward pass, and with the overrides that are given, and
times the parts of its training: of the first step nothing, as memory is allocated in it. Writes job.csv and job.png.
"""

import argparse
import contextlib
import csv
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_module
from pytorch_lightning.callbacks import Callback

from conf import checks, schema
from experiments.engine.pipeline import run_pipeline
from experiments.reporting.figures import save_figure
from lightning_modules.metrics.cost import describe_machine

BESIDE = "beside the networks"
"""The part with data, noise, losses, optimiser, moving average, checkpoints and logged values."""


class StepParts(Callback):
    """Adds up the seconds of the parts of training steps after the first, and writes {part: seconds} as JSON.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.seconds: dict[str, float] = defaultdict(float)
        self.measures = False

    def on_fit_start(self, trainer: pl.Trainer, module: Any) -> None:
        for name in ("teacher", "student"):
            network = getattr(module, name)
            network.predict = self.timed(f"forward pass of the {name}", network.predict)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose seconds are added to a part."""

        def call(*args: Any) -> Any:
            with self.part(part):
                return function(*args)

        return call

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the seconds inside to a part."""
        start = time.perf_counter()
        yield
        if self.measures:
            self.seconds[name] += time.perf_counter() - start

    def on_before_backward(self, *args: Any) -> None:
        self.backward = time.perf_counter()

    def on_after_backward(self, *args: Any) -> None:
        if self.measures:
            self.seconds["backward pass"] += time.perf_counter() - self.backward

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if not self.measures and trainer.global_step == 1:
            self.measures, self.start = True, time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        total = time.perf_counter() - self.start
        self.seconds[BESIDE] = total - sum(self.seconds.values())
        self.path.write_text(json.dumps(self.seconds))
        for name in ("teacher", "student"):
            getattr(module, name).__dict__.pop("predict")


def measure(overrides: list[str], steps: int) -> dict[str, float]:
    """Return {part: seconds} of a training of some optimiser steps, in a run folder that is removed."""
    schema.register()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seconds.json"
        callback = f"+callbacks.parts={{_target_: {__name__}.StepParts, path: {path}}}"
        own = [
            "logger=csv",
            "criterion=magnitude",
            "evaluation=none",
            "trainer=cpu",
            f"trainer.steps={steps}",
            f"paths.runs={folder}",
        ]
        with initialize_config_module("conf", version_base="1.3"):
            cfg = compose("train", [*own, callback, *overrides])
        checks.check_config(cfg)
        run_pipeline(cfg)
        seconds: dict[str, float] = json.loads(path.read_text())
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.distillation.job",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="of the configuration, as train.py takes them")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: the first step is not measured; choose 2 or more")
    seconds = measure(options.overrides, options.steps)
    total = sum(seconds.values())
    shares = {part: value / total for part, value in seconds.items()}
    machine = describe_machine(torch.device("cpu"))
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "job.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "share", "seconds per step", "machine"])
        for part, share in shares.items():
            writer.writerow([part, f"{share:.3f}", f"{seconds[part] / (options.steps - 1):.4f}", machine])
            print(f"{part:<28}{share:>7.1%}{seconds[part] / (options.steps - 1):>10.3f} s per step")
    figure, axes = plt.subplots(figsize=(6, 1.8), layout="constrained")
    axes.barh(list(shares), [100 * share for share in shares.values()])
    axes.invert_yaxis()
    axes.set_xlabel("percent of the training's time")
    save_figure(figure, options.out / "job.png")


if __name__ == "__main__":
    main()
