"""Is the harm of removing several units the sum of their single harms?

    python -m experiments.studies.additivity [overrides]

For random sets of units at several ratios: the sum of their scores, by each criterion, against the measured joint
output loss. LAPTOP-Diff (arXiv 2404.11098) calls it additivity, and rests its knapsack on it. Scores and joint losses
are of the same samples, timesteps and noise.
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

from conf import schema
from datamodules.seeding import numpy_rng
from experiments.engine.inputs import batches_for, teacher_of
from experiments.reporting.figures import save
from lightning_modules.modules.joint_loss import JointMeasure
from lightning_modules.modules.scoring import score
from lightning_modules.training.trainer import accelerator_of, make_trainer

COLUMNS = 3
CRITERIA = (
    "output_loss",
    "task_loss",
    "taylor",
    "magnitude",
    "block_influence",
    "ld_pruner criterion.level=depth criterion.seeds=32 criterion.steps=8",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.studies.additivity", description=__doc__)
    parser.add_argument("--subsets", type=int, default=24, help="random sets of units at each ratio")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    parser.add_argument("--criteria", nargs="+", default=CRITERIA, help="each with overrides of its own, if any")
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
        schema.check(cfg)
    cfg = next(iter(configs.values()))
    teacher, data = teacher_of(cfg), schema.build(cfg.data)
    count, seed, batch = (cfg.calibration[key] for key in ("samples", "seed", "batch_size"))
    calibration = data.subset("train", count, seed, batch, field="calibration.samples")
    scores = {name: single(each, teacher, data, calibration) for name, each in configs.items()}

    device = torch.device(accelerator_of(cfg.trainer.accelerator))
    measure = JointMeasure(teacher, calibration, cfg.calibration.seed, device)
    rows = []
    chosen = [(ratio, names) for ratio in options.ratios for names in subsets(teacher, ratio, options.subsets)]
    for ratio, names in tqdm(chosen, desc="joint losses"):
        sums = {name: sum(values[unit] for unit in names) for name, values in scores.items()}
        rows.append({"ratio": ratio, "units": len(names), "joint": measure(names), **sums})
    write(pd.DataFrame(rows), options.out)


def single(cfg: DictConfig, teacher: Any, data: Any, calibration: Any) -> dict[str, float]:
    """Each unit's score by one criterion."""
    criterion = schema.build(cfg.criterion)
    batches = batches_for(criterion, cfg, teacher, data, calibration)
    trainer = make_trainer(
        cfg.trainer, cfg.criterion.name, cfg.calibration.precision, inference_mode=not criterion.needs_grad
    )
    found = score(criterion, teacher, teacher.units(), batches, trainer, cfg.calibration.seed)
    return {name: entry["score"] for name, entry in found.items()}


def subsets(teacher: Any, ratio: float, count: int) -> list[list[str]]:
    """Random sets of units: in a random order, each is taken that does not go beyond `ratio` of the parameters."""
    units, total = teacher.units(), teacher.params()
    found = []
    for number in range(count):
        spent, names = 0, []
        for place in numpy_rng("additivity", str(ratio), number).permutation(len(units)):
            if spent + units[place].params <= ratio * total:
                spent += units[place].params
                names.append(units[place].name)
        found.append(names)
    return found


def write(table: pd.DataFrame, folder: Path) -> None:
    """results.csv, correlations.csv and .md, and a scatter of predicted against measured by criterion."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "results.csv", index=False, float_format="%.6g")
    criteria = [name for name in table if name not in ("ratio", "units", "joint")]
    rows = []
    for name in criteria:
        within = [spearmanr(part[name], part["joint"]).statistic for _, part in table.groupby("ratio")]
        rows.append(
            {
                "criterion": name,
                "rank correlation": spearmanr(table[name], table["joint"]).statistic,
                "rank correlation at equal ratio": float(np.mean(within)),
                "linear correlation": pearsonr(table[name], table["joint"]).statistic,
            }
        )
    summary = pd.DataFrame(rows)
    summary.to_csv(folder / "correlations.csv", index=False, float_format="%.4f")
    lines = ["| " + " | ".join(summary) + " |", "|" + " --- |" * len(summary.columns)]
    lines += [
        "| " + " | ".join([row.iloc[0], *(f"{value:.3f}" for value in row.iloc[1:])]) + " |"
        for _, row in summary.iterrows()
    ]
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    draw(table, {row["criterion"]: row for row in rows}, folder / "additivity.png")
    print((folder / "table.md").read_text())


def draw(table: pd.DataFrame, correlations: dict[str, dict[str, Any]], path: Path) -> None:
    """A scatter of predicted against measured for each criterion."""
    shape = (-(-len(correlations) // COLUMNS), COLUMNS)
    figure, axes = plt.subplots(
        *shape, figsize=(4 * shape[1], 3.5 * shape[0]), squeeze=False, sharey=True, layout="constrained"
    )
    for axis in axes.flat[len(correlations) :]:
        axis.axis("off")
    for axis, (name, row) in zip(axes.flat, correlations.items(), strict=False):
        points = axis.scatter(table[name], table["joint"], c=table["ratio"], s=12, cmap="viridis")
        axis.set_yscale("log")
        if (table[name] > 0).all():
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
        if name == "output_loss":  # of the same kind as the joint loss: here a sum could be right
            ends = [table["joint"].min(), table["joint"].max()]
            axis.plot(ends, ends, color="black", ls=":", lw=1)
        title = f"{name}: rank {row['rank correlation']:.2f}, linear {row['linear correlation']:.2f}"
        axis.set_title(title, fontsize=10)
    figure.supxlabel("sum of the single scores")
    figure.supylabel("measured joint output loss")
    figure.colorbar(points, ax=axes, label="fraction of parameters removed")
    save(figure, path)


if __name__ == "__main__":
    main()
