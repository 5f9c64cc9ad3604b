"""The stage `save`: what was trained from nothing is written as a teacher that others can load."""

from collections.abc import Sequence

from conf.schema import ConfigError
from experiments.engine.job import Job
from experiments.engine.ranks import barrier, is_rank_zero
from experiments.engine.stage import Stage, latest
from experiments.engine.stages.train import Train


class Save(Stage):
    """Writes the weights of the module that the train stage before it has trained, in half precision.

    It comes after the test: a module may turn its own weights into half precision to save them.
    """

    usual_name = "save"
    needs_teacher = False

    def link(self, before: Sequence[Stage]) -> None:
        train = latest(before, Train)
        if train is None:
            raise ConfigError(f"pipeline.stages.{self.name}: there is no stage before it that trains (Train)")
        self.train = train

    def artefacts(self) -> list[str]:
        return [self.artefact("weights")]

    def run(self, job: Job) -> None:
        if is_rank_zero() and not (job.run / self.artefact("weights")).exists():
            with job.run.staged(self.artefact("weights")) as folder:
                self.train.module.save(folder)
        barrier()
