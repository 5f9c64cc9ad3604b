"""The measures of an evaluation: made and checked before anything runs, taken of one network's samples at a time."""

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig
from safetensors.numpy import load_file, save_file

from conf.schema import RESERVED, build
from datamodules.readers.base import MissingData
from experiments.engine.artefacts import digest
from experiments.engine.cache import is_intact, write_shared_file
from experiments.engine.identity import RESULT_VERSION
from experiments.engine.ranks import agreed, barrier, is_rank_zero
from lightning_modules.metrics.features import Features, resized
from lightning_modules.metrics.protocol import Labels, Measure, NetworkMeasure, Samples, in_parts, origin
from lightning_modules.metrics.statistics import Statistics

Measures = dict[str, Measure | NetworkMeasure]


def build_measures(cfg: DictConfig) -> Measures:
    """Those of `cfg.evaluation.metrics`.

    Raises MissingData naming the one whose weights are not on this machine, ValueError one that cannot be made.
    """
    made = {}
    for name, node in cfg.evaluation.metrics.items():
        try:
            made[str(name)] = build(node)
        except InstantiationException as error:
            kind = MissingData if isinstance(error.__cause__, MissingData) else ValueError
            raise kind(f"evaluation.metrics.{name}: {error.__cause__ or error}") from error
    return made


class TrainingImages:
    """The training images as a reference: statistics of all, features of some; kept under a hash of what they are of.

    `limit` images, spread evenly over the set, are those whose features are kept. Images are resized as samples are.
    """

    def __init__(self, data: Any, cache: Path, device: torch.device, limit: int, size: int | None) -> None:
        self.data, self.cache, self.device, self.limit, self.size = data, cache, device, limit, size
        self.known: dict[tuple[str, ...], Any] = {}

    @functools.cached_property
    def count(self) -> int:
        return len(self.data.source("train"))

    @functools.cached_property
    def content(self) -> str:
        """Tells data apart that stand under the same name: by 256 of them, spread evenly."""
        some = self.images(np.linspace(0, self.count - 1, min(self.count, 256)).astype(int))
        return hashlib.sha256(some.tobytes()).hexdigest()

    def images(self, indices: np.ndarray) -> np.ndarray:
        found = self.data.take("train", indices)["image"]
        return found if self.size is None else resized(found, self.size)

    def path(self, folder: str, features: Features, **further: Any) -> Path:
        key = {"content": self.content, "size": self.count, "name": features.name, **origin(features)}
        key["version"] = RESULT_VERSION
        return self.cache / folder / f"{digest(key | further)[:16]}.safetensors"

    def statistics(self, features: Features) -> Statistics:
        """The data set's own file, else computed once and kept."""
        key = ("statistics", features.name, *origin(features).values())
        if key not in self.known:
            self.known[key] = self.own(features) or self.computed(features)
        return self.known[key]

    def own(self, features: Features) -> Statistics | None:
        if self.size is not None or features.name not in self.data.statistics:
            return None
        return Statistics.load(self.data.statistics[features.name], **origin(features))

    def computed(self, features: Features) -> Statistics:
        path = self.path("statistics", features)
        if not agreed(is_intact(path)):
            what = f"{features.name} of {self.count} training images"
            found = Statistics.of_parts(
                in_parts(self.count, lambda part: features(self.images(part), self.device), what),
                "reference images",
            )
            write(path, lambda partial: found.save(partial, **origin(features)))
        return Statistics.load(path, **origin(features))

    def features(self, features: Features) -> np.ndarray:
        key = ("features", features.name, *origin(features).values())
        if key not in self.known:
            count = min(self.limit, self.count)
            path = self.path("features", features, limit=count)
            if not agreed(is_intact(path)):
                chosen = np.linspace(0, self.count - 1, count).astype(int)
                what = f"{features.name} of {count} training images"
                parts = in_parts(count, lambda part: features(self.images(chosen[part]), self.device), what)
                found = np.concatenate(list(parts))
                write(path, lambda partial: save_file({"features": found}, partial))
            self.known[key] = load_file(path)["features"]
        return self.known[key]


def write(path: Path, save: Any) -> None:
    """Have rank 0 write a file that all runs share."""
    if is_rank_zero():
        write_shared_file(path, save)
    barrier()


def measured(measures: dict[str, Measure], samples: Samples, reference: TrainingImages) -> dict[str, float]:
    """{network/measure: value} of one network's samples. Raises FloatingPointError for a value that is not finite."""
    found = {f"{samples.name}/{name}": measure(samples, reference) for name, measure in measures.items()}
    return finite(found, "the samples or the features are broken")


def finite(found: dict[str, float], reason: str) -> dict[str, float]:
    for name, value in found.items():
        if not np.isfinite(value):
            raise FloatingPointError(f"{name} is {value}: {reason}")
    return found


def check_measures(
    measures: dict[str, Measure], shape: tuple[int, int, int], captions: Sequence[str] | None, labels: Labels
) -> None:
    """Raise ValueError naming the measure that cannot be taken of such samples."""
    for name, measure in measures.items():
        with naming(name):
            measure.check(shape, captions, labels)


def check_network_measures(measures: dict[str, NetworkMeasure], taken: Sequence[str], network: Any, data: Any) -> None:
    """Raise ValueError naming the measure that cannot be taken of a network, or has a part of a name that is `taken`.

    MissingData where what it needs is not on this machine.
    """
    for name, measure in measures.items():
        with naming(name):
            for part in getattr(measure, "parts", ()):
                if f"{name}_{part}" in (*taken, *RESERVED):
                    raise ValueError(f"its part {part} would be {name}_{part}, which is taken; choose another name")
            measure.check(network, data)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Name the measure that an error is about."""
    try:
        yield
    except (MissingData, ValueError) as error:
        kind = MissingData if isinstance(error, MissingData) else ValueError
        raise kind(f"evaluation.metrics.{name}: {error}") from error


def of_samples(measures: Measures) -> dict[str, Measure]:
    """Those that are taken of what a network generates."""
    return {name: each for name, each in measures.items() if not of_network(each)}  # type: ignore[misc]


def of_networks(measures: Measures) -> dict[str, NetworkMeasure]:
    """Those that are taken of a network itself."""
    return {name: each for name, each in measures.items() if of_network(each)}  # type: ignore[misc]


def of_network(measure: Measure | NetworkMeasure) -> bool:
    return getattr(measure, "of", "samples") == "network"


def columns(measures: dict[str, Any]) -> list[str]:
    """What measures of such protocols are called in metrics.json, each followed by its parts."""
    return [column for name, part in measures.items() for column in (name, *parts_of(name, part))]


def parts_of(name: str, protocol: dict[str, Any]) -> list[str]:
    """The names of a measure's parts; none where its protocol lists none."""
    return [f"{name}_{part}" for part in protocol.get("parts", ())]


def taken_of_network(measure: NetworkMeasure, name: str, network: Any, device: torch.device) -> dict[str, float]:
    """{measure: value} and that of each part, as {measure_part: value}; the value is then their plain mean."""
    found = measure(network, device)
    if not isinstance(found, dict):
        return {name: float(found)}
    assert list(found) == list(measure.parts)
    return {name: float(np.mean(list(found.values())))} | {f"{name}_{part}": value for part, value in found.items()}


def described(protocol: dict[str, Any], only: str | None = None) -> str:
    """A protocol in words: what all measures share, then each measure's own (or `only` one's).

    Of fingerprints the first digits are shown.
    """

    def words(content: dict[str, Any]) -> str:
        shown = {key: value[:8] if key == "features" else value for key, value in content.items()}
        return ", ".join(f"{key} {value}" for key, value in shown.items() if key not in ("measures", "parts"))

    own = {name: part for name, part in protocol.get("measures", {}).items() if only in (None, name)}
    return "; ".join([words(protocol), *(f"{name}: {words(part)}" for name, part in own.items())])
