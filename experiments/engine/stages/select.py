"""The stage `select`: which units go, and how."""

from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig

from conf.schema import ConfigError, build
from criteria.base import ChangeKind, Level, Unit
from criteria.selection.base import Pool, check_names
from experiments.engine.artefacts import check_fresh, digest, read_json
from experiments.engine.identity import displayed
from experiments.engine.job import Job
from experiments.engine.ranks import is_rank_zero, wait_for
from experiments.engine.stage import Stage, latest
from experiments.engine.stages.score import Score
from lightning_modules.metrics.unit_latency import UnitLatencies, measure_unit_latencies
from lightning_modules.modules.joint_loss import JointMeasure
from lightning_modules.training.trainer import autocast

KINDS = {Level.DEPTH: ChangeKind.BYPASS, Level.OPERATOR: ChangeKind.REPLACE, Level.CHANNEL: ChangeKind.SLICE}
"""How units of each level are removed."""

REPORTED = ("report.html", "figures", "sounds")
"""What the report of a run writes."""


class Select(Stage):
    """Chooses by `cfg.selection` what goes from the network that the score stage before it has scored."""

    usual_name = "select"

    def prepare(self, cfg: DictConfig) -> None:
        self.selection = build(cfg.selection)

    def link(self, before: Sequence[Stage]) -> None:
        score = latest(before, Score)
        if score is None:
            raise ConfigError(f"pipeline.stages.{self.name}: there is no stage before it that scores units (Score)")
        self.score, self.source = score, score.source
        score.needed = self.selection.needs_scores

    def artefacts(self) -> list[str]:
        return [self.artefact("plan.json")]

    def check(self, job: Job) -> None:
        if (network := job.networks.get(self.source)) is None:
            return
        pool = self.pool(job)
        self.selection.check(pool)
        if not self.selection.needs_scores:
            network.check_plan(self.selection.changes(pool, {}))
        if self.selection.needs_joint_loss:
            self.score.calibration_batches(job)

    def pool(self, job: Job, latencies: UnitLatencies | None = None) -> Pool:
        """Return what can be removed and what everything costs; with latencies where they were measured."""
        network, level = job.networks[self.source], self.score.criterion.level
        totals = network.totals() | ({} if latencies is None else {"latency": latencies.network})
        return Pool(
            self.score.units(job),
            totals,
            network.shared(level),
            None if latencies is None else latencies.saved,
            network.cost if level == "channel" else None,
        )

    def kinds(self, job: Job) -> set[ChangeKind]:
        """Return the kinds of change that a plan of this selection can have."""
        if self.selection.needs_scores or self.source not in job.networks:
            return {KINDS[self.score.criterion.level]}
        return {change["kind"] for change in self.selection.changes(self.pool(job), {})}

    def run(self, job: Job) -> None:
        path, scores_key = job.run / self.artefact("plan.json"), digest(self.score.scores)
        network_id, units = job.identify(self.source), self.score.units(job)
        if path.exists():
            plan = read_json(path)
            check_fresh(path, "teacher", plan["teacher"], network_id)
            check_fresh(path, "scores", plan["scores"], scores_key)
            check_names([change["unit"] for change in plan["changes"] if "unit" in change], units, str(path))
        elif is_rank_zero():  # what is measured may differ between ranks, so one of them plans for all
            plan = self.plan(job, network_id, scores_key, units)
            made_from_another_plan = [name for stage in self.followers for name in stage.artefacts()]
            job.run.clear([*REPORTED, *made_from_another_plan])
            job.run.write_alone(path.name, plan)
        else:
            wait_for(path)
            plan = read_json(path)
        self.plan_made: dict[str, Any] = plan

    def plan(self, job: Job, network_id: str, scores_key: str, units: Sequence[Unit]) -> dict[str, Any]:
        """Return the content of plan.json."""
        pool = self.pool(job, self.latencies(job) if self.selection.needs_savings else None)
        with job.clock("select units"):
            harms = {name: entry["score"] for name, entry in self.score.scores.items()}
            changes = self.selection.changes(pool, harms, self.joint_loss(job))
        return {
            "teacher": network_id,
            "scores": scores_key,
            "selection": displayed(job.cfg)["selection"],
            "changes": changes,
            "protected": self.selection.protected_units(units),
            "predicted_harm": float(sum(harms[change["unit"]] for change in changes if "unit" in change)),
        }

    def latencies(self, job: Job) -> UnitLatencies:
        """Measure the latency of the network, and how much of it the removal of each unit saves."""
        with job.clock("time units"):  # in float32, as the student is timed in the end
            return measure_unit_latencies(
                job.networks[self.source], self.score.units(job), job.cfg.evaluation, job.device
            )

    def joint_loss(self, job: Job) -> Callable[[Sequence[str]], float]:
        """Return a function of unit names: the output loss without all of these units, on the calibration samples."""
        calibration = job.cfg.calibration
        measures: list[JointMeasure] = []

        def measure(names: Sequence[str]) -> float:
            if not measures:  # most selections never ask
                batches = self.score.calibration_batches(job)
                measures.append(JointMeasure(job.networks[self.source], batches, calibration.seed, job.device))
            with autocast(calibration.precision, job.device):
                return measures[0](names)

        return measure
