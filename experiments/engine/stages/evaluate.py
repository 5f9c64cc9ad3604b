"""The stage `evaluate`: quality, cost and speed of all networks, beside the teacher."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from experiments.engine.artefacts import read_json
from experiments.engine.evaluation import Evaluator
from experiments.engine.inputs import held_out
from experiments.engine.job import Job
from experiments.engine.stage import Stage
from experiments.engine.stages.distil import Distil
from experiments.engine.stages.select import Select


class Evaluate(Stage):
    """Measures the teacher and every network made so far, under one protocol (`cfg.evaluation`)."""

    usual_name = "evaluate"

    def link(self, before: Sequence[Stage]) -> None:
        self.selects = [stage for stage in before if isinstance(stage, Select)]
        self.trained = any(isinstance(stage, Distil) and stage.makes is not None for stage in before)
        self.scores = [stage.score for stage in self.selects]

    def artefacts(self) -> list[str]:
        return [self.artefact("metrics.json"), "samples"]

    def check(self, job: Job) -> None:
        others = {score.data(job) for score in self.scores if job.cfg.calibration.data is not None}
        self.evaluator = Evaluator(job, list(others))
        held_out(job.cfg, job.data)

    def run(self, job: Job) -> None:
        path = job.run / self.artefact("metrics.json")
        if path.exists():
            job.metrics = read_json(path)
        else:
            plan = {"run_id": job.run.id, "networks": list(job.networks), **self.plan(job)}
            weights = ("ema" if job.cfg.ema_decay is not None else "last") if self.trained else "pruned"
            job.metrics = plan | {"eval/weights": weights} | self.evaluator.metrics(job.networks)
            job.run.write(path.name, job.metrics)
        job.record(**self.evaluator.measured(job.student, self.latency_window(job.cfg)))

    def plan(self, job: Job) -> dict[str, Any]:
        """Return what was asked for and what was removed, as entries of metrics.json."""
        plans = [select.plan_made for select in self.selects]
        budget = job.cfg.selection.get("budget", "params")
        entries: dict[str, Any] = {
            **requested(job.cfg.selection if len(plans) == 1 else {}, job.teacher.totals()),
            "plan/budget": budget,
            "plan/removed_units": sum("unit" in change for plan in plans for change in plan["changes"]),
            "plan/predicted_harm": sum(plan["predicted_harm"] for plan in plans),
        }
        if budget != "latency":  # that is measured, and stands in measured.json
            entries["plan/achieved_ratio"] = 1 - job.student.totals()[budget] / job.teacher.totals()[budget]
        return entries

    def latency_window(self, cfg: DictConfig) -> tuple[float, float] | None:
        """Return the ratios of latency that were asked for; None where the budget is another."""
        selection = cfg.selection
        if selection.get("budget") != "latency":
            return None
        ratio = selection.get("ratio")
        return (0.0, 1.0) if ratio is None else (ratio, ratio + selection.tolerance)


def requested(selection: Mapping[str, Any], totals: Mapping[str, int]) -> dict[str, float | None]:
    """Return the ratio that was asked for, as an entry of metrics.json, and the target where one was given.

    The ratio is None where units were given, or where there were several plans; `totals` are the teacher's.
    """
    target = selection.get("target")
    if target is None:
        return {"plan/requested_ratio": selection.get("ratio")}
    return {"plan/requested_ratio": 1 - target / totals[selection["budget"]], "plan/requested_target": target}
