"""Stored latents and text states: the format of `python -m experiments.precompute`, and how training reads it.

A folder has manifest.json; for each split shards of posteriors (mean and standard deviation of the VAE's latents before
scaling, float16 or float32); and shards of the text states of every distinct caption, the first of which is the empty
one. Tensors are read by row, so that memory does not grow with the folder.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datamodules.readers.base import MissingData

POSTERIOR = ("latent_mean", "latent_std")
"""Names of the tensors of a posterior."""
FLIPPED = "flipped_"
"""Prefix of the posterior of the mirrored picture."""
SHARED = ("txt_ids",)
"""Text states that all captions have in common, and that therefore have no row for each caption."""


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return the manifest of a folder of stored latents. Raises MissingData where it has none or is not finished."""
    path = Path(folder).expanduser() / "manifest.json"
    if not path.exists():
        raise MissingData(
            f"latents={str(folder)!r} has no manifest.json: python -m experiments.precompute makes it, with the "
            "same arguments as the job (a precomputation that was stopped goes on when it is called again)"
        )
    return parse_manifest(path)


def parse_manifest(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that describes what is stored. Raises ValueError for a damaged one."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); precompute again") from error
    return content


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a shard of tensors that is complete or absent."""
    partial = path.with_name(f".{path.name}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    partial.chmod(0o644)  # safetensors makes files that only their owner can read
    partial.replace(path)


def open_shard(file: Path) -> Any:
    """Open a shard of latents or text states. Raises ValueError, saying what to do, for one that cannot be read."""
    try:
        return safe_open(file, "pt")
    except Exception as error:  # safetensors raises errors of its own
        raise ValueError(damaged_shard(file, error)) from error


def count_captions(file: Path) -> int:
    """Return the number of captions in a shard of text states. Raises ValueError for a file that is no such shard."""
    shard = open_shard(file)
    try:
        return int(shard.get_slice("caption_ends").get_shape()[0])
    except SafetensorError as error:
        raise ValueError(damaged_shard(file, error)) from error


def damaged_shard(file: Path, error: Exception) -> str:
    """Return the message for a shard that cannot be read."""
    return (
        f"{file} cannot be read ({error}): delete it, and the .json of its name beside it, and run python -m "
        "experiments.precompute with the same arguments again; if it came with a teacher, get the teacher again"
    )


class Rows:
    """The tensors of several safetensors shards, read by row; `counts` are the numbers of rows of the shards."""

    def __init__(self, files: Sequence[Path], counts: Sequence[int]) -> None:
        self.files, self.starts = list(files), np.concatenate([[0], np.cumsum(counts)])
        self.readers: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"readers": {}}  # workers open files of their own

    def shard(self, number: int) -> Any:
        """Return the open file of a shard. Raises ValueError, with what to do, where it cannot be read."""
        if number not in self.readers:
            self.readers[number] = open_shard(self.files[number])
        return self.readers[number]

    def names(self) -> list[str]:
        """Return the names of the tensors."""
        return list(self.shard(0).keys())

    def take(self, name: str, rows: Sequence[int] | np.ndarray) -> Tensor:
        """Return some rows of one tensor, in this order; raises ValueError where values are not finite."""
        values = []
        for number, offset in map(self.locate, rows):
            values.append(self.shard(number).get_slice(name)[offset])
            if not values[-1].isfinite().all():
                raise ValueError(f"{self.files[number]} has values that are not finite ({name}); precompute it again")
        return torch.stack(values)

    def locate(self, row: int) -> tuple[int, int]:
        """Return the number of a row's shard, and the number of the row in it."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return number, int(row - self.starts[number])

    def whole(self, name: str) -> Tensor:
        """Return a tensor without rows, from the first shard."""
        return self.shard(0).get_tensor(name)


class TextTable(Sequence[str]):
    """The captions of a folder of stored latents, with the text states of each; row 0 is the empty caption."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("text-*.safetensors"))
        if not files:
            raise MissingData(f"{folder} has no text-*.safetensors: it was made without captions")
        self.rows = Rows(files, [count_captions(file) for file in files])
        self.states = [name for name in self.rows.names() if not name.startswith("caption")]

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """Return the sha256 of the shards."""
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
        """Copy the shards into another folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.rows.files:
            shutil.copyfile(file, folder / file.name)

    def __getitem__(self, row: Any) -> Any:
        number, offset = self.rows.locate(row)
        shard = self.rows.shard(number)
        ends = shard.get_slice("caption_ends")
        start = int(ends[offset - 1]) if offset else 0
        return bytes(shard.get_slice("caption_bytes")[start : int(ends[offset])].numpy()).decode()

    @functools.cached_property
    def row_of_caption(self) -> dict[str, int]:
        """{caption: its row}."""
        return {self[row]: row for row in range(len(self))}

    def find(self, captions: Sequence[str]) -> dict[str, Any]:
        """Return the text states of some captions, see `take`. Raises ValueError for a caption that is not stored."""
        for caption in captions:
            if caption not in self.row_of_caption:
                examples = "; ".join(list(self.row_of_caption)[1:6])
                raise ValueError(
                    f"there is no text encoder here, and no stored text state for the caption {caption!r}; "
                    f"{len(self) - 1} captions are stored, such as: {examples}"
                )
        return self.take([self.row_of_caption[caption] for caption in captions])

    def take(self, rows: Sequence[int] | np.ndarray) -> dict[str, Any]:
        """Return the text states of some rows, as nested arguments of a network."""
        states: dict[str, Any] = {}
        for name in self.states:
            *parents, last = name.split(".")
            node = states
            for parent in parents:
                node = node.setdefault(parent, {})
            tensor = self.rows.whole(name) if last in SHARED else self.rows.take(name, rows)
            node[last] = tensor.float() if tensor.dtype == torch.float16 else tensor
        return states


class StoredSplit:
    """One split of a folder of stored latents: a `Source` without images."""

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]) -> None:
        shards = manifest["splits"][split]["shards"]
        self.rows = Rows([folder / shard["file"] for shard in shards], [shard["rows"] for shard in shards])
        self.texts = TextTable(folder) if manifest["text"] else None
        self.extra = [name for name in self.rows.names() if not name.endswith(POSTERIOR) and name != "caption"]
        self.captions = None if self.texts is None else Captions(self)

    def __len__(self) -> int:
        return len(self.rows)

    def caption_rows(self, indices: np.ndarray) -> np.ndarray:
        """Return the rows of the captions of some samples."""
        return self.rows.take("caption", indices).numpy()

    def take(self, indices: np.ndarray, flipped: np.ndarray | None = None) -> dict[str, Any]:
        """Return posteriors, labels, sizes, captions and text states of some samples.

        Posteriors are those of the mirrored picture where `flipped` (N,) is true.
        """
        record: dict[str, Any] = {name: self.rows.take(name, indices) for name in self.extra}
        mirrored = np.zeros(len(indices), bool) if flipped is None else flipped
        for name in POSTERIOR:
            rows = [
                self.rows.take(FLIPPED * bool(mirror) + name, [index])
                for mirror, index in zip(mirrored, indices, strict=True)
            ]
            record[name] = torch.cat(rows).float()
        if self.texts is not None:
            caption_rows = self.caption_rows(indices)
            record["caption"] = [self.texts[int(row)] for row in caption_rows]
            record["text"], record["empty_text"] = self.texts.take(caption_rows), self.texts.take([0])
        return record


class Captions(Sequence[str]):
    """The captions of a split, each read when it is asked for."""

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
    """Raise ValueError where training would need pictures whose latents are not stored, mirrored or cropped ones."""
    if crop:
        raise ValueError(f"data.crop={crop}: stored latents are of uncropped pictures; choose 0, or latents=null")
    if flip and not manifest["flips"]:
        raise ValueError(
            f"data.flip=true, but {folder} has no mirrored pictures; choose data.flip=false, or precompute with "
            "data.flip=true"
        )
