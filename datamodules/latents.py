"""Stored latents and text states: what `python -m experiments.precompute` writes, and how training reads it.

A folder has manifest.json, for each split shards of posteriors (mean and standard deviation before scaling, float16 or
float32), and shards of the text states of every distinct caption, the first of which is the empty one. What stands in
it is read by row, so that memory does not grow with it.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from datamodules.readers.base import MissingData

POSTERIOR = ("latent_mean", "latent_std")
FLIPPED = "flipped_"
"""Prefix of the posterior of the mirrored picture."""
SHARED = ("txt_ids",)
"""Text states that all captions have in common: they have no row a caption."""


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What a folder of stored latents says of itself. Raises MissingData where it is none, or not finished."""
    path = Path(folder).expanduser() / "manifest.json"
    if not path.exists():
        raise MissingData(
            f"latents={str(folder)!r} has no manifest.json: python -m experiments.precompute makes it, with the "
            "same arguments as the job (a precomputation that was stopped goes on when it is called again)"
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); precompute again") from error


class Rows:
    """The tensors of some safetensors shards, read by row; `counts` are the rows of each shard."""

    def __init__(self, files: Sequence[Path], counts: Sequence[int]) -> None:
        self.files, self.starts = list(files), np.concatenate([[0], np.cumsum(counts)])
        self.opened: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": {}}  # workers open files of their own

    def shard(self, number: int) -> Any:
        if number not in self.opened:
            try:
                self.opened[number] = safe_open(self.files[number], "pt")
            except Exception as error:
                raise ValueError(f"{self.files[number]} cannot be read ({error}); precompute it again") from error
        return self.opened[number]

    def names(self) -> list[str]:
        return list(self.shard(0).keys())

    def take(self, name: str, rows: Sequence[int] | np.ndarray) -> Tensor:
        """Some rows of one tensor, in this order."""
        found = []
        for row in rows:
            number = int(np.searchsorted(self.starts, row, side="right")) - 1
            found.append(self.shard(number).get_slice(name)[int(row - self.starts[number])])
            if not found[-1].isfinite().all():
                raise ValueError(f"{self.files[number]} has values that are not finite ({name}); precompute it again")
        return torch.stack(found)

    def whole(self, name: str) -> Tensor:
        """A tensor of the first shard that has no rows."""
        return self.shard(0).get_tensor(name)


class TextTable(Sequence[str]):
    """The captions of a folder, and the text states of each; row 0 is the empty caption."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("text-*.safetensors"))
        if not files:
            raise MissingData(f"{folder} has no text-*.safetensors: it was made without captions")
        self.rows = Rows(files, [safe_open(file, "pt").get_slice("caption_ends").get_shape()[0] for file in files])
        self.states = [name for name in self.rows.names() if not name.startswith("caption")]

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """sha256 of the shards."""
        total = hashlib.sha256()
        for file in self.rows.files:
            total.update(file.read_bytes())
        return total.hexdigest()

    def check_finite(self) -> None:
        """Raise ValueError for text states that are not finite, naming the file, the tensor and the caption."""
        for number, file in enumerate(self.rows.files):
            for name in self.states:
                states = self.rows.shard(number).get_tensor(name)
                if states.is_floating_point() and not (finite := states.isfinite().flatten(1).all(1)).all():
                    row = int(self.rows.starts[number]) + int(finite.logical_not().nonzero()[0])
                    raise ValueError(
                        f"{file} has text states that are not finite: {name}, of the caption {self[row]!r}; store them "
                        "again"
                    )

    def save(self, folder: Path) -> None:
        """Copy the shards."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.rows.files:
            shutil.copyfile(file, folder / file.name)

    def __getitem__(self, row: Any) -> Any:
        number = int(np.searchsorted(self.rows.starts, row, side="right")) - 1
        shard, place = self.rows.shard(number), int(row - self.rows.starts[number])
        ends = shard.get_slice("caption_ends")
        start = int(ends[place - 1]) if place else 0
        return bytes(shard.get_slice("caption_bytes")[start : int(ends[place])].numpy()).decode()

    @functools.cached_property
    def places(self) -> dict[str, int]:
        """{caption: row}."""
        return {self[row]: row for row in range(len(self))}

    def find(self, captions: Sequence[str]) -> dict[str, Any]:
        """The text states of some captions. Raises ValueError for one that is not stored."""
        for caption in captions:
            if caption not in self.places:
                some = "; ".join(list(self.places)[1:6])
                raise ValueError(
                    f"there is no text encoder here, and no stored text for the caption {caption!r}; stored are "
                    f"{len(self) - 1}, such as: {some}"
                )
        return self.take([self.places[caption] for caption in captions])

    def take(self, rows: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """The text states of some rows as nested arguments of a network."""
        found: dict[str, Any] = {}
        for name in self.states:
            *parents, last = name.split(".")
            place = found
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = self.rows.whole(name) if last in SHARED else self.rows.take(name, rows)
            if place[last].dtype == torch.float16:
                place[last] = place[last].float()
        return found


class StoredSplit:
    """One split of a folder of stored latents: a `Source` without pictures."""

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]) -> None:
        shards = manifest["splits"][split]["shards"]
        self.rows = Rows([folder / shard["file"] for shard in shards], [shard["rows"] for shard in shards])
        self.texts = TextTable(folder) if manifest["text"] else None
        self.extra = [name for name in self.rows.names() if not name.endswith(POSTERIOR) and name != "caption"]
        self.captions = None if self.texts is None else Captions(self)

    def __len__(self) -> int:
        return len(self.rows)

    def caption_rows(self, indices: np.ndarray) -> np.ndarray:
        return self.rows.take("caption", indices).numpy()

    def take(self, indices: np.ndarray, flipped: np.ndarray | None = None) -> dict[str, Any]:
        """Posteriors (of the mirrored picture where `flipped`), labels, sizes, captions and their text states."""
        record: dict[str, Any] = {name: self.rows.take(name, indices) for name in self.extra}
        turned = np.zeros(len(indices), bool) if flipped is None else flipped
        for name in POSTERIOR:
            each = [
                self.rows.take(FLIPPED * bool(turn) + name, [index])
                for turn, index in zip(turned, indices, strict=True)
            ]
            record[name] = torch.cat(each).float()
        if self.texts is not None:
            rows = self.caption_rows(indices)
            record["caption"] = [self.texts[int(row)] for row in rows]
            record["text"], record["empty_text"] = self.texts.take(rows), self.texts.take([0])
        return record


class Captions(Sequence[str]):
    """The captions of a split, read when asked for."""

    def __init__(self, split: StoredSplit) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: Any) -> Any:
        assert self.split.texts is not None
        return self.split.texts[int(self.split.caption_rows(np.array([index]))[0])]

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def check_augmentation(manifest: dict[str, Any], folder: str, flip: bool, crop: int) -> None:
    """Raise ValueError where training would want pictures that were not encoded."""
    if crop:
        raise ValueError(f"data.crop={crop}: stored latents are of uncropped pictures; choose 0, or latents=null")
    if flip and not manifest["flips"]:
        raise ValueError(
            f"data.flip=true, but {folder} has no mirrored pictures; choose data.flip=false, or precompute with "
            "data.flip=true"
        )
