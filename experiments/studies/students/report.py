"""Tables and the figure of the study: predictors of a plan's outcome, losses, and lengths of training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from experiments.engine.artefacts import digest, read_json
from experiments.engine.identity import read_config
from experiments.reporting.figures import save_figure, set_log_scale
from experiments.reporting.tables import format_markdown

RESAMPLES = 2000
"""Resamples of the bootstrap (Efron 1979)."""
EARLY = 20
"""Steps after which the training loss to the teacher's output is taken as a predictor."""
PREDICTORS = ("sum of scores", "joint loss", "joint loss after repair", f"loss in step {EARLY}", "params", "macs")
OUTCOMES = {"none": "trained", "least_squares": "repaired and trained"}
"""{repair: name of the outcome, the output loss on held-out samples after training}"""


def write_report(roots: Sequence[Path], out: Path) -> str:
    """Write runs.csv, plans.csv, table.md and students.png of the runs below some folders; return the tables."""
    runs = read_runs(roots)
    plans = describe_plans(runs)
    out.mkdir(parents=True, exist_ok=True)
    runs.drop(columns="scores").to_csv(out / "runs.csv", index=False)
    plans.to_csv(out / "plans.csv", index=False)
    parts = {
        "Which number should choose the plan?": compare_predictors(plans),
        "Which loss?": compare_losses(runs),
        "Does the repair last?": compare_lengths(runs),
    }
    text = "\n".join(f"## {title}\n\n{format_markdown(table)}" for title, table in parts.items() if len(table))
    (out / "table.md").write_text(text)
    draw(plans, runs, out / "students.png")
    return text


def read_runs(roots: Sequence[Path]) -> pd.DataFrame:
    """Return a row per finished run; raises ValueError where there is none."""
    rows = [read_run(path.parent) for root in roots for path in sorted(root.rglob("finished.json"))]
    if not rows:
        raise ValueError(f"{', '.join(map(str, roots))}: no finished run")
    return pd.DataFrame(rows)


def read_run(folder: Path) -> dict[str, Any]:
    """Return what was done in one run and what came of it."""
    config, metrics = read_config(folder), read_json(folder / "metrics.json")
    plan, scores = read_json(folder / "plan.json"), read_json(folder / "scores.json")
    units = [change["unit"] for change in plan["changes"]]
    normalization = config["distillation"].get("normalization")
    return {
        "task": config["task"]["name"],
        "ratio": config["selection"]["ratio"],
        "plan": digest(sorted(units))[:8],
        "units": " ".join(units),
        "chosen_by": config["criterion"]["name"],
        "repair": config["repair"]["name"],
        "distillation": config["distillation"]["name"]
        + ("" if normalization in (None, "teacher_energy") else f", {normalization}"),
        "steps": config["trainer"]["steps"],
        "seed": config["seed"],
        "achieved": metrics["plan/achieved_ratio"],
        "params": metrics["student/params"],
        "macs": metrics["student/macs"],
        "pruned": metrics["pruned/output_loss"],
        "repaired": metrics.get("repaired/output_loss"),
        "trained": metrics["eval/output_loss"],
        "early": read_early_loss(folder),
        "scores": scores["scores"] if config["criterion"]["name"] == "output_loss" else None,
        "device": read_json(folder / "measured.json")["device"],
    }


def read_early_loss(folder: Path) -> float | None:
    """Return the mean training loss to the teacher's output over the ten steps before step 20; None if not trained."""
    path = folder / "history" / "distil.csv"
    if not path.exists():
        return None
    history = pd.read_csv(path)
    values = history.loc[(history["name"] == "train/output") & history["step"].between(EARLY - 10, EARLY - 1), "value"]
    return None if values.empty else float(values.mean())


def describe_plans(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row per task, ratio and plan with its predictors and the outcome of the usual training at seed 0."""
    usual = runs[(runs["distillation"] == "normalized") & (runs["seed"] == 0)]
    usual = usual[usual["steps"] == usual.groupby("task")["steps"].transform("min")]
    rows = []
    for (task, ratio, plan), same in usual.groupby(["task", "ratio", "plan"]):
        scores = next(iter(usual.loc[usual["task"] == task, "scores"].dropna()))
        sides = {repair: same[same["repair"] == repair].iloc[:1] for repair in OUTCOMES}
        if any(side.empty for side in sides.values()):
            continue
        first = same.iloc[0]
        row = {"task": task, "ratio": ratio, "plan": plan, "chosen_by": " ".join(sorted(set(same["chosen_by"])))}
        row["sum of scores"] = sum(scores[unit]["score"] for unit in first["units"].split())
        row["joint loss"] = first["pruned"]
        row["joint loss after repair"] = sides["least_squares"]["repaired"].iloc[0]
        row[f"loss in step {EARLY}"] = sides["none"]["early"].iloc[0]
        row |= {"params": first["params"], "macs": first["macs"]}
        row |= {name: sides[repair]["trained"].iloc[0] for repair, name in OUTCOMES.items()}
        rows.append(row | {"units": first["units"]})
    return pd.DataFrame(rows)


def compare_predictors(plans: pd.DataFrame) -> pd.DataFrame:
    """Return Kendall's tau of each predictor with each outcome, its bootstrap interval, and the regret.

    The regret is how much higher the outcome of the plan with the least value of the predictor is than the best
    outcome, as a fraction of that. Of parameters and MACs the greatest value counts: more should be better.
    """
    lines = []
    for (task, ratio), rows in plans.groupby(["task", "ratio"]) if len(plans) else ():
        for predictor in PREDICTORS:
            line = {"task": task, "ratio": f"{ratio:g}", "plans": str(len(rows)), "predictor": predictor}
            values = rows[predictor].to_numpy(float) * (-1 if predictor in ("params", "macs") else 1)
            for outcome in OUTCOMES.values():
                line[f"tau, {outcome}"] = describe_tau(values, rows[outcome].to_numpy(float))
                best, chosen = rows[outcome].min(), rows[outcome].iloc[int(np.argmin(values))]
                line[f"regret, {outcome}"] = f"{chosen / best - 1:.1%}"
            lines.append(line)
    return pd.DataFrame(lines)


def describe_tau(values: np.ndarray, outcomes: np.ndarray) -> str:
    """Return Kendall's tau-b with the 95 % interval of a bootstrap over plans; "" of values that are all the same."""
    if len(set(values)) == 1:
        return ""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(values), (RESAMPLES, len(values)))
    taus = [float(kendalltau(values[draw], outcomes[draw]).statistic) for draw in draws]
    low, high = np.nanpercentile(taus, (2.5, 97.5))
    return f"{float(kendalltau(values, outcomes).statistic):.2f} [{low:.2f}, {high:.2f}]"


def compare_losses(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row per loss of the optimum's students: output loss with and without a repair, over the seeds."""
    chosen = select_optimum(runs)
    chosen = chosen[chosen["steps"] == chosen.groupby("task")["steps"].transform("min")]
    several = chosen.groupby("task")["distillation"].transform("nunique") > 1
    return tabulate(chosen[several], "distillation")


def compare_lengths(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row per number of steps of the optimum's students with the usual loss."""
    chosen = select_optimum(runs)
    chosen = chosen[chosen["distillation"] == "normalized"]
    return tabulate(chosen[chosen.groupby("task")["steps"].transform("nunique") > 1], "steps")


def select_optimum(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of the plan that the knapsack of the output loss chooses, which has most of the seeds.

    Its plan may differ between seeds, as the calibration samples do.
    """
    by_scores = runs[runs["chosen_by"] == "output_loss"]
    seed_0, others = by_scores[by_scores["seed"] == 0], by_scores[by_scores["seed"] != 0]
    best = seed_0["pruned"] == seed_0.groupby("task")["pruned"].transform("min")
    return pd.concat([seed_0[best], others])


def tabulate(runs: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return a row per task and value of a column: output losses after training, and how far the repair lowers them."""
    lines = []
    for (task, value), rows in runs.groupby(["task", column]) if len(runs) else ():
        sides = {repair: rows[rows["repair"] == repair].set_index("seed")["trained"] for repair in OUTCOMES}
        line = {"task": task, column: str(value)}
        line |= {name: describe_spread(sides[repair]) for repair, name in OUTCOMES.items()}
        ratios = (sides["least_squares"] / sides["none"]).dropna()
        line["lower by the repair"] = describe_spread(1 - ratios, percent=True)
        line["seeds"] = str(len(ratios))
        lines.append(line)
    return pd.DataFrame(lines)


def describe_spread(values: pd.Series, percent: bool = False) -> str:
    """Return the mean of some values, with the least and the greatest where there are several; "" of none."""
    if values.empty:
        return ""
    texts = [f"{value:.1%}" if percent else f"{value:.4g}" for value in (values.mean(), values.min(), values.max())]
    return texts[0] + (f" ({texts[1]} to {texts[2]})" if len(values) > 1 else "")


def draw(plans: pd.DataFrame, runs: pd.DataFrame, path: Path) -> Path:
    """Draw outcomes of plans over their joint losses, before and after the repair, and of the optimum over steps."""
    tasks = list(dict.fromkeys(runs["task"]))
    figure, axes = plt.subplots(len(tasks), 3, figsize=(12, 3.6 * len(tasks)), squeeze=False)
    for task, row in zip(tasks, axes, strict=True):
        of_task = plans[plans["task"] == task] if len(plans) else plans
        for axis, predictor in zip(row, ("joint loss", "joint loss after repair"), strict=False):
            for number, outcome in enumerate(OUTCOMES.values()):
                if len(of_task):
                    axis.scatter(of_task[predictor], of_task[outcome], s=14, color=f"C{number}", label=outcome)
            axis.set(xlabel=f"{predictor}, untrained", ylabel="output loss after training", title=task)
            axis.legend(fontsize=8)
        chosen = select_optimum(runs[runs["task"] == task])
        chosen = chosen[chosen["distillation"] == "normalized"]
        for number, (repair, outcome) in enumerate(OUTCOMES.items()):
            means = chosen[chosen["repair"] == repair].groupby("steps")["trained"].mean()
            row[2].plot(means.index, means, marker="o", ms=4, color=f"C{number}", label=outcome)
        row[2].set(xlabel="training steps", ylabel="output loss after training", title=f"{task}, the optimum")
        row[2].legend(fontsize=8)
        for axis in row:
            for direction in ("x", "y"):
                set_log_scale(axis, direction)
            axis.grid(alpha=0.3)
    figure.tight_layout()
    return save_figure(figure, path)
