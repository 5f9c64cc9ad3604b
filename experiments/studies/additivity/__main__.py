"""Is the harm of removing several units the sum of their single harms?

    python -m experiments.studies.additivity [overrides]

For random sets of units at several ratios, compares the sum of their scores, by each criterion, with the measured joint
output loss of removing the whole set. LAPTOP-Diff (arXiv 2404.11098) calls this property additivity, and its knapsack
relies on it. Scores and joint losses are measured on the same samples, timesteps and noise.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from hydra import compose, initialize_config_module
from matplotlib.ticker import NullFormatter
from omegaconf import DictConfig
from scipy.stats import pearsonr, spearmanr
from tqdm import tqdm

from conf import checks, schema
from datamodules.seeding import numpy_rng
from experiments.engine.inputs import build_teacher, make_criterion_batches
from experiments.reporting.figures import save_figure, set_log_scale
from experiments.reporting.tables import format_markdown
from lightning_modules.modules.joint_loss import JointMeasure
from lightning_modules.modules.scoring import score
from lightning_modules.training.trainer import make_trainer, resolve_accelerator

COLUMNS = 3
"""panels per row of the figure"""
CRITERIA = (
    "output_loss",
    "task_loss",
    "taylor",
    "magnitude",
    "block_influence",
    "ld_pruner criterion.level=depth criterion.seeds=32 criterion.steps=8",
)
"""Criteria, each followed by overrides that hold for it alone."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.studies.additivity", description=__doc__)
    parser.add_argument("--subsets", type=int, default=24, help="random sets of units at each ratio")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    parser.add_argument("--criteria", nargs="+", default=CRITERIA, help="names, each with its own overrides, if any")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options, overrides = parser.parse_known_args()

    labels = [words.split()[0] for words in options.criteria]
    if len(set(labels)) < len(labels):
        parser.error(f"--criteria names one criterion twice: {', '.join(labels)}")
    schema.register()
    with initialize_config_module("conf", version_base="1.3"):
        configs = {
            words.split()[0]: compose("train", [f"criterion={words.split()[0]}", *words.split()[1:], *overrides])
            for words in options.criteria
        }
    for cfg in configs.values():
        checks.check_config(cfg)
    cfg = next(iter(configs.values()))
    teacher, data = build_teacher(cfg), schema.build(cfg.data)
    count, seed, batch = (cfg.calibration[key] for key in ("samples", "seed", "batch_size"))
    calibration = data.subset("train", count, seed, batch, field="calibration.samples")
    scores = {name: score_units(each, teacher, data, calibration) for name, each in configs.items()}

    device = torch.device(resolve_accelerator(cfg.trainer.accelerator))
    measure = JointMeasure(teacher, calibration, cfg.calibration.seed, device)
    rows = []
    subsets = [(ratio, names) for ratio in options.ratios for names in draw_subsets(teacher, ratio, options.subsets)]
    for ratio, names in tqdm(subsets, desc="joint losses"):
        sums = {name: sum(values[unit] for unit in names) for name, values in scores.items()}
        rows.append({"ratio": ratio, "units": len(names), "joint": measure(names), **sums})
    write_results(pd.DataFrame(rows), options.out)
    print((options.out / "table.md").read_text())


def score_units(cfg: DictConfig, teacher: Any, data: Any, calibration: Any) -> dict[str, float]:
    """Return {unit: score} by the criterion of a configuration."""
    criterion = schema.build(cfg.criterion)
    batches = make_criterion_batches(criterion, cfg, teacher, data, calibration)
    trainer = make_trainer(
        cfg.trainer, cfg.criterion.name, cfg.calibration.precision, inference_mode=not criterion.needs_grad
    )
    scores = score(criterion, teacher, teacher.units(), batches, trainer, cfg.calibration.seed)
    return {name: entry["score"] for name, entry in scores.items()}


def draw_subsets(teacher: Any, ratio: float, count: int) -> list[list[str]]:
    """Return random sets of unit names, each with at most `ratio` of the teacher's parameters.

    Units are visited in a random order, and each one that still fits is added to the set.
    """
    units, total = teacher.units(), teacher.params()
    subsets = []
    for number in range(count):
        params, names = 0, []
        for index in numpy_rng("additivity", str(ratio), number).permutation(len(units)):
            if params + units[index].params <= ratio * total:
                params += units[index].params
                names.append(units[index].name)
        subsets.append(names)
    return subsets


def write_results(table: pd.DataFrame, folder: Path) -> None:
    """Write results.csv, correlations.csv, table.md, and a scatter plot per criterion, additivity.png.

    `table` has a row per set of units: ratio, number of units, joint loss, and the sum of scores by each criterion.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "results.csv", index=False, float_format="%.6g")
    criteria = [name for name in table if name not in ("ratio", "units", "joint")]
    rows = []
    for name in criteria:
        at_equal_ratio = [spearmanr(part[name], part["joint"]).statistic for _, part in table.groupby("ratio")]
        rows.append(
            {
                "criterion": name,
                "rank correlation": spearmanr(table[name], table["joint"]).statistic,
                "rank correlation at equal ratio": float(np.mean(at_equal_ratio)),
                "linear correlation": pearsonr(table[name], table["joint"]).statistic,
            }
        )
    summary = pd.DataFrame(rows)
    summary.to_csv(folder / "correlations.csv", index=False, float_format="%.4f")
    cells = summary.map(lambda value: value if isinstance(value, str) else f"{value:.3f}")
    (folder / "table.md").write_text(format_markdown(cells))
    draw_scatter_plots(table, {row["criterion"]: row for row in rows}, folder / "additivity.png")


def draw_scatter_plots(table: pd.DataFrame, correlations: dict[str, dict[str, Any]], path: Path) -> Path:
    """Draw the measured joint loss over the sum of scores, a panel per criterion."""
    shape = (-(-len(correlations) // COLUMNS), COLUMNS)
    figure, axes = plt.subplots(
        *shape, figsize=(4 * shape[1], 3.5 * shape[0]), squeeze=False, sharey=True, layout="constrained"
    )
    for axis in axes.flat[len(correlations) :]:
        axis.axis("off")
    for axis, (name, row) in zip(axes.flat, correlations.items(), strict=False):
        points = axis.scatter(table[name], table["joint"], c=table["ratio"], s=12, cmap="viridis")
        set_log_scale(axis, "y")
        if (table[name] > 0).all():
            set_log_scale(axis, "x")
            axis.xaxis.set_minor_formatter(NullFormatter())
        if name == "output_loss":  # the same quantity as the joint loss, so the sum could be equal to it
            ends = [table["joint"].min(), table["joint"].max()]
            axis.plot(ends, ends, color="black", ls=":", lw=1)
        title = f"{name}: rank {row['rank correlation']:.2f}, linear {row['linear correlation']:.2f}"
        axis.set_title(title, fontsize=10)
    figure.supxlabel("sum of the single scores")
    figure.supylabel("measured joint output loss")
    figure.colorbar(points, ax=axes, label="fraction of parameters removed")
    return save_figure(figure, path)


if __name__ == "__main__":
    main()
