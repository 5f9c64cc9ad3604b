"""The stage `build`: the pruned network before any training."""

from collections.abc import Sequence
from typing import Any

from conf.schema import ConfigError
from experiments.engine.job import Job
from experiments.engine.stage import Stage, find_latest
from experiments.engine.stages.select import Select


class Build(Stage):
    """Applies the plan of the last select stage.

    Args:
        makes: name of the pruned network.
        settings: see Stage.
    """

    usual_name = "build"

    def __init__(self, makes: str = "pruned", settings: dict[str, Any] | None = None) -> None:
        super().__init__(settings)
        self.makes: str = makes

    def link(self, before: Sequence[Stage]) -> None:
        select = find_latest(before, Select)
        if select is None:
            raise ConfigError(f"pipeline.stages.{self.name}: there is no stage before it that plans (Select)")
        self.select = select

    def artefacts(self) -> list[str]:
        return [f"networks/{self.makes}"]

    def run(self, job: Job) -> None:
        base, changes = self.select.source, self.select.plan_made["changes"]
        with job.clock("build the student"):
            pruned = job.networks[base].pruned(changes)
            job.save(self.makes, pruned)
        job.networks[self.makes], job.origins[self.makes] = pruned, (base, changes)
