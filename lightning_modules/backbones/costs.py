"""Counts of one forward pass of a backbone, on the meta device: nothing is computed."""

from typing import Any

import torch

from lightning_modules.metrics.cost import Macs, count_macs


def make_meta_twin(backbone: Any) -> tuple[Any, dict[str, Any]]:
    """Return a backbone like this one on the meta device, and its inputs for one sample."""
    twin = backbone.twin(backbone.meta_network())
    inputs = twin.example_inputs(1, "meta")
    if twin.writes_text:  # torch 2.11 has no products of experts in float32 on the meta device
        twin.network.to(torch.bfloat16)
        inputs = {key: x.bfloat16() if x.is_floating_point() else x for key, x in inputs.items()}
    return twin, inputs


def count_forward_pass(backbone: Any) -> tuple[Macs, dict[str, int]]:
    """Return the multiply-accumulates at batch size 1, and {module path: position of its first call}."""
    twin, inputs = make_meta_twin(backbone)
    calls: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        for name, module in twin.network.named_modules()
    ]
    macs = count_macs(twin.network, lambda: twin.predict(inputs))
    for handle in handles:
        handle.remove()
    return macs, {name: position for position, name in reversed(list(enumerate(calls)))}
