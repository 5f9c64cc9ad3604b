"""The stage `export`: writes a folder that can be loaded without this project, and verifies that it can."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.schema import build
from experiments.engine.job import Job
from experiments.engine.ranks import barrier, is_rank_zero
from experiments.engine.stage import Stage
from experiments.engine.stages.distil import Distil
from experiments.engine.stages.select import Select
from experiments.reporting.card import compose_model_card
from lightning_modules.export.export import check_hub, export, make_dense_twin
from lightning_modules.export.to_onnx import check_onnx, describe_onnx, export_onnx
from lightning_modules.export.verify import verify


class Export(Stage):
    """Exports the last network with a model card, and reloads it in a process of its own without this project."""

    usual_name = "export"

    def link(self, before: Sequence[Stage]) -> None:
        self.selects = [stage for stage in before if isinstance(stage, Select)]
        self.trainings = [stage.training for stage in before if isinstance(stage, Distil)]

    def artefacts(self) -> list[str]:
        return [self.artefact("export")]

    def check(self, job: Job) -> None:
        cfg = job.cfg.export
        if cfg.dense_twin:
            kinds = {kind for select in self.selects for kind in select.kinds(job)}
            if kinds != {"bypass"} or len(self.selects) > 1 or not job.teacher.has_dense_twin:
                raise ValueError(
                    "export.dense_twin=true: only a plan that bypasses whole blocks of a diffusion network has such a "
                    "twin; choose false"
                )
        if cfg.onnx:
            check_onnx(job.teacher)
        if cfg.push_to_hub is not None:
            check_hub(cfg.push_to_hub)

    def run(self, job: Job) -> None:
        if is_rank_zero():
            with job.clock("export"), job.run.write_folder(self.artefact("export")) as partial:
                onnx_usage = self.write_onnx(job, partial / "onnx") if job.cfg.export.onnx else ""
                sampler = job.samplers.get(list(job.networks)[-1])
                scheduler = None if sampler is None else build(sampler.scheduler)
                export(job.student, partial, self.card(job, onnx_usage), scheduler)
                job.record(export_max_difference=verify(job.student, partial))
                if job.cfg.export.dense_twin:
                    make_dense_twin(job.teacher, job.student).save_pretrained(partial / "dense_twin")
        barrier()

    def write_onnx(self, job: Job, folder: Path) -> str:
        """Write the ONNX export, record its largest difference, and return how it is opened, in Markdown."""
        difference = export_onnx(job.student, folder)
        job.record(onnx_max_difference=difference)
        return describe_onnx(job.student, difference)

    def card(self, job: Job, onnx_usage: str) -> str:
        """Return the text of the model card; `onnx_usage` is empty where there is no ONNX export."""
        scores: dict[str, Any] = {}
        for select in self.selects:
            scores |= select.score.scores
        plans = [select.plan_made for select in self.selects]
        changes = [change for plan in plans for change in plan["changes"]]
        harm = sum(plan["predicted_harm"] for plan in plans)
        plan = {"teacher": job.teacher_id, "changes": changes, "predicted_harm": harm}
        return compose_model_card(job.cfg, plan, scores, job.metrics, job.student, self.trainings, onnx_usage)
