"""Texts that language models write for an evaluation: continuations of the same prompts by all of them."""

from pathlib import Path
from typing import Any

from conf.schema import build
from experiments.engine.artefacts import read_json
from experiments.engine.cache import cached
from experiments.engine.identity import RESULT_VERSION
from experiments.engine.job import TEACHER, Job
from experiments.engine.ranks import ask_rank_zero, barrier
from lightning_modules.training.trainer import autocast, resolve_precision


class Texts:
    """Writes continuations of the first `evaluation.samples` of `evaluation.prompts`, `evaluation.tokens` tokens each.

    They are for readers of the report; nothing is measured on them.
    """

    def __init__(self, job: Job, teacher_key: dict[str, Any]) -> None:
        self.job, self.cfg, self.teacher_key = job, job.cfg, teacher_key
        if job.teacher.tokenizer is None:
            raise ValueError("evaluation.prompts: the teacher has no tokenizer to read them by; choose null")
        self.prompts: list[str] = build(self.cfg.evaluation.prompts)[: self.cfg.evaluation.samples]

    def write(self, name: str, network: Any) -> None:
        """Write the continuations of one network to samples/<name>/texts.json, unless it is there.

        The teacher's are cached for all runs.
        """
        path, evaluation = self.job.run / "samples" / name / "texts.json", self.cfg.evaluation

        def generate() -> dict[str, Any]:
            with self.job.clock("write texts"), autocast(evaluation.precision, self.job.device):
                texts = network.write(self.prompts, evaluation.tokens, self.job.device)
            return {"prompts": self.prompts, "tokens": evaluation.tokens, "texts": texts}

        if not ask_rank_zero(path.exists()):
            precision = resolve_precision(evaluation.precision, self.job.device.type)
            protocol = {"prompts": self.prompts, "tokens": evaluation.tokens, "precision": precision}
            key = {**self.teacher_key, **protocol, "version": RESULT_VERSION}
            content = cached(self.job.run.cache / "texts", key, generate) if name == TEACHER else generate()
            self.job.run.write(f"samples/{name}/texts.json", content)
        barrier()


def read_texts(folder: Path, networks: Any) -> dict[str, Any]:
    """Return {"prompts": list, "texts": {network: list}} of some networks of a run; {} where there are no texts."""
    paths = {name: folder / "samples" / name / "texts.json" for name in networks}
    contents = {name: read_json(path) for name, path in paths.items() if path.exists()}
    if not contents:
        return {}
    prompts = next(iter(contents.values()))["prompts"]
    return {"prompts": prompts, "texts": {name: content["texts"] for name, content in contents.items()}}
