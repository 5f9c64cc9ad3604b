"""The measures of an evaluation: built and checked before anything runs, and taken of one network at a time."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from experiments.engine.cache import is_intact, lock_entry, write_shared_file
from experiments.engine.identity import RESULT_VERSION
from experiments.engine.ranks import ask_rank_zero, barrier, is_rank_zero
from lightning_modules.metrics.features import Features, resized
from lightning_modules.metrics.protocol import Labels, Measure, NetworkMeasure, Samples, in_parts, origin
from lightning_modules.metrics.statistics import Statistics

Measures = dict[str, Measure | NetworkMeasure]

HASHED_IMAGES = 256
"""Number of training images, evenly spaced, by whose content data sets of the same name are told apart."""

SHOWN_DIGITS = 8
"""Number of digits of a fingerprint that a protocol in words shows."""


def build_measures(cfg: DictConfig) -> Measures:
    """Return the measures of `cfg.evaluation.metrics` by name.

    Raises MissingData naming a measure whose weights are not on this machine, ValueError one that cannot be made.
    """
    measures = {}
    for name, node in cfg.evaluation.metrics.items():
        try:
            measures[str(name)] = build(node)
        except InstantiationException as error:
            kind = MissingData if isinstance(error.__cause__, MissingData) else ValueError
            raise kind(f"evaluation.metrics.{name}: {error.__cause__ or error}") from error
    return measures


class TrainingImages:
    """The training images as a reference: the statistics of all their features, and the features of some of them.

    Both are computed once and stored in the cache of all runs, under a hash of the images and of the network that
    computes the features.

    Args:
        data: the data module.
        cache: the folder that all runs share.
        device: the device on which features are computed.
        limit: maximum number of images whose features are stored; they are spread evenly over the set.
        size: edge in pixels to which images are resized, as samples are; None leaves them as they are.
    """

    def __init__(self, data: Any, cache: Path, device: torch.device, limit: int, size: int | None) -> None:
        self.data, self.cache, self.device, self.limit, self.size = data, cache, device, limit, size
        self.loaded: dict[tuple[str, ...], Any] = {}

    @functools.cached_property
    def count(self) -> int:
        """The number of training images."""
        return len(self.data.source("train"))

    @functools.cached_property
    def content(self) -> str:
        """The sha256 of HASHED_IMAGES of the images."""
        images = self.read_images(np.linspace(0, self.count - 1, min(self.count, HASHED_IMAGES)).astype(int))
        return hashlib.sha256(images.tobytes()).hexdigest()

    def read_images(self, indices: np.ndarray) -> np.ndarray:
        """Return the images of these indices, uint8 (N,H,W,C)."""
        images = self.data.take("train", indices)["image"]
        return images if self.size is None else resized(images, self.size)

    def locate(self, folder: str, features: Features, **more: Any) -> Path:
        """Return the file in the cache for what is computed by `features`; `more` is added to what the name hashes."""
        key = {"content": self.content, "size": self.count, "name": features.name, **origin(features)}
        key["version"] = RESULT_VERSION
        return self.cache / folder / f"{digest(key | more)[:16]}.safetensors"

    def statistics(self, features: Features) -> Statistics:
        """Return the statistics of the features of all images: from the data set's own file if it has one."""
        key = ("statistics", features.name, *origin(features).values())
        if key not in self.loaded:
            self.loaded[key] = self.load_published(features) or self.load_or_compute(features)
        return self.loaded[key]

    def load_published(self, features: Features) -> Statistics | None:
        """Return the statistics that came with the data set; None where it has none, or images are resized."""
        if self.size is not None or features.name not in self.data.statistics:
            return None
        return Statistics.load(self.data.statistics[features.name], **origin(features))

    def load_or_compute(self, features: Features) -> Statistics:
        """Return the statistics from the cache, where they are written first if need be."""
        path = self.locate("statistics", features)
        with lock_entry(path):
            if not ask_rank_zero(is_intact(path)):
                title = f"{features.name} of {self.count} training images"
                parts = in_parts(self.count, lambda part: features(self.read_images(part), self.device), title)
                statistics = Statistics.of_parts(parts, "reference images")
                write_on_rank_zero(path, lambda partial: statistics.save(partial, **origin(features)))
        return Statistics.load(path, **origin(features))

    def features(self, features: Features) -> np.ndarray:
        """Return the features (N,D) of at most `limit` images, from the cache, where they are written if need be."""
        key = ("features", features.name, *origin(features).values())
        if key not in self.loaded:
            count = min(self.limit, self.count)
            path = self.locate("features", features, limit=count)
            with lock_entry(path):
                if not ask_rank_zero(is_intact(path)):
                    indices = np.linspace(0, self.count - 1, count).astype(int)
                    title = f"{features.name} of {count} training images"
                    parts = in_parts(count, lambda part: features(self.read_images(indices[part]), self.device), title)
                    features_ND = np.concatenate(list(parts))
                    write_on_rank_zero(path, lambda partial: save_file({"features": features_ND}, partial))
            self.loaded[key] = load_file(path)["features"]
        return self.loaded[key]


def write_on_rank_zero(path: Path, save: Callable[[Path], None]) -> None:
    """Write a file of the cache by `save` on rank 0, while the other ranks wait."""
    if is_rank_zero():
        write_shared_file(path, save)
    barrier()


def measure_samples(measures: dict[str, Measure], samples: Samples, reference: TrainingImages) -> dict[str, float]:
    """Return {network/measure: value} of one network's samples; FloatingPointError for a value that is not finite."""
    values = {f"{samples.name}/{name}": measure(samples, reference) for name, measure in measures.items()}
    return check_finite(values, "the samples or the features are broken")


def measure_network(measure: NetworkMeasure, name: str, network: Any, device: torch.device) -> dict[str, float]:
    """Return {measure: value} of a network.

    A measure with parts has a value for each of them, {measure_part: value}, and their plain mean as its own.
    """
    values = measure(network, device)
    if not isinstance(values, dict):
        return {name: float(values)}
    assert list(values) == list(measure.parts)
    return {name: float(np.mean(list(values.values())))} | {f"{name}_{part}": value for part, value in values.items()}


def check_finite(values: dict[str, float], reason: str) -> dict[str, float]:
    """Return the values; raises FloatingPointError naming one that is not finite, with what that means."""
    for name, value in values.items():
        if not np.isfinite(value):
            raise FloatingPointError(f"{name} is {value}: {reason}")
    return values


def check_measures(
    measures: dict[str, Measure], shape: tuple[int, int, int], captions: Sequence[str] | None, labels: Labels
) -> None:
    """Raise ValueError naming a measure that cannot be taken of such samples.

    Args:
        measures: the measures by name.
        shape: (channels, height, width) of a sample.
        captions: the caption of each sample; None where there are none.
        labels: the class of each sample; None where there are none.
    """
    for name, measure in measures.items():
        with name_measure(name):
            measure.check(shape, captions, labels)


def check_network_measures(measures: dict[str, NetworkMeasure], taken: Sequence[str], network: Any, data: Any) -> None:
    """Raise ValueError naming a measure that cannot be taken of a network, or has a part of a name that is `taken`.

    Raises MissingData where what a measure needs is not on this machine.
    """
    for name, measure in measures.items():
        with name_measure(name):
            for part in getattr(measure, "parts", ()):
                if f"{name}_{part}" in (*taken, *RESERVED):
                    raise ValueError(f"its part {part} would be {name}_{part}, which is taken; choose another name")
            measure.check(network, data)


def list_unfit_measures(cfg: DictConfig, measures: Mapping[str, Measure | NetworkMeasure]) -> list[str]:
    """Return a sentence per measure whose features were learnt from other data than the job's, with what to choose.

    `evaluation.fits` lists the data sets, by name, that the features of a measure were learnt from.
    """
    data = cfg.data.get("name")
    sentences = []
    for name, sets in cfg.evaluation.fits.items():
        if name not in measures or data in sets:
            continue
        instead = getattr(getattr(measures[name], "features", None), "instead", "none")
        sentence = (
            f"evaluation.metrics.{name}: its features were learnt from data={sets[0]} and may not tell pictures of "
            f"data={data} apart: take it for a rough order of this job's networks, and choose evaluation={instead} for "
            f"figures to report. If data={data} is of that kind, add it to evaluation.fits.{name}"
        )
        if name in (cfg.data.get("statistics") or {}):
            sentence += f". Its reference is the file data.statistics.{name}: see that it was made from data={data}"
        sentences.append(sentence)
    return sentences


def describe_references(config: Any, protocol: dict[str, Any]) -> list[str]:
    """Return a sentence per measure that compares samples with reference images, with where these come from.

    Args:
        config: the configuration of a run, as plain values.
        protocol: the protocol of its measures, from metrics.json.
    """
    data, sentences = config["data"], []
    for name, settings in protocol.get("measures", {}).items():
        if "reference_images" not in settings:
            continue
        count = settings["reference_images"]
        images = f"{count:,} images" if count is not None else "images whose number the file does not say"
        if "statistics" in settings:
            source = f"the statistics in {settings['statistics']}, of {images}, which evaluation.metrics.{name} names"
        elif name in (data.get("statistics") or {}) and config["evaluation"]["resize"] is None:
            source = f"the statistics that come with data={data.get('name')}, of {images}"
        else:
            source = f"{images} of the training images of data={data.get('name')}"
        sentences.append(f"{name} compares samples with {source}")
    return sentences


@contextlib.contextmanager
def name_measure(name: str) -> Iterator[None]:
    """Put the field of a measure before the message of an error that ends the block."""
    try:
        yield
    except (MissingData, ValueError) as error:
        kind = MissingData if isinstance(error, MissingData) else ValueError
        raise kind(f"evaluation.metrics.{name}: {error}") from error


def select_sample_measures(measures: Measures) -> dict[str, Measure]:
    """Return the measures of what a network generates."""
    return {name: measure for name, measure in measures.items() if not is_network_measure(measure)}  # type: ignore[misc]


def select_network_measures(measures: Measures) -> dict[str, NetworkMeasure]:
    """Return the measures of a network itself."""
    return {name: measure for name, measure in measures.items() if is_network_measure(measure)}  # type: ignore[misc]


def is_network_measure(measure: Measure | NetworkMeasure) -> bool:
    """Tell whether a measure is of a network itself, not of its samples."""
    return getattr(measure, "of", "samples") == "network"


def list_columns(protocols: dict[str, Any]) -> list[str]:
    """Return the names of the values in metrics.json of measures with these protocols, parts after their measure."""
    return [column for name, protocol in protocols.items() for column in (name, *list_parts(name, protocol))]


def list_parts(name: str, protocol: dict[str, Any]) -> list[str]:
    """Return the names of the values of a measure's parts; none where its protocol lists none."""
    return [f"{name}_{part}" for part in protocol.get("parts", ())]


def describe_protocol(protocol: dict[str, Any], only: str | None = None) -> str:
    """Return a protocol in words: what all measures share, then what each measure (or `only` one) adds."""

    def write(content: dict[str, Any]) -> str:
        shown = {key: value[:SHOWN_DIGITS] if key == "features" else value for key, value in content.items()}
        return ", ".join(
            f"{key} {value}" for key, value in shown.items() if key not in ("measures", "parts", "samplers")
        )

    measures = {name: part for name, part in protocol.get("measures", {}).items() if only in (None, name)}
    parts = {**protocol.get("samplers", {}), **measures}
    return "; ".join([write(protocol), *(f"{name}: {write(part)}" for name, part in parts.items())])
