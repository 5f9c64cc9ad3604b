"""Small pictures of samples for a page that shows many runs."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.engine.artefacts import read_array
from experiments.reporting.pages import encode_address

COLUMNS = 6
"""Number of samples of each network in a thumbnail."""
TILE = 96
"""Longest edge of a sample in a thumbnail, in pixels; smaller samples keep their size."""
QUALITY = 80
"""Quality of the WebP compression."""
LARGEST = 100_000
"""Largest thumbnail, in bytes."""
ALL = 9_000_000
"""Largest sum of the thumbnails of a page, in bytes; as text they take a third more."""


def embed_thumbnail(folder: Path, networks: Sequence[str], runs: int = 1) -> str | None:
    """Return the first samples of a run as a `data:` address, a row of pictures per network; None without pictures.

    The rows have the same seeds in their columns. A picture that is larger than its share of the page is halved in
    width and height until it fits.

    Args:
        folder: the run's folder.
        networks: names of its networks, from top to bottom.
        runs: the number of runs that the page shows.
    """
    paths = [folder / "samples" / name / "images.npy" for name in networks]
    batches = [read_array(path)[:COLUMNS] for path in paths if path.exists()]
    if not batches or batches[0].shape[-1] not in (1, 3):
        return None
    rows = [np.concatenate(list(batch_NHWC), axis=1) for batch_NHWC in batches]
    picture = Image.fromarray(
        np.concatenate(rows, axis=0).squeeze(-1) if rows[0].shape[-1] == 1 else np.concatenate(rows)
    )
    factor = min(1.0, TILE / max(batches[0].shape[1:3]))
    content = compress(picture, factor)
    while len(content) > min(LARGEST, ALL // runs) and min(picture.size) * factor > len(batches):
        factor /= 2
        content = compress(picture, factor)
    return encode_address(content, "image/webp")


def compress(picture: Image.Image, factor: float) -> bytes:
    """Return a picture as WebP, width and height multiplied by a factor of at most 1."""
    width, height = (max(round(edge * factor), 1) for edge in picture.size)
    file = io.BytesIO()
    picture.resize((width, height), Image.Resampling.BOX).save(file, "WEBP", quality=QUALITY)
    return file.getvalue()
