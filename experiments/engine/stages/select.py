"""The stage `select`: chooses the units to remove, and how each of them is removed."""

from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig

from conf.schema import ConfigError, build
from criteria.base import ChangeKind, Level, Unit
from criteria.selection.base import Pool, check_names
from experiments.engine.artefacts import check_fresh, digest, format_json, read_json
from experiments.engine.identity import get_displayed_settings
from experiments.engine.job import Job
from experiments.engine.ranks import barrier, is_rank_zero, wait_for
from experiments.engine.stage import Stage, find_latest
from experiments.engine.stages.score import Score
from experiments.engine.stages.select_front import describe_front, describe_ratios, format_csv
from lightning_modules.metrics.unit_latency import UnitLatencies, measure_unit_latencies
from lightning_modules.modules.joint_loss import JointMeasure
from lightning_modules.training.trainer import autocast

KINDS = {Level.DEPTH: ChangeKind.BYPASS, Level.OPERATOR: ChangeKind.REPLACE, Level.CHANNEL: ChangeKind.SLICE}
"""{level of units: how they are removed}"""

REPORTED = ("report.html", "figures", "sounds")
"""Files and folders that the report of a run writes."""


class Select(Stage):
    """Chooses by `cfg.selection` what is removed from the network that the last score stage has scored."""

    usual_name = "select"

    def prepare(self, cfg: DictConfig) -> None:
        self.selection = build(cfg.selection)

    def link(self, before: Sequence[Stage]) -> None:
        score = find_latest(before, Score)
        if score is None:
            raise ConfigError(f"pipeline.stages.{self.name}: there is no stage before it that scores units (Score)")
        self.score, self.source = score, score.source
        score.needed = self.selection.needs_scores

    def artefacts(self) -> list[str]:
        front = [self.artefact("pareto.json"), self.artefact("pareto.csv")] if self.selection.pareto else []
        return [self.artefact("plan.json"), *front]

    def check(self, job: Job) -> None:
        if (network := job.networks.get(self.source)) is None:
            return
        pool = self.pool(job)
        self.selection.check(pool)
        if not self.selection.needs_scores:
            network.check_plan(self.selection.changes(pool, {}))
        if self.selection.needs_joint_loss:
            self.score.make_calibration_batches(job)

    def pool(self, job: Job, latencies: UnitLatencies | None = None) -> Pool:
        """Return the units that can be removed and the costs of everything, with latencies where they are measured."""
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
        """Return the kinds of change that a plan of this selection can contain."""
        if self.selection.needs_scores or self.source not in job.networks:
            return {KINDS[self.score.criterion.level]}
        return {change["kind"] for change in self.selection.changes(self.pool(job), {})}

    def run(self, job: Job) -> None:
        path, scores_key = job.run / self.artefact("plan.json"), digest(self.score.scores)
        network_id, units = job.identify(self.source), self.score.units(job)
        self.measured_pool: Pool | None = None
        if path.exists():
            plan = read_json(path)
            check_fresh(path, "teacher", plan["teacher"], network_id)
            check_fresh(path, "scores", plan["scores"], scores_key)
            check_names([change["unit"] for change in plan["changes"] if "unit" in change], units, str(path))
        elif is_rank_zero():  # measured latencies may differ between ranks, so one rank plans for all
            plan = self.plan(job, network_id, scores_key, units)
            made_from_another_plan = [name for stage in self.followers for name in stage.artefacts()]
            job.run.clear([*REPORTED, *made_from_another_plan])
            job.run.write_on_rank_zero(path.name, plan)
        else:
            wait_for(path)
            plan = read_json(path)
        self.plan_made: dict[str, Any] = plan
        if is_rank_zero():
            self.write_front(job)
        barrier()

    def write_front(self, job: Job) -> None:
        """Write pareto.json and pareto.csv where the front is wanted and not there yet."""
        files = [job.run / name for name in self.artefacts()[1:]]
        if all(path.exists() for path in files):
            return
        pool = self.pool_with_latencies(job)
        with job.clock("find the front"):
            front = describe_front(self.selection, pool, self.get_harms(), self.plan_made)
        for path, text in zip(files, (format_json(front), format_csv(front)), strict=True):
            job.run.write_text_on_rank_zero(path.name, text)

    def get_harms(self) -> dict[str, float]:
        """Return {unit: score}."""
        return {name: entry["score"] for name, entry in self.score.scores.items()}

    def pool_with_latencies(self, job: Job) -> Pool:
        """Return the pool, with latencies if the selection needs them; they are measured at the first call."""
        if self.measured_pool is None:
            self.measured_pool = self.pool(job, self.latencies(job) if self.selection.needs_savings else None)
        return self.measured_pool

    def plan(self, job: Job, network_id: str, scores_key: str, units: Sequence[Unit]) -> dict[str, Any]:
        """Return the content of plan.json."""
        pool, harms = self.pool_with_latencies(job), self.get_harms()
        with job.clock("select units"):
            changes = self.selection.changes(pool, harms, self.joint_loss(job))
        removed = [change["unit"] for change in changes if "unit" in change]
        return {
            "teacher": network_id,
            "scores": scores_key,
            "selection": get_displayed_settings(job.cfg)["selection"],
            "changes": changes,
            "protected": self.selection.protected_units(units),
            "predicted_harm": float(sum(harms[name] for name in removed)),
            **describe_ratios(self.selection, pool, removed),
        }

    def latencies(self, job: Job) -> UnitLatencies:
        """Return the latency of the network, and how much of it the removal of each unit saves, both measured."""
        with job.clock("time units"):  # in float32, as the student is timed in the end
            return measure_unit_latencies(
                job.networks[self.source], self.score.units(job), job.cfg.evaluation, job.device
            )

    def joint_loss(self, job: Job) -> Callable[[Sequence[str]], float]:
        """Return a function of unit names that gives the output loss without them on the calibration samples."""
        calibration = job.cfg.calibration
        measures: list[JointMeasure] = []

        def measure(names: Sequence[str]) -> float:
            if not measures:  # most selections never call this function
                batches = self.score.make_calibration_batches(job)
                measures.append(JointMeasure(job.networks[self.source], batches, calibration.seed, job.device))
            with autocast(calibration.precision, job.device):
                return measures[0](names)

        return measure
