"""The stage `test`: measures a network that was trained from random weights on the held-out samples."""

from collections.abc import Sequence

from conf.schema import ConfigError
from experiments.engine.artefacts import read_json
from experiments.engine.inputs import make_held_out_batches
from experiments.engine.job import Job
from experiments.engine.stage import Stage, find_latest
from experiments.engine.stages.train import Train
from lightning_modules.training.trainer import make_trainer


class Test(Stage):
    """Runs the test loop of the last train stage's module and writes metrics.json."""

    usual_name = "test"
    needs_teacher = False

    def link(self, before: Sequence[Stage]) -> None:
        train = find_latest(before, Train)
        if train is None:
            raise ConfigError(f"pipeline.stages.{self.name}: there is no stage before it that trains (Train)")
        self.train = train

    def artefacts(self) -> list[str]:
        return [self.artefact("metrics.json")]

    def check(self, job: Job) -> None:
        make_held_out_batches(job.cfg, job.data)

    def run(self, job: Job) -> None:
        path = job.run / self.artefact("metrics.json")
        if path.exists():
            job.metrics = read_json(path)
            self.train.module.metrics = {key: value for key, value in job.metrics.items() if key != "run_id"}
            return
        module = self.train.module
        with job.clock(self.name):
            trainer = make_trainer(job.cfg.trainer, "test", job.cfg.evaluation.precision)
            trainer.test(module, make_held_out_batches(job.cfg, job.data), verbose=False)
        job.metrics = {"run_id": job.run.id, **module.metrics}
        job.run.write(path.name, job.metrics)
