"""The base class of the stages of a pipeline."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, TypeVar

from omegaconf import DictConfig

from conf.schema import ConfigError
from experiments.engine.job import TEACHER, Job

Kind = TypeVar("Kind", bound="Stage")


class Stage:
    """One step of a pipeline: it makes artefacts, each complete or absent, from those of the stages before it.

    A stage whose artefacts exist loads them instead of making them: this is how a job resumes.

    Args:
        settings: changes of the configuration for this stage alone, as in `{trainer: {steps: 50}}`. A part with a
            `_target_` replaces the whole node, any other part changes the fields that it names.
    """

    usual_name = ""
    """name of the stage with which its artefacts have names without the stage's (`plan.json`)"""
    needs_teacher = True
    """False where the stage works without a pretrained network"""
    makes: str | None = None
    """name of the network that the stage makes; None where it makes none"""

    def __init__(self, settings: dict[str, Any] | None = None) -> None:
        self.name = self.usual_name
        self.settings = dict(settings or {})
        self.followers: Sequence[Stage] = ()
        """the stages after this one"""

    def prepare(self, cfg: DictConfig) -> None:
        """Build the objects that the configuration names for this stage, before any file is read; raises ValueError."""

    def link(self, before: Sequence["Stage"]) -> None:
        """Find the stages before this one whose results it uses; raises ConfigError where one is missing."""

    def artefacts(self) -> list[str]:
        """Return the files and folders that the stage makes, as paths below the run's folder."""
        return []

    def check(self, job: Job) -> None:
        """Raise ValueError for everything that would fail later. All stages are checked before the first one runs.

        `job.networks` contains the teacher only; checks of a network that a stage makes belong in `run`.
        """

    def run(self, job: Job) -> None:
        """Make the artefacts that do not exist yet, and add what later stages use to the job."""
        raise NotImplementedError

    def artefact(self, usual: str) -> str:
        """Return the name of an artefact: `plan.json`, or `plan-again.json` in a stage with the name `again`."""
        if self.name == self.usual_name:
            return usual
        path = PurePosixPath(usual)
        return f"{path.stem}-{self.name}{path.suffix}"


def find_latest(before: Sequence[Stage], kind: type[Kind]) -> Kind | None:
    """Return the last stage of a kind in a list of stages; None where there is none."""
    return next((stage for stage in reversed(before) if isinstance(stage, kind)), None)


def find_latest_network(before: Sequence[Stage]) -> str:
    """Return the name of the last network that these stages make, the teacher's where they make none."""
    return next((stage.makes for stage in reversed(before) if stage.makes is not None), TEACHER)


NAME = re.compile(r"[a-z][a-z0-9_]*")
"""Names of stages and networks: they become names of files."""


def check_names(stages: Sequence[Stage]) -> None:
    """Raise ConfigError for a name of a stage or network that does not match NAME, or that two networks have."""
    networks = [TEACHER]
    for stage in stages:
        for field, name in (("", stage.name), (".makes", stage.makes)):
            if name is not None and not NAME.fullmatch(name):
                raise ConfigError(
                    f"pipeline.stages.{stage.name}{field}: {name!r} is no name; choose lower-case letters, digits and _"
                )
        if stage.makes in networks:
            raise ConfigError(
                f"pipeline.stages.{stage.name}.makes={stage.makes!r}: there is a network of that name already; choose "
                f"another name than: {', '.join(networks)}"
            )
        networks += [stage.makes] if stage.makes is not None else []
