"""The page of a data set: one HTML file with its counts, samples, classes, bad samples and duplicates."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from datamodules.base import Preview
from experiments.inspection.survey import Survey, describe_captions, describe_sizes, list_counts
from experiments.reporting.pages import encode_address, write_page

LARGEST_EDGE = 256
"""Pixels of a picture on the page; larger ones are shown smaller."""
SOUNDS = 8
"""Sounds of each split that the page plays, as finding the phases of each takes time."""
LISTED = 50
"""Bad samples, duplicates and classes that the page lists."""


def write_data_page(path: Path, survey: Survey, mel: Any, settings: str) -> Path:
    """Write the page of a survey and return its path.

    Args:
        path: the HTML file.
        survey: the survey.
        mel: turns the pictures of sounds back into sounds; None for other data.
        settings: the configuration of the data set as YAML.
    """
    return write_page(
        path,
        "data.html.j2",
        survey=survey,
        rows=tabulate(survey),
        grids={split.name: [show(sample, survey) for sample in split.previews] for split in survey.splits},
        sounds={split.name: make_sounds(split.previews, mel) for split in survey.splits},
        classes=tabulate_classes(survey),
        listed=LISTED,
        settings=settings,
    )


def tabulate(survey: Survey) -> dict[str, list[str]]:
    """Return {what: its value for each split}, for the table at the top of the page."""
    rows: dict[str, list[str]] = {"samples": [f"{split.count:,}" for split in survey.splits]}
    rows["read for this page"] = [f"{split.looked_at:,}" for split in survey.splits]
    rows["bad among these"] = [str(len(split.bad)) for split in survey.splits]
    optional = {
        "stored as": [list_counts(split.forms) for split in survey.splits],
        "sizes": [describe_sizes(split.sizes) if split.sizes else "" for split in survey.splits],
        "stored values": [
            "" if split.stored_range is None else "{:g} to {:g}".format(*split.stored_range) for split in survey.splits
        ],
        "mean and deviation of pixels": [
            "" if split.mean is None else f"{split.mean:.3f}, {split.deviation:.3f}" for split in survey.splits
        ],
        "different pixel values": [str(split.levels or "") for split in survey.splits],
        "captions": [describe_captions(split.captions) if split.captions else "" for split in survey.splits],
    }
    return rows | {name: values for name, values in optional.items() if any(values)}


def tabulate_classes(survey: Survey) -> list[dict[str, Any]]:
    """Return a row per class, its name and its number of samples in each split, in the order of labels."""
    labels = sorted(set().union(*(split.labels for split in survey.splits)))
    return [
        {"label": label, "name": survey.name_class(label), "counts": [split.labels[label] for split in survey.splits]}
        for label in labels
    ]


def show(sample: Preview, survey: Survey) -> dict[str, Any]:
    """Return what the page shows of one sample: its picture as an address, and the lines below it."""
    return {
        "picture": None if sample.picture is None else encode_picture(sample.picture),
        "text": sample.text,
        "caption": sample.caption,
        "label": None if sample.label is None else name_label(sample.label, survey),
        "index": sample.index,
    }


def name_label(label: int, survey: Survey) -> str:
    """Return a label, followed by the name of its class where it has one."""
    return " ".join(dict.fromkeys((str(label), survey.name_class(label))))


def encode_picture(picture: np.ndarray) -> str:
    """Return a picture (H,W,C) as a `data:` address, without loss unless it is larger than LARGEST_EDGE."""
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    is_large = max(image.size) > LARGEST_EDGE
    if is_large:
        image.thumbnail((LARGEST_EDGE, LARGEST_EDGE))
    buffer = io.BytesIO()
    image.save(buffer, "webp" if is_large else "png")
    return encode_address(buffer.getvalue(), "image/webp" if is_large else "image/png")


def make_sounds(samples: list[Preview], mel: Any) -> list[str]:
    """Return the first sounds as `data:` addresses, as a network would learn them; none where data are no sounds."""
    pictures = [sample.picture for sample in samples[:SOUNDS] if sample.picture is not None]
    if mel is None or not pictures:
        return []
    addresses = []
    for wave in mel.wave(np.stack(pictures)):
        buffer = io.BytesIO()
        soundfile.write(buffer, wave, mel.rate, format="WAV", subtype="PCM_16")
        addresses.append(encode_address(buffer.getvalue(), "audio/wav"))
    return addresses
