"""What a network costs: multiply-accumulates in both countings, latency, peak memory."""

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ATTENTION = ("bmm", "baddbmm")
"""Operators that only attention's own matrix products use, once scaled_dot_product_attention is decomposed."""


@dataclass
class Macs:
    """Multiply-accumulates of one forward at batch 1.

    `linear` counts convolutions and linear layers, as published figures for diffusion models do (338.6 G for SD1.x
    at 64x64); `attention` counts the two matrix products inside attention (63.0 G there).
    """

    linear: int
    attention: int
    by_module: Mapping[str, int] = field(repr=False)

    def of(self, name: str) -> int:
        """Convolutions and linear layers of one module."""
        return self.by_module.get(name, 0)


def count_macs(network: nn.Module, forward: Callable[[], Any]) -> Macs:
    """Count one call of `forward`, module by module; attention takes the backend whose products can be counted."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward()
    counts = counter.get_flop_counts()
    attention = {name: sum(n for op, n in ops.items() if op.__name__ in ATTENTION) // 2 for name, ops in counts.items()}
    total = {name: sum(ops.values()) // 2 for name, ops in counts.items()}
    prefix = type(network).__name__ + "."
    return Macs(
        linear=total["Global"] - attention["Global"],
        attention=attention["Global"],
        by_module={name.removeprefix(prefix): total[name] - attention[name] for name in total},
    )


@torch.inference_mode()
def latencies(calls: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of some calls, taken in turns so that they share the machine's ups and downs."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # the first round warms up
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def peak_memory(device: torch.device) -> int:
    """Bytes: the process's largest resident size on a CPU, the allocator's peak on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
