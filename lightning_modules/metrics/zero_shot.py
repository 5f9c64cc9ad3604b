"""Accuracy of a language model on multiple-choice tasks without examples, by the evaluation harness of EleutherAI."""

import contextlib
import copy
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from datamodules.readers.base import MissingData, located
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.metrics.published import digest_of

FILTER = "none"
"""How lm-eval calls what it takes of an answer as it is."""


class ZeroShot:
    """The plain mean of a metric of each of some tasks, all from 0 to 1; each task's is `<measure>_<task>`.

    `tasks` has the metric by task: those that lm-eval brings along, whose data come from the Hugging Face hub or its
    cache, and those whose YAML files are below the folder `include_path`, as lm-eval describes them, which may name
    local data. `limit` takes no more than the first samples of each. The seven of Shortened LLaMA (arXiv 2402.02834)
    are in conf/evaluation/zero_shot.yaml; the paper used lm-eval at commit 3326c54. Needs the extra
    `secateur[zeroshot]`.
    """

    of = "network"
    better: Literal["lower", "higher"] = "higher"

    def __init__(
        self,
        tasks: dict[str, str],
        limit: int | None = None,
        include_path: str | None = None,
        batch_size: int = 8,
    ) -> None:
        if not tasks:
            raise ValueError("tasks={}: choose at least one task and its metric, such as {boolq: acc}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit} is out of range; choose a whole number of 1 or more, or null for all")
        if importlib.util.find_spec("lm_eval") is None:
            raise MissingData("zero-shot tasks need lm-eval: pip install -e '.[zeroshot]'")
        self.tasks, self.limit, self.batch_size = tasks, limit, batch_size
        self.folder = None if include_path is None else located(include_path)
        self.parts = tuple(tasks)

    @functools.cached_property
    def manager(self) -> Any:
        """What finds tasks by name: below `include_path`, and in lm-eval where that has not all of them."""
        from lm_eval.tasks import TaskManager  # noqa: PLC0415  an optional extra, and slow to import

        if self.folder is not None:
            own = TaskManager(include_path=str(self.folder), include_defaults=False)
            if set(self.tasks) <= set(own.all_subtasks):
                return own
        return TaskManager(include_path=None if self.folder is None else str(self.folder))

    def check(self, backbone: NetworkBackbone, data: Any) -> None:
        """No tokenizer, unknown tasks, metrics that a task has not; MissingData where a task's data are not here."""
        if getattr(backbone, "tokenizer", None) is None:
            raise ValueError("zero-shot tasks are of a language model with a tokenizer; choose a teacher that has one")
        if unknown := sorted(set(self.tasks) - set(self.manager.all_subtasks)):
            raise ValueError(f"tasks: {', '.join(unknown)} unknown to lm-eval, also below include_path={self.folder}")
        for name, metric in self.tasks.items():
            try:
                task = self.manager.load([name])["tasks"][name]
            except Exception as error:
                raise MissingData(
                    f"tasks: the data of {name} could be read neither from the hub nor from its cache "
                    f"({type(error).__name__}: {error}); fetch them where there is a network, or choose other tasks"
                ) from error
            known = [entry["metric"] for entry in task.config.metric_list]
            if metric not in known:
                raise ValueError(f"tasks.{name}={metric!r} is unknown; choose one of: {', '.join(known)}")

    def protocol(self) -> dict[str, Any]:
        found: dict[str, Any] = {"tasks": " ".join(f"{name}:{metric}" for name, metric in self.tasks.items())}
        found |= {"lm_eval": importlib.metadata.version("lm_eval"), "limit": self.limit}
        if self.folder is not None:
            found["content"] = digest_of(file for file in Path(self.folder).rglob("*") if file.is_file())[:8]
        return found

    def __call__(self, backbone: NetworkBackbone, device: torch.device) -> dict[str, float]:
        import lm_eval  # noqa: PLC0415  an optional extra, and slow to import
        from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

        network = backbone.to(device).eval().network
        # A copy of the tokenizer: lm-eval gives it a token for padding.
        model = HFLM(network, tokenizer=copy.deepcopy(backbone.tokenizer), batch_size=self.batch_size)
        with alone():
            found = lm_eval.simple_evaluate(
                model,
                tasks=list(self.tasks),
                num_fewshot=0,
                limit=self.limit,
                task_manager=self.manager,
                log_samples=False,
                bootstrap_iters=0,
                random_seed=None,  # the generators of this process stay as they are
                numpy_random_seed=None,
                torch_random_seed=None,
            )
        assert found is not None
        return {name: float(found["results"][name][f"{metric},{FILTER}"]) for name, metric in self.tasks.items()}


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Each rank evaluates for itself: lm-eval gives results to local rank 0 only."""
    rank = os.environ.pop("LOCAL_RANK", None)
    try:
        yield
    finally:
        if rank is not None:
            os.environ["LOCAL_RANK"] = rank
