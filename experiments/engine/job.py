"""The state that the stages of one job share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from datamodules.base import DataModule
from experiments.engine.artefacts import write_json
from experiments.engine.clock import Clock
from experiments.engine.identity import fingerprint
from experiments.engine.ranks import is_rank_zero, wait_for
from experiments.engine.run import Run
from experiments.reporting.dashboard import Dashboard
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.loading import load_network

TEACHER = "teacher"
"""Name of the pretrained network among the networks of a job."""


@dataclass
class Job:
    """A job: its configuration, its run, and the networks and figures that its stages have made so far."""

    cfg: DictConfig
    """configuration of the stage that runs now: the job's, with the stage's own settings"""
    run: Run
    device: torch.device
    clock: Clock
    dashboard: Dashboard
    data: DataModule
    """the data module of `cfg.data`"""
    teacher_id: str
    """fingerprint of the teacher's files; "none" in a pipeline without a teacher"""
    networks: dict[str, NetworkBackbone] = field(default_factory=dict)
    """{name: network} in the order in which they were made, the teacher first"""
    origins: dict[str, tuple[str, Sequence[Mapping[str, Any]]]] = field(default_factory=dict)
    """{name of a network: (name of the network that it was pruned from, changes of the plan)}"""
    samplers: dict[str, DictConfig] = field(default_factory=dict)
    """{name of a network: the group `sampler` for its samples}, where the stage that made it has one of its own"""
    metrics: dict[str, Any] = field(default_factory=dict)
    """the content of metrics.json: nothing in it depends on time or on the machine"""

    @property
    def teacher(self) -> NetworkBackbone:
        return self.networks[TEACHER]

    @property
    def student(self) -> NetworkBackbone:
        """The network that the job delivers: the last one that was made."""
        return list(self.networks.values())[-1]

    def identify(self, name: str) -> str:
        """Return the fingerprint of a network's files: the teacher's, or those in networks/<name>."""
        if name == TEACHER:
            return self.teacher_id
        return fingerprint([path for path in self.folder_of(name).rglob("*") if path.is_file()], self.run.cache)

    def folder_of(self, name: str) -> Path:
        """Return the folder of a network that a stage makes."""
        return self.run / "networks" / name

    def save(self, name: str, network: NetworkBackbone) -> None:
        """Write a network to networks/<name> unless it is there; ranks other than rank 0 wait for it."""
        folder = self.folder_of(name)
        if not is_rank_zero():
            wait_for(folder)
        elif not folder.exists():
            with self.run.write_folder(f"networks/{name}") as partial:
                network.save(partial)

    def load(self, name: str, base: str, changes: Sequence[Mapping[str, Any]]) -> NetworkBackbone:
        """Return the network in networks/<name>, which was pruned from the network `base` by these changes."""
        return self.networks[base].adopt(load_network(self.folder_of(name)), changes)

    def record(self, **measured: Any) -> None:
        """Add figures that depend on the machine (times, memory) to measured.json."""
        self.run.measured |= measured
        if is_rank_zero():
            write_json(self.run / "measured.json", self.run.measured)
