"""The stage `score`: a score per unit, the harm that its removal does."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from conf.schema import build
from criteria.base import SCORING_VERSION, Unit, check_scores
from experiments.engine.artefacts import check_fresh, digest, read_json
from experiments.engine.cache import cached
from experiments.engine.identity import fingerprint, get_effective_settings
from experiments.engine.inputs import build_calibration_data, make_calibration_batches, make_criterion_batches
from experiments.engine.job import Job
from experiments.engine.ranks import ask_rank_zero
from experiments.engine.stage import Stage, find_latest_network
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.modules.scoring import score
from lightning_modules.training.trainer import make_trainer, resolve_precision

Scores = dict[str, dict[str, float]]
"""{name of a unit: {"score": harm, and "standard_error" where it is known}}"""


class Score(Stage):
    """Scores all units of the last network by `cfg.criterion`, on the samples of `cfg.calibration`.

    Scores are cached for all runs, as they depend neither on the ratio nor on the training seed.
    """

    usual_name = "score"

    def __init__(self, settings: dict[str, Any] | None = None) -> None:
        super().__init__(settings)
        self.needed = False
        """whether a selection after this stage uses the scores"""
        self.scores: Scores = {}
        self._data: Any = None

    def prepare(self, cfg: DictConfig) -> None:
        self.criterion = build(cfg.criterion)

    def link(self, before: Sequence[Stage]) -> None:
        self.source = find_latest_network(before)

    def artefacts(self) -> list[str]:
        return [self.artefact("scores.json")]

    def units(self, job: Job) -> list[Unit]:
        """Return the units that are scored, in the order of the forward pass."""
        return job.networks[self.source].units(self.criterion.level)

    def check(self, job: Job) -> None:
        cfg = job.cfg
        if (network := job.networks.get(self.source)) is None:
            return
        if reason := self.criterion.supports(network):
            raise ValueError(
                f"criterion={cfg.criterion.name} cannot score teacher={cfg.teacher.get('name', '?')}: {reason}"
            )
        check_data(network, "data", cfg.data.get("name"), job.data)
        if cfg.calibration.data is not None:
            check_data(network, "calibration.data", cfg.calibration.data.get("name"), self.data(job))
        if self.needed:
            self.batches(job)

    def data(self, job: Job) -> Any:
        """Return the data module that calibration samples come from."""
        if self._data is None:
            self._data = build_calibration_data(job.cfg, job.data)
        return self._data

    def make_calibration_batches(self, job: Job) -> DataLoader:
        return make_calibration_batches(job.cfg, self.data(job), self.criterion, job.networks[self.source])

    def batches(self, job: Job) -> DataLoader | None:
        """Return the batches that the criterion looks at; None where it looks at none."""
        if self.criterion.needs == "nothing":
            return None
        calibration = self.make_calibration_batches(job) if self.criterion.needs == "data" else None
        return make_criterion_batches(self.criterion, job.cfg, job.networks[self.source], self.data(job), calibration)

    def run(self, job: Job) -> None:
        if not self.needed:
            return
        cfg, calibration, criterion = job.cfg, job.cfg.calibration, self.criterion
        network, units, batches = job.networks[self.source], self.units(job), self.batches(job)
        network.memory_bound = None if calibration.memory_gib is None else int(calibration.memory_gib * 2**30)
        network.compiled = {} if calibration.compile else None
        key = self.key(job, batches)
        path = job.run / self.artefact("scores.json")
        if ask_rank_zero(path.exists()):
            stored = read_json(path)
            check_fresh(path, "scores", stored["key"], digest(key))
            check_scores(stored["scores"], units)
            self.scores = stored["scores"]
            return

        def compute() -> Scores:
            trainer = make_trainer(
                cfg.trainer, "score units", calibration.precision, inference_mode=not criterion.needs_grad
            )
            return score(criterion, network, units, batches, trainer, calibration.seed)

        with job.clock("score units"):
            self.scores = cached(job.run.cache / "scores", key, compute)
        check_scores(self.scores, units)
        job.run.write(
            path.name,
            {
                "key": digest(key),
                "teacher": job.identify(self.source),
                "criterion": cfg.criterion.name,
                "level": criterion.level,
                "scores": self.scores,
            },
        )

    def key(self, job: Job, batches: DataLoader | None) -> dict[str, Any]:
        """Return everything that the scores depend on: the key under which they are cached."""
        cfg, fields = job.cfg, get_effective_settings(job.cfg)
        precision = resolve_precision(cfg.calibration.precision, job.device.type)
        return {
            "teacher": job.identify(self.source),
            "options": {k: v for k, v in fields["teacher"].items() if k not in ("name", "path")},
            "criterion": fields["criterion"],
            "files": fingerprint(self.criterion.files(), job.run.cache),
            "units": [unit.name for unit in self.units(job)],
            "calibration": {k: v for k, v in fields["calibration"].items() if k != "data"} | {"precision": precision},
            "data": None if batches is None else hash_batches(batches),  # the name of the data set has no effect
            "noise_scheduler": fields["noise_scheduler"],
            "ranks": cfg.trainer.devices * cfg.trainer.num_nodes if fields["criterion"].get("stable_for") else None,
            "version": SCORING_VERSION,
        }


def check_data(network: NetworkBackbone, field: str, name: str | None, data: Any) -> None:
    """Raise ValueError, naming the field of the configuration, where a network cannot take a data set's samples."""
    try:
        network.check_data(data)
    except ValueError as error:
        raise ValueError(f"{field}={name}: {error}") from error


HASHED_BATCHES = 64
"""Maximum number of calibration batches, evenly spaced, whose content is part of the key of scores."""


def hash_batches(batches: DataLoader) -> str:
    """Return the sha256 of all values (images, labels, captions, seeds) of at most HASHED_BATCHES batches."""
    indices = list(batches.batch_sampler)  # type: ignore[arg-type]
    chosen = indices[:: -(-len(indices) // HASHED_BATCHES)]
    total = hashlib.sha256()
    for batch in DataLoader(
        batches.dataset, batch_sampler=chosen, num_workers=batches.num_workers, collate_fn=batches.collate_fn
    ):
        for name in sorted(batch):
            value = batch[name]
            total.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return total.hexdigest()
