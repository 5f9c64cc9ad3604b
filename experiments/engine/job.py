"""What the stages of one job share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from experiments.engine.artefacts import write_json
from experiments.engine.clock import Clock
from experiments.engine.identity import fingerprint
from experiments.engine.ranks import is_rank_zero, wait_for
from experiments.engine.run import Run
from experiments.reporting.dashboard import Dashboard
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.loading import load_network

TEACHER = "teacher"
"""The name of the pretrained network among the networks of a job."""


@dataclass
class Job:
    """The configuration of the stage at work, the run, and what the stages have made so far."""

    cfg: DictConfig
    """of the stage at work: the job's configuration with the stage's own settings"""
    run: Run
    device: torch.device
    clock: Clock
    dashboard: Dashboard
    data: Any
    """the data module of `cfg.data`"""
    teacher_id: str
    """fingerprint of the teacher's files; "none" in a pipeline without a teacher"""
    networks: dict[str, NetworkBackbone] = field(default_factory=dict)
    """all networks by name, the teacher first, in the order in which they were made"""
    origins: dict[str, tuple[str, Sequence[Mapping[str, Any]]]] = field(default_factory=dict)
    """{network: (the network that it was pruned from, the changes of the plan)}"""
    metrics: dict[str, Any] = field(default_factory=dict)
    """the content of metrics.json: nothing in it depends on time or on the machine"""

    @property
    def teacher(self) -> NetworkBackbone:
        return self.networks[TEACHER]

    @property
    def student(self) -> NetworkBackbone:
        """The network that the job delivers: the one that was made last."""
        return list(self.networks.values())[-1]

    def identify(self, name: str) -> str:
        """Return a fingerprint of a network: of the teacher's files, or of those in networks/<name>."""
        if name == TEACHER:
            return self.teacher_id
        return fingerprint([path for path in self.folder_of(name).rglob("*") if path.is_file()], self.run.cache)

    def folder_of(self, name: str) -> Path:
        """Return the folder of a network that a stage has made."""
        return self.run / "networks" / name

    def save(self, name: str, network: NetworkBackbone) -> None:
        """Write a network to networks/<name> unless it is there; ranks other than the first wait for it."""
        folder = self.folder_of(name)
        if not is_rank_zero():
            wait_for(folder)
        elif not folder.exists():
            with self.run.staged(f"networks/{name}") as partial:
                network.save(partial)

    def load(self, name: str, base: str, changes: Sequence[Mapping[str, Any]]) -> NetworkBackbone:
        """Read networks/<name>, which was pruned from the network `base` by these changes."""
        return self.networks[base].adopt(load_network(self.folder_of(name)), changes)

    def record(self, **measured: Any) -> None:
        """Write figures that depend on the machine (times, memory) into measured.json, beside those there are."""
        self.run.measured |= measured
        if is_rank_zero():
            write_json(self.run / "measured.json", self.run.measured)
