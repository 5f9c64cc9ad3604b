"""The stage `evaluate`: measures quality, costs and latency of all networks, the teacher among them."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from experiments.engine.artefacts import read_json
from experiments.engine.evaluation import Evaluator
from experiments.engine.identity import decides_by_latency
from experiments.engine.inputs import make_held_out_batches
from experiments.engine.job import Job
from experiments.engine.measures import list_unfit_measures, select_sample_measures
from experiments.engine.ranks import is_rank_zero
from experiments.engine.stage import Stage
from experiments.engine.stages.distil import Distil
from experiments.engine.stages.select import Select
from experiments.engine.sweep import check_search_direction

log = logging.getLogger(__name__)


class Evaluate(Stage):
    """Measures the teacher and every network made so far under one protocol, `cfg.evaluation`."""

    usual_name = "evaluate"

    def prepare(self, cfg: DictConfig) -> None:
        if self.name == self.usual_name:  # its first measure is what a job returns
            check_search_direction(cfg.evaluation.metrics)

    def link(self, before: Sequence[Stage]) -> None:
        self.selects = [stage for stage in before if isinstance(stage, Select)]
        self.trained = any(isinstance(stage, Distil) and stage.makes is not None for stage in before)
        self.scores = [stage.score for stage in self.selects]

    def artefacts(self) -> list[str]:
        return [self.artefact("metrics.json"), "samples"]

    def check(self, job: Job) -> None:
        calibration = {score.data(job) for score in self.scores if job.cfg.calibration.data is not None}
        self.evaluator = Evaluator(job, list(calibration))
        make_held_out_batches(job.cfg, job.data)
        measures = select_sample_measures(self.evaluator.measures)
        for sentence in list_unfit_measures(job.cfg, measures) if is_rank_zero() else ():
            log.warning(sentence)

    def run(self, job: Job) -> None:
        path = job.run / self.artefact("metrics.json")
        if path.exists():
            job.metrics = read_json(path)
        else:
            entries = {"run_id": job.run.id, "networks": list(job.networks), **self.describe_plans(job)}
            weights = ("ema" if job.cfg.ema_decay is not None else "last") if self.trained else "pruned"
            job.metrics = entries | {"eval/weights": weights} | self.evaluator.measure(job.networks)
            job.run.write(path.name, job.metrics)
        measured = self.evaluator.measure_latencies(job.student, self.get_latency_window(job.cfg))
        job.record(**name_latency_ratio(measured, job.cfg.selection))

    def describe_plans(self, job: Job) -> dict[str, Any]:
        """Return the requested ratio and what was removed, as entries of metrics.json."""
        plans = [select.plan_made for select in self.selects]
        budget = job.cfg.selection.get("budget", "params")
        entries: dict[str, Any] = {
            **get_requested_ratio(job.cfg.selection if len(plans) == 1 else {}, job.teacher.totals()),
            "plan/budget": budget,
            "plan/removed_units": sum("unit" in change for plan in plans for change in plan["changes"]),
            "plan/predicted_harm": sum(plan["predicted_harm"] for plan in plans),
        }
        if budget != "latency":  # a latency is measured, so its ratio is in measured.json
            entries["plan/achieved_ratio"] = self.get_achieved_ratio(job, budget)
        for name, ratio in (job.cfg.selection.get("budgets") or {}).items():
            entries[f"plan/requested_ratio_{name}"] = ratio
            if name != "latency":
                entries[f"plan/achieved_ratio_{name}"] = self.get_achieved_ratio(job, name)
        return entries

    def get_achieved_ratio(self, job: Job, budget: str) -> float:
        """Return the share of a cost that was removed, counted on the built student."""
        return float(1 - job.student.totals()[budget] / job.teacher.totals()[budget])

    def get_latency_window(self, cfg: DictConfig) -> tuple[float, float] | None:
        """Return the lowest and the highest ratio of a latency budget; None for other budgets."""
        selection = cfg.selection
        if not decides_by_latency(selection):
            return None
        ratio = (selection.get("budgets") or {}).get("latency", selection.get("ratio"))
        if ratio is None:
            return 0.0, 1.0
        tolerance = selection.tolerance
        return ratio, ratio + (tolerance.latency if isinstance(tolerance, DictConfig) else tolerance)


def name_latency_ratio(measured: dict[str, Any], selection: DictConfig) -> dict[str, Any]:
    """Return entries of measured.json in which the ratio of a latency budget has the name of its rank.

    It is `plan/achieved_ratio` where latency is the first budget, and `plan/achieved_ratio_latency` where it is one of
    several.
    """
    ratio = measured.pop("plan/achieved_ratio", None)
    names = {"plan/achieved_ratio": selection.get("budget") == "latency"}
    names["plan/achieved_ratio_latency"] = bool(selection.get("budgets"))
    return measured | {name: ratio for name, applies in names.items() if applies and ratio is not None}


def get_requested_ratio(selection: Mapping[str, Any], totals: Mapping[str, int]) -> dict[str, float | None]:
    """Return the requested ratio as an entry of metrics.json, and the target where the selection has one.

    The ratio is None where the selection is a list of units, or where there are several plans; `totals` are the
    teacher's costs.
    """
    target = selection.get("target")
    if target is None:
        return {"plan/requested_ratio": selection.get("ratio")}
    return {"plan/requested_ratio": 1 - target / totals[selection["budget"]], "plan/requested_target": target}
