"""What language models write for an evaluation: the same prompts for all of them, side by side."""

from pathlib import Path
from typing import Any

from conf.schema import build
from experiments.engine.artefacts import read_json
from experiments.engine.cache import cached
from experiments.engine.identity import RESULT_VERSION
from experiments.engine.job import Job
from experiments.engine.ranks import agreed, barrier
from lightning_modules.training.trainer import autocast, precision_of


class Texts:
    """Continuations of `evaluation.prompts`, no more than `evaluation.samples`, `evaluation.tokens` tokens each.

    They are to be looked at, and are no measure.
    """

    def __init__(self, job: Job, teacher_key: dict[str, Any]) -> None:
        self.job, self.cfg, self.teacher_key = job, job.cfg, teacher_key
        if job.teacher.tokenizer is None:
            raise ValueError("evaluation.prompts: the teacher has no tokenizer to read them by; choose null")
        self.prompts: list[str] = build(self.cfg.evaluation.prompts)[: self.cfg.evaluation.samples]

    def write(self, name: str, network: Any) -> None:
        """Write samples/<name>/texts.json, unless it is there; the teacher's are shared by all runs."""
        path, evaluation = self.job.run / "samples" / name / "texts.json", self.cfg.evaluation

        def written() -> dict[str, Any]:
            with self.job.clock("write texts"), autocast(evaluation.precision, self.job.device):
                texts = network.write(self.prompts, evaluation.tokens, self.job.device)
            return {"prompts": self.prompts, "tokens": evaluation.tokens, "texts": texts}

        if not agreed(path.exists()):
            precision = precision_of(evaluation.precision, self.job.device.type)
            protocol = {"prompts": self.prompts, "tokens": evaluation.tokens, "precision": precision}
            key = {**self.teacher_key, **protocol, "version": RESULT_VERSION}
            found = cached(self.job.run.cache / "texts", key, written) if name == "teacher" else written()
            self.job.run.write(f"samples/{name}/texts.json", found)
        barrier()


def texts_of(folder: Path, networks: Any) -> dict[str, Any]:
    """{"prompts": list, "texts": {network: list}} of what some networks of a run wrote; nothing where none did."""
    paths = {name: folder / "samples" / name / "texts.json" for name in networks}
    found = {name: read_json(path) for name, path in paths.items() if path.exists()}
    if not found:
        return {}
    return {"prompts": next(iter(found.values()))["prompts"], "texts": {name: f["texts"] for name, f in found.items()}}
