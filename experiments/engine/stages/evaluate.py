"""The stage `evaluate`: measures quality, costs and latency of all networks, the teacher among them."""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from experiments.engine.artefacts import read_json
from experiments.engine.evaluation import Evaluator
from experiments.engine.inputs import make_held_out_batches
from experiments.engine.job import Job
from experiments.engine.stage import Stage
from experiments.engine.stages.distil import Distil
from experiments.engine.stages.select import Select


class Evaluate(Stage):
    """Measures the teacher and every network made so far under one protocol, `cfg.evaluation`."""

    usual_name = "evaluate"

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

    def run(self, job: Job) -> None:
        path = job.run / self.artefact("metrics.json")
        if path.exists():
            job.metrics = read_json(path)
        else:
            entries = {"run_id": job.run.id, "networks": list(job.networks), **self.describe_plans(job)}
            weights = ("ema" if job.cfg.ema_decay is not None else "last") if self.trained else "pruned"
            job.metrics = entries | {"eval/weights": weights} | self.evaluator.measure(job.networks)
            job.run.write(path.name, job.metrics)
        job.record(**self.evaluator.measure_latencies(job.student, self.get_latency_window(job.cfg)))

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
            entries["plan/achieved_ratio"] = 1 - job.student.totals()[budget] / job.teacher.totals()[budget]
        return entries

    def get_latency_window(self, cfg: DictConfig) -> tuple[float, float] | None:
        """Return the lowest and the highest ratio of a latency budget; None for other budgets."""
        selection = cfg.selection
        if selection.get("budget") != "latency":
            return None
        ratio = selection.get("ratio")
        return (0.0, 1.0) if ratio is None else (ratio, ratio + selection.tolerance)


def get_requested_ratio(selection: Mapping[str, Any], totals: Mapping[str, int]) -> dict[str, float | None]:
    """Return the requested ratio as an entry of metrics.json, and the target where the selection has one.

    The ratio is None where the selection is a list of units, or where there are several plans; `totals` are the
    teacher's costs.
    """
    target = selection.get("target")
    if target is None:
        return {"plan/requested_ratio": selection.get("ratio")}
    return {"plan/requested_ratio": 1 - target / totals[selection["budget"]], "plan/requested_target": target}
