"""Compares distillation on stored outputs of the teacher with distillation from a teacher that runs.

    python -m experiments.benchmarks.stored_teacher    # two CPU cores, minutes; writes results.csv beside this file

Half of the embedded text-to-image model is removed, and the student is distilled for the same number of steps from the
outputs of the teacher alone: with the teacher at new noise and timesteps in every step, and on outputs that were stored
for a few draws of them per picture. The loss is that of new noise on held-out pictures.
"""

import argparse
import csv
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from conf import checks, schema
from experiments.benchmarks.scoring_speed.__main__ import time_in_turns
from experiments.engine.artefacts import read_json
from experiments.engine.inputs import build_data, build_teacher
from experiments.engine.pipeline import run_pipeline
from experiments.tools.precompute import precompute
from experiments.tools.teacher_outputs import store_outputs
from lightning_modules.backbones.base import Change
from lightning_modules.backbones.diffusion.pipeline_parts import move
from lightning_modules.metrics.cost import describe_machine
from lightning_modules.training.trainer import autocast, resolve_accelerator, resolve_precision

JOB = (
    *("task=t2i", "evaluation=none", "evaluation.loss_samples=256", "distillation=output_only", "data.flip=false"),
    *("pipeline.stages.export=null", "logger.wandb=false"),
)
TIMED_STEPS = 8
"""Steps in a round of the timing, in which the ways of training take turns."""


def compose_job(folder: Path, *overrides: str) -> DictConfig:
    """Return the checked configuration of a job whose runs are in a folder."""
    with initialize_config_module("conf", version_base="1.3"):
        cfg = compose("train", [*JOB, f"paths.runs={folder}/runs", *overrides])
    checks.check_config(cfg)
    return cfg


def store(folder: Path, draws: int, overrides: Sequence[str]) -> float:
    """Store the teacher's outputs for `draws` draws per picture beside a copy of the latents; returns the seconds."""
    latents = shutil.copytree(folder / "latents", folder / f"latents-{draws}")
    cfg = compose_job(folder, *overrides, f"latents={latents}", f"precompute.teacher_draws={draws}")
    teacher: Any = build_teacher(cfg)
    start = perf_counter()
    store_outputs(cfg, teacher)
    return perf_counter() - start


def distil(folder: Path, *overrides: str) -> Path:
    """Run a job; returns the folder of its run."""
    before = {*folder.glob("runs/*/*/metrics.json")}
    run_pipeline(compose_job(folder, *overrides))
    (path,) = {*folder.glob("runs/*/*/metrics.json")} - before
    return path.parent


def time_steps(cfg: DictConfig, changes: Sequence[Change], repeats: int) -> dict[str, float]:
    """Return {way of training: median seconds of TIMED_STEPS training steps}, of ways that take turns.

    Args:
        cfg: the configuration of a job on stored outputs.
        changes: what is removed of the teacher.
        repeats: number of rounds that are timed.
    """
    device = torch.device(resolve_accelerator(cfg.trainer.accelerator))
    plain: Any = build_data(cfg)
    data = {"live": plain, "stored": plain.with_teacher_outputs()}

    def make_round(choice: str) -> Callable[[], dict]:
        teacher = build_teacher(cfg)
        student = teacher.pruned(changes)
        parts = {"optimizer": schema.build(cfg.optimizer), "lr_scheduler": schema.build(cfg.lr_scheduler)}
        module = schema.build(
            cfg.distillation, student=student, teacher=teacher, seed=0, dump=Path(cfg.paths.runs), **parts
        )(teacher_outputs=choice).to(device)
        module.prepare(resolve_precision(cfg.trainer.precision, device.type))
        module.on_fit_start()
        optimizer, loader = module.configure_optimizers()["optimizer"], iter(data[choice].train_dataloader())

        def run_round() -> dict:
            for _ in range(TIMED_STEPS):
                optimizer.zero_grad()
                batch = move(next(loader), device)
                with autocast(cfg.trainer.precision, device):
                    loss = module.losses(batch)["loss"]
                loss.backward()
                optimizer.step()
            return {}

        return run_round

    return time_in_turns({choice: make_round(choice) for choice in ("live", "stored")}, repeats, device)[0]


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.stored_teacher", description=__doc__)
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 4, 16], help="draws per picture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the trainings")
    parser.add_argument("--images", type=int, default=224, help="training pictures")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9, help="rounds of the timing")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results.csv")
    options, overrides = parser.parse_known_args()
    overrides += [f"data.train.stop={options.images}", f"data.batch_size={options.batch}"]
    overrides += [f"trainer.steps={options.steps}", f"precompute.batch_size={options.batch}"]
    schema.register()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        precompute(compose_job(folder, *overrides, f"latents={folder}/latents"))
        seconds = {draws: store(folder, draws, overrides) for draws in options.draws}
        ways = {0: [f"latents={folder}/latents"]}
        for draws in options.draws:
            ways[draws] = [f"latents={folder}/latents-{draws}", "distillation.teacher_outputs=stored"]
        runs = {
            (seed, draws): distil(folder, *overrides, f"seed={seed}", *words)
            for seed in options.seeds
            for draws, words in ways.items()
        }
        figures = {key: read_json(run / "metrics.json") for key, run in runs.items()}
        cfg = compose_job(folder, *overrides, *ways[options.draws[0]])
        changes = read_json(runs[options.seeds[0], 0] / "plan.json")["changes"]
        times = time_steps(cfg, changes, options.repeats)
    device = torch.device(resolve_accelerator(cfg.trainer.accelerator))
    machine = describe_machine(device)
    rows = [
        {
            "teacher": f"stored, {draws} {'draw' if draws == 1 else 'draws'}" if draws else "live",
            "seed": seed,
            "steps": options.steps,
            "passes over the pictures": f"{options.steps * options.batch / options.images:.1f}",
            "output loss, pruned": f"{metrics['pruned/output_loss']:.6f}",
            "output loss": f"{metrics['eval/output_loss']:.6f}",
            "step, of the live teacher's": f"{times['stored' if draws else 'live'] / times['live']:.3f}",
            "storing, in steps of the live teacher": round(seconds.get(draws, 0) * TIMED_STEPS / times["live"]),
            "machine": machine,
        }
        for (seed, draws), metrics in figures.items()
    ]
    with open(options.output, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    print(options.output.read_text())


if __name__ == "__main__":
    main()
