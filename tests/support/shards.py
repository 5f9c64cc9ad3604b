"""Tiny shards as img2dataset writes them; every picture, caption and key says its number."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from datamodules.readers.shards import Shards

PER_SHARD = 5


@pytest.fixture
def data_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indices and fetched shards go below tmp_path/root."""
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path / "root"))
    return tmp_path / "root"


def png(number: int, width: int = 8, height: int = 6) -> bytes:
    """A picture that has its number in every pixel."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (number, 0, 0)).save(file, "png")
    return file.getvalue()


def sample(number: int) -> dict[str, Any]:
    """As img2dataset writes one: here of a picture of 80x60 that it made smaller."""
    key = f"{number:09d}"
    meta = {"caption": f"json {number}", "url": "https://example.org/a.png", "key": key, "status": "success"}
    meta |= {"width": 8, "height": 6, "original_width": 80, "original_height": 60, "exif": "{}"}
    return {"__key__": key, "png": png(number), "txt": f"picture {number}", "json": json.dumps(meta)}


def write(path: Path, samples: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as tar:
        for one in samples:
            tar.write(one)
    return path


@pytest.fixture
def laion(tmp_path: Path, data_folder_of_its_own: Path) -> Path:
    """Three shards of PER_SHARD samples, and what img2dataset leaves beside them."""
    for shard in range(3):
        numbers = range(PER_SHARD * shard, PER_SHARD * (shard + 1))
        write(tmp_path / "laion" / f"{shard:05d}.tar", [sample(number) for number in numbers])
        (tmp_path / "laion" / f"{shard:05d}_stats.json").write_text("{}")
        (tmp_path / "laion" / f"{shard:05d}.parquet").write_bytes(b"")
    return tmp_path / "laion"


def everything(source: Shards) -> dict[str, Any]:
    return source.take(np.arange(len(source)))


def numbers(record: dict[str, Any]) -> list[int]:
    return record["image"][:, 0, 0, 0].tolist()


def says(record: dict[str, Any]) -> list[int]:
    return [int(text.removeprefix("picture ")) for text in record["caption"]]
