"""Zero-shot accuracy of a language model on multiple-choice tasks, by the evaluation harness of EleutherAI."""

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
"""Name in lm-eval of the filter that leaves answers as they are."""


class ZeroShot:
    """Mean over tasks of one metric each, in [0, 1]; the value of a task is reported as `<measure>_<task>`.

    The seven tasks of Shortened LLaMA (arXiv 2402.02834) are in conf/evaluation/zero_shot.yaml; the paper used lm-eval
    at commit 3326c54. Needs the extra `secateur[zeroshot]`.

    Args:
        tasks: {task: metric}. Tasks of lm-eval read their data from the Hugging Face hub or its cache.
        limit: number of samples of each task that are used, the first ones; None uses all.
        include_path: folder with the YAML files of further tasks in lm-eval's format, which may use local data.
        batch_size: requests per forward pass.
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
        """The task manager of lm-eval for `include_path`, and for the tasks of lm-eval where one is not in there."""
        from lm_eval.tasks import TaskManager  # noqa: PLC0415  an optional extra, and slow to import

        if self.folder is not None:
            manager = TaskManager(include_path=str(self.folder), include_defaults=False)
            if set(self.tasks) <= set(manager.all_subtasks):
                return manager
        return TaskManager(include_path=None if self.folder is None else str(self.folder))

    def check(self, backbone: NetworkBackbone, data: Any) -> None:
        """Raise ValueError for a missing tokenizer, task or metric, and MissingData for missing data of a task."""
        if getattr(backbone, "tokenizer", None) is None:
            raise ValueError("zero-shot tasks need a language model with a tokenizer; choose a teacher that has one")
        if unknown := sorted(set(self.tasks) - set(self.manager.all_subtasks)):
            raise ValueError(f"tasks: {', '.join(unknown)} found neither in lm-eval nor in include_path={self.folder}")
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
        """Return what has to be equal for two values to be comparable."""
        settings: dict[str, Any] = {"tasks": " ".join(f"{name}:{metric}" for name, metric in self.tasks.items())}
        settings |= {"lm_eval": importlib.metadata.version("lm_eval"), "limit": self.limit}
        if self.folder is not None:
            settings["content"] = digest_of(file for file in Path(self.folder).rglob("*") if file.is_file())[:8]
        return settings

    def __call__(self, backbone: NetworkBackbone, device: torch.device) -> dict[str, float]:
        """Return {task: value of its metric}."""
        import lm_eval  # noqa: PLC0415  an optional extra, and slow to import
        from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

        network = backbone.to(device).eval().network
        # lm-eval changes the tokenizer (it adds a token for padding), so it gets a copy.
        model = HFLM(network, tokenizer=copy.deepcopy(backbone.tokenizer), batch_size=self.batch_size)
        with evaluating_alone():
            output = lm_eval.simple_evaluate(
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
        assert output is not None
        return {name: float(output["results"][name][f"{metric},{FILTER}"]) for name, metric in self.tasks.items()}


@contextlib.contextmanager
def evaluating_alone() -> Iterator[None]:
    """Hide the local rank, so that every rank has the results: lm-eval returns them on local rank 0 only."""
    rank = os.environ.pop("LOCAL_RANK", None)
    try:
        yield
    finally:
        if rank is not None:
            os.environ["LOCAL_RANK"] = rank
