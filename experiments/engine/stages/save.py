"""The stage `save`: writes a network that was trained from random weights, so that it can be loaded as a teacher."""

from collections.abc import Sequence

from conf.schema import ConfigError
from experiments.engine.job import Job
from experiments.engine.ranks import barrier, is_rank_zero
from experiments.engine.stage import Stage, find_latest
from experiments.engine.stages.test import Test
from experiments.engine.stages.train import Train


class Save(Stage):
    """Writes the weights of the last train stage's module in half precision.

    It comes after the test stage, which measures what some modules save (an autoencoder's scaling factor); and a module
    may convert its own weights to half precision to save them.
    """

    usual_name = "save"
    needs_teacher = False

    def link(self, before: Sequence[Stage]) -> None:
        train = find_latest(before, Train)
        if train is None:
            raise ConfigError(f"pipeline.stages.{self.name}: there is no stage before it that trains (Train)")
        if find_latest(before, Test) is None:
            raise ConfigError(
                f"pipeline.stages.{self.name}: there is no stage before it that tests (Test), and what it measures is "
                "saved with the network"
            )
        self.train = train

    def artefacts(self) -> list[str]:
        return [self.artefact("weights")]

    def run(self, job: Job) -> None:
        if is_rank_zero() and not (job.run / self.artefact("weights")).exists():
            with job.run.write_folder(self.artefact("weights")) as folder:
                self.train.module.save(folder)
        barrier()
