"""Costs of a network: multiply-accumulates with and without attention, latency, and peak memory."""

import contextlib
import platform
import re
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Size, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ATTENTION = ("bmm", "baddbmm")
"""Operators of the matrix products inside attention, after scaled_dot_product_attention is decomposed."""


def grouped_product_flops(tokens_shape: Size, experts_shape: Size, *_: Any, **__: Any) -> int:
    """Return the FLOPs of a grouped product: each of the tokens (S,K) is multiplied with one expert of (E,K,N)."""
    return 2 * tokens_shape[0] * tokens_shape[1] * experts_shape[2]


UNCOUNTED = {torch.ops.aten._grouped_mm: grouped_product_flops}
"""Products that torch's counter passes over: the experts of language models with a mixture of experts."""


@dataclass
class Macs:
    """Multiply-accumulates of one forward at batch 1.

    `linear` counts convolutions, linear layers and experts, as published figures for diffusion models do (338.6 G for
    SD1.x at 64x64); `attention` counts the two matrix products inside attention (63.0 G there).
    """

    linear: int
    attention: int
    by_module: Mapping[str, int] = field(repr=False)

    def of(self, name: str) -> int:
        """Return the multiply-accumulates of the convolutions, linear layers and experts of one module."""
        return self.by_module.get(name, 0)


def count_macs(network: nn.Module, forward: Callable[[], Any]) -> Macs:
    """Return the multiply-accumulates of one call of `forward`, also by module.

    Attention runs on the backend whose matrix products can be counted.
    """
    with (
        torch.no_grad(),
        FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):
        forward()
    counts = counter.get_flop_counts()
    root = type(network).__name__
    products = {name: sum(n for op, n in ops.items() if op.__name__ in ATTENTION) // 2 for name, ops in counts.items()}
    # A linear layer on strided tokens may run as a batched product, too: that is not attention.
    linear = [f"{root}.{name}".rstrip(".") for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    inside = {name: products.get(name, 0) for name in linear}

    def attention(name: str) -> int:
        whole = name in ("Global", root)
        return products[name] - sum(n for at, n in inside.items() if whole or at == name or at.startswith(name + "."))

    total = {name: sum(ops.values()) // 2 for name, ops in counts.items()}
    return Macs(
        linear=total["Global"] - attention("Global"),
        attention=attention("Global"),
        by_module={name.removeprefix(root + "."): total[name] - attention(name) for name in total},
    )


@torch.inference_mode()
def latencies(calls: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Return the median milliseconds of some calls; they take turns, so that the machine's load affects all alike."""
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


def device_name(device: torch.device) -> str:
    """Return the name of a device for measured times."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def describe_machine(device: torch.device) -> str:
    """Return what measured values depend on: GPU, or processor and threads; versions of Python and torch; and date."""
    name = device_name(device) if device.type == "cuda" else f"{processor_name()}, {torch.get_num_threads()} threads"
    return f"{name}, Python {platform.python_version()}, torch {torch.__version__}, {date.today()}"


def processor_name() -> str:
    """Return the model of the processor; its architecture where the system does not tell the model."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return model[1] if model else platform.machine()


def reset_peak_memory() -> None:
    """Start a new measurement of peak memory, since several jobs of a sweep share one process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux only; elsewhere the peak stays that of the process
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes since `reset_peak_memory`: resident size on a CPU, the allocator's on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
