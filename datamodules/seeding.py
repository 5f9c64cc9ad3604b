"""Randomness as a function of (seed, position), never of history: resuming and re-batching then change nothing."""

import hashlib

import numpy as np
import torch


def derive(*parts: int | str) -> int:
    """Return a 63-bit seed made from any number of integers and names; the same on every machine."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def torch_rng(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded by `derive`: its noise is the same whatever device it is moved to."""
    return torch.Generator().manual_seed(derive(*parts))


def numpy_rng(*parts: int | str) -> np.random.Generator:
    """Return a NumPy generator seeded by `derive`."""
    return np.random.default_rng(derive(*parts))
