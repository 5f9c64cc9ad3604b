"""Storing what text encoders say of captions, in the format that `datamodules.latents.TextTable` reads."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from conf.nested import flatten_dict
from datamodules.latents import SHARED, open_shard
from lightning_modules.backbones.diffusion.pipeline_parts import Surroundings

ROWS = 8192
"""captions a shard"""


def store_texts(
    surroundings: Surroundings,
    captions: Sequence[str],
    folder: Path,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float16,
    device: torch.device | None = None,
) -> dict[str, int]:
    """Write text-*.safetensors of the distinct captions, the empty one first; returns {caption: row}.

    Shards that are there already are left alone, so that a call that was stopped goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = {caption: row for row, caption in enumerate(dict.fromkeys(captions), 1)}
    device = device or torch.device("cpu")
    texts = list(rows)
    for number, start in enumerate(range(0, len(texts) + 1, ROWS)):
        path = folder / f"text-{number:05d}.safetensors"
        part = ["", *texts][start : start + ROWS]
        about = {"captions": hashlib.sha256("\0".join(part).encode()).hexdigest()}
        if path.exists():
            if open_shard(path).metadata() != about:
                raise ValueError(f"{path} has other captions than the data; choose another folder, or delete it")
            continue
        states: dict[str, list[Tensor]] = {}
        for at in tqdm(range(0, len(part), batch_size), desc=f"text {number:<15}", disable=len(part) <= batch_size):
            some = part[at : at + batch_size]
            groups = [(some, False)]
            if start == at == 0:  # what the unconditional pass of guidance takes
                groups = [([""], True), (some[1:], False)]
            for group, empty in groups:
                if not group:
                    continue
                found = surroundings.empty_text(1, device) if empty else surroundings.text(group, device)
                for name, value in flatten_dict(found).items():
                    stored = (value.to(dtype) if value.is_floating_point() else value).cpu()
                    if not stored.isfinite().all():
                        raise FloatingPointError(
                            f"text states ({name}) are not finite as {dtype}, of one of the captions {group}"
                        )
                    states.setdefault(name, []).append(stored)
        # What all captions share comes once, the rest with a row each.
        tensors = {name: parts[0] if name in SHARED else torch.cat(parts) for name, parts in states.items()}
        letters = [caption.encode() for caption in part]
        tensors["caption_bytes"] = torch.from_numpy(np.frombuffer(b"".join(letters) or b"\0", np.uint8).copy())
        tensors["caption_ends"] = torch.tensor(np.cumsum([len(text) for text in letters]))
        partial = path.with_name(f".{path.name}")
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial, about)
        partial.chmod(0o644)  # safetensors makes files that only their owner can read
        partial.replace(path)
    return rows
