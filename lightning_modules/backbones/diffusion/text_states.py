"""Storing the states of text encoders, in the format that `datamodules.latents.TextTable` reads."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from conf.nested import flatten_dict
from datamodules.latents import SHARED, open_shard, write_shard
from lightning_modules.backbones.diffusion.pipeline_parts import PipelineParts

ROWS_PER_SHARD = 8192
"""Captions per shard: 1.3 GB of half-precision states with 77 tokens of width 1024"""


def store_texts(
    pipeline_parts: PipelineParts,
    captions: Sequence[str],
    folder: Path,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float16,
    device: torch.device | None = None,
) -> dict[str, int]:
    """Write the text states of the distinct captions as text-*.safetensors, and return {caption: row}.

    Row 0 is the empty caption, as the unconditional pass of guidance takes it. Shards that exist are left alone, so
    that a call that was interrupted can be repeated. Raises ValueError for an existing shard of other captions, and
    FloatingPointError for states that are not finite.

    Args:
        pipeline_parts: the pipeline with the text encoders.
        captions: in any order and number.
        folder: where the shards go; it is created.
        batch_size: captions that are encoded at once.
        dtype: the type in which floating-point states are stored.
        device: where the text encoders run; None is the CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = {caption: row for row, caption in enumerate(dict.fromkeys(captions), 1)}
    device = device or torch.device("cpu")
    texts = ["", *rows]
    for number, start in enumerate(range(0, len(texts), ROWS_PER_SHARD)):
        path = folder / f"text-{number:05d}.safetensors"
        shard_texts = texts[start : start + ROWS_PER_SHARD]
        metadata = {"captions": hashlib.sha256("\0".join(shard_texts).encode()).hexdigest()}
        if path.exists():
            if open_shard(path).metadata() != metadata:
                raise ValueError(f"{path} has other captions than the data; choose another folder, or delete it")
            continue
        states: dict[str, list[Tensor]] = {}
        for first in tqdm(
            range(0, len(shard_texts), batch_size),
            desc=f"text {number:<15}",
            disable=len(shard_texts) <= batch_size,
        ):
            batch = shard_texts[first : first + batch_size]
            if start == first == 0:
                append_states(states, pipeline_parts.encode_empty_text(1, device), dtype, [""])
                batch = batch[1:]
            if batch:
                append_states(states, pipeline_parts.encode_text(batch, device), dtype, batch)
        tensors = {name: parts[0] if name in SHARED else torch.cat(parts) for name, parts in states.items()}
        encoded = [caption.encode() for caption in shard_texts]
        tensors["caption_bytes"] = torch.from_numpy(np.frombuffer(b"".join(encoded) or b"\0", np.uint8).copy())
        tensors["caption_ends"] = torch.tensor(np.cumsum([len(caption) for caption in encoded]))
        write_shard(path, tensors, metadata)
    return rows


def append_states(
    states: dict[str, list[Tensor]], arguments: dict[str, Any], dtype: torch.dtype, captions: Sequence[str]
) -> None:
    """Append the tensors of nested `arguments`, on the CPU and as `dtype`, to the lists in `states`.

    Raises FloatingPointError, naming the captions, for a value that is not finite in that type.
    """
    for name, value in flatten_dict(arguments).items():
        stored = (value.to(dtype) if value.is_floating_point() else value).cpu()
        if not stored.isfinite().all():
            raise FloatingPointError(
                f"text states ({name}) are not finite as {dtype}, of one of the captions {captions}"
            )
        states.setdefault(name, []).append(stored)
