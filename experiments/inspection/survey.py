"""A survey of a data set: what a job would see of it, counted over samples that are spread evenly."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from datamodules.bad_samples import MIN_COUNTED, TooManyBadSamples
from datamodules.base import DataModule, Preview
from datamodules.inventory import find_duplicates, space_evenly
from datamodules.readers.base import BadSample, ListedSource, Source
from datamodules.readers.folder import describe_others

LOOKED_AT = 1000
"""Samples of each split, evenly spaced, that are read."""
SHOWN = 32
"""Samples of each split that the page shows."""
FEW_LEVELS = 32
"""Grey levels: if all pictures together have fewer, nearly all of their contrast is lost."""
FORMS = 8
"""Forms of stored samples, and classes, that a line lists."""


@dataclass
class SplitSurvey:
    """What is known of the samples of one split.

    Args:
        name: "train" or "holdout".
        count: number of samples.
        looked_at: number of samples that were read.
        bad: (name, reason) of the bad ones among these.
        forms: {form in which samples are stored: number of samples}.
        sizes: (width, height) of pictures as they are stored.
        stored_range: lowest and highest stored value of pictures of more than 8 bits; None where there are none.
        labels: {label: number of samples}, of all samples where the source lists them, else of those that were read.
        captions: the captions of the samples that were read.
        mean: of all pixels of these, from 0 to 1; None for texts.
        deviation: of all pixels of these.
        levels: number of different pixel values.
        constant: names of pictures whose pixels are all equal.
        digests: {sha256 of a decoded sample: its name}.
        repeated: (name, name) of samples that are equal after decoding.
        previews: the samples that the page shows.
    """

    name: str
    count: int
    looked_at: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    forms: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    stored_range: tuple[float, float] | None = None
    labels: Counter[int] = field(default_factory=Counter)
    captions: list[str] = field(default_factory=list)
    mean: float | None = None
    deviation: float | None = None
    levels: int = 0
    constant: list[str] = field(default_factory=list)
    digests: dict[bytes, str] = field(default_factory=dict)
    repeated: list[tuple[str, str]] = field(default_factory=list)
    previews: list[Preview] = field(default_factory=list)


@dataclass
class Survey:
    """What is known of a data set.

    Args:
        name: name of the data set.
        shape: shape of one sample, as a network gets it.
        batch_size: number of samples in a training batch.
        splits: the surveys of the training samples and of the held-out ones.
        class_names: names of the classes, in the order of labels from 0; () without names.
        others: what lies beside the samples and is not read, as text.
        duplicates: (held-out sample, training sample) that are the same.
        compared: how the two splits were compared, in words.
        problems: what a person should look at, as sentences.
    """

    name: str
    shape: tuple[int, ...]
    batch_size: int
    splits: list[SplitSurvey]
    class_names: Sequence[str]
    others: str
    duplicates: list[tuple[str, str]]
    compared: str
    problems: list[str] = field(default_factory=list)

    def name_class(self, label: int) -> str:
        """Return the name of a class, its number where it has none."""
        return self.class_names[label] if label < len(self.class_names) else str(label)

    def summarise(self) -> str:
        """Return the survey as lines for a terminal."""
        train, _ = self.splits
        shape = " x ".join(map(str, self.shape))
        lines = [f"data={self.name}: samples of {shape}{' (channels, height, width)' * (len(self.shape) == 3)}"]
        for split in self.splits:
            batches = f", {split.count // self.batch_size:,} batches of {self.batch_size} in a pass"
            lines.append(
                f"{split.name + ':':<12}{split.count:,} samples{batches * (split is train)}; "
                f"read: {split.looked_at:,}, bad among these: {len(split.bad)}"
            )
        if train.forms:
            lines.append(f"{'stored as:':<12}{list_counts(train.forms)}")
        if train.sizes:
            lines.append(f"{'sizes:':<12}{describe_sizes(train.sizes)}")
        if train.stored_range is not None:
            lines.append(f"{'values:':<12}{train.stored_range[0]:g} to {train.stored_range[1]:g} as stored")
        if train.mean is not None:
            lines.append(
                f"{'pixels:':<12}mean {train.mean:.3f}, deviation {train.deviation:.3f} of a range of 1; "
                f"{train.levels} different values"
            )
        if train.labels:
            counts = Counter({self.name_class(label): count for label, count in train.labels.items()})
            lines.append(f"{'classes:':<12}{len(counts)}: {list_counts(counts)}")
        if train.captions:
            lines.append(f"{'captions:':<12}{describe_captions(train.captions)}")
        if train.previews and train.previews[0].text is not None:
            lines.append(f"{'first text:':<12}{train.previews[0].text[:90]!r}")
        lines.append(f"{'duplicates:':<12}{len(self.duplicates)} (compared: {self.compared})")
        lines += [f"look at:    {problem}" for problem in self.problems]
        return "\n".join(lines)


def survey_data(data: DataModule, name: str) -> Survey:
    """Return the survey of a data set. Raises what a job raises for data that it cannot begin with."""
    shape = data.sample_shape()
    splits = [survey_split(data, split) for split in ("train", "holdout")]
    train, holdout = (data.source(split.name) for split in splits)
    survey = Survey(
        name,
        shape,
        data.batch_size,
        splits,
        getattr(train, "class_names", None) or (),
        describe_others(train),
        *compare_splits(train, holdout, *splits),
    )
    survey.problems = list(list_problems(survey, data))
    return survey


def survey_split(data: DataModule, name: str) -> SplitSurvey:
    """Return the survey of a split, from LOOKED_AT of its samples."""
    source = data.source(name)
    split = SplitSurvey(name, len(source))
    total, squares, values = 0.0, 0.0, 0
    levels = np.zeros(256, bool)
    numbers = space_evenly(len(source), LOOKED_AT)
    for index in tqdm(numbers, desc=f"data.{name}", leave=False, disable=None):
        title = source.name(int(index)) if isinstance(source, ListedSource) else f"sample {index}"
        split.looked_at += 1
        try:
            record = source.take(np.array([index]))
            if isinstance(source, ListedSource):
                split.forms[source.describe_sample(int(index))] += 1
                split.stored_range = join_ranges(split.stored_range, source.find_stored_range(int(index)))
        except BadSample as error:
            split.bad.append((title, str(error)))
            continue
        content = record["image"] if "image" in record else np.asarray(record["tokens"][0])
        digest = hashlib.sha256(content.tobytes()).digest()
        if digest in split.digests:
            split.repeated.append((title, split.digests[digest]))
        split.digests.setdefault(digest, title)
        if "original_size" in record:
            height, width = record["original_size"][0].tolist()
            split.sizes.append((width, height))
        split.captions += record.get("caption", [])
        if "image" in record:
            levels[np.unique(content)] = True
            total, squares = total + content.sum() / 255, squares + np.square(content / 255).sum()
            values += content.size
            split.constant += [title] if content.min() == content.max() else []
            split.labels.update(label for label in record["label"].tolist() if label >= 0)
    if values:
        split.mean = float(total / values)
        split.deviation = float(np.sqrt(max(squares / values - split.mean**2, 0)))
        split.levels = int(levels.sum())
    labels = getattr(source, "labels", None)
    if labels is not None:
        split.labels = Counter(label for label in labels.tolist() if label >= 0)
    with contextlib.suppress(TooManyBadSamples):  # the bad ones are listed
        split.previews = data.preview(name, SHOWN)
    return split


def join_ranges(one: tuple[float, float] | None, other: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return the range that covers two ranges, either of which may be None."""
    if one is None or other is None:
        return one or other
    return min(one[0], other[0]), max(one[1], other[1])


def compare_splits(
    train: Source, holdout: Source, train_survey: SplitSurvey, holdout_survey: SplitSurvey
) -> tuple[list[tuple[str, str]], str]:
    """Return (held-out sample, training sample) that are the same, and how they were compared."""
    pairs = find_duplicates(train, holdout)
    if pairs is not None:
        return pairs, f"all {len(holdout):,} held-out samples with all {len(train):,} training samples, byte for byte"
    shared = holdout_survey.digests.keys() & train_survey.digests.keys()
    pairs = sorted((holdout_survey.digests[key], train_survey.digests[key]) for key in shared)
    read = f"{holdout_survey.looked_at:,} held-out samples with {train_survey.looked_at:,} training samples"
    return pairs, f"{read}, those that were read, after decoding"


def list_problems(survey: Survey, data: DataModule) -> Iterator[str]:
    """Yield what a person should look at before a job runs, as sentences."""
    for split in survey.splits:
        if split.bad:
            reason = split.bad[0][1]
            allowed = data.max_bad_fraction * max(split.count, MIN_COUNTED)
            expected = len(split.bad) / split.looked_at * split.count
            verdict = (
                f"a job would stop, as data.max_bad_fraction={data.max_bad_fraction} allows {allowed:.0f} in all"
                if expected > allowed
                else "a job would replace them"
            )
            yield f"data.{split.name}: bad samples: {len(split.bad)} of {split.looked_at}; {verdict}. {reason}"
        if split.constant:
            yield f"data.{split.name}: pictures of one colour: {len(split.constant)}, such as {split.constant[0]}"
        if 1 < split.levels < FEW_LEVELS:
            stored = (
                "" if split.stored_range is None else "; stored values are {:g} to {:g}".format(*split.stored_range)
            )
            yield (
                f"data.{split.name}: all pictures together have {split.levels} of 256 pixel values, so that contrast "
                f"is lost{stored}. If they use a part of their range, such as 12 of 16 bits, set pixel_range: [0, 4095]"
            )
        if split.repeated:
            first = " = ".join(split.repeated[0])
            yield f"data.{split.name}: samples that are equal to others: {len(split.repeated)}, such as {first}"
    train, holdout = survey.splits
    if survey.duplicates:
        first = " = ".join(survey.duplicates[0])
        yield f"held-out samples that are also training samples: {len(survey.duplicates)}, such as {first}"
    if missing := sorted(train.labels.keys() - holdout.labels.keys()):
        yield f"no held-out sample has the classes {', '.join(map(survey.name_class, missing[:FORMS]))}"
    if unknown := sorted(holdout.labels.keys() - train.labels.keys()):
        yield f"no training sample has the classes {', '.join(map(survey.name_class, unknown[:FORMS]))}"
    if survey.others:
        yield f"the data have {survey.others}; none of them is read"
    if survey.batch_size > train.count:
        yield f"data.batch_size={survey.batch_size} is more than the {train.count} training samples: a job would stop"


def list_counts(counts: Counter[Any]) -> str:
    """Return the most frequent values with their numbers as text: "cat 12, dog 3"."""
    listed = ", ".join(f"{value} ({count:,})" for value, count in counts.most_common(FORMS))
    return f"{listed}{f', and {len(counts) - FORMS} more' * (len(counts) > FORMS)}"


def describe_sizes(sizes: Sequence[tuple[int, int]]) -> str:
    """Return the range of some (width, height) as text, with the share of those that are no squares."""
    widths, heights = zip(*sizes, strict=True)
    if len(set(sizes)) == 1:
        return f"{widths[0]}x{heights[0]} pixels, all"
    other = sum(width != height for width, height in sizes) / len(sizes)
    return (
        f"{min(widths)} to {max(widths)} pixels wide, {min(heights)} to {max(heights)} high, "
        f"{other:.0%} of them no squares"
    )


def describe_captions(captions: Sequence[str]) -> str:
    """Return the lengths of captions as text, with how many are different and the first one."""
    words = sorted(len(caption.split()) for caption in captions)
    empty = sum(not caption.strip() for caption in captions)
    return (
        f"{words[0]} to {words[-1]} words, {len(set(captions)):,} of {len(captions):,} are different"
        f"{f', {empty} are empty' * bool(empty)}; the first: {captions[0][:60]!r}"
    )
