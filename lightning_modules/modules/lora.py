"""Low-rank adapters (LoRA, arXiv 2106.09685), through peft."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from datamodules.seeding import derive


@dataclass
class Lora:
    """Settings of adapters that change a layer W x to W x + alpha / rank * B A dropout(x).

    A is random, as a function of the training seed. B starts as zero, so that the network's output is unchanged at
    first.

    Args:
        targets: linear layers and convolutions that get adapters, as endings of module paths, such as q_proj.
        rank: number of rows of A.
        alpha: scale of the adapters.
        dropout: probability of dropout before A.
    """

    targets: list[str]
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"distillation.lora.rank={self.rank} is out of range; choose a whole number of 1 or more")
        if self.alpha < 1:
            raise ValueError(
                f"distillation.lora.alpha={self.alpha}: the adapters would change nothing; choose a whole number of 1 "
                "or more"
            )
        if not self.targets:
            raise ValueError("distillation.lora.targets=[] names no layers; choose endings of module paths, as q_proj")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"distillation.lora.dropout={self.dropout} is out of range; choose 0 <= dropout < 1")

    def check(self, network: nn.Module) -> None:
        """Raise ImportError if peft is missing, and ValueError for a target that is absent or shares its weight."""
        try:
            import peft  # noqa: F401, PLC0415  of the extra `language`
        except ImportError as error:
            raise ImportError("distillation.lora needs peft: pip install -e '.[language]'") from error
        layers = {name: part for name, part in network.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))}
        weights = [part.weight for part in network.modules() if isinstance(part, (nn.Linear, nn.Conv2d, nn.Embedding))]
        for target in self.targets:
            matches = [part for name, part in layers.items() if f".{name}".endswith(f".{target}")]
            if not matches:
                near = difflib.get_close_matches(target, {name.rpartition(".")[2] for name in layers}, n=3, cutoff=0.3)
                raise ValueError(
                    f"distillation.lora.targets: {target!r} is no linear layer or convolution of a "
                    f"{type(network).__name__}; the nearest are: {', '.join(near)}"
                )
            if any(sum(weight is part.weight for weight in weights) > 1 for part in matches):
                raise ValueError(f"distillation.lora.targets: {target!r} shares its weight with another layer")

    def insert(self, network: Any, seed: int) -> Callable[[], Any]:
        """Add adapters to a network, freeze its weights, and return a function that merges the adapters into them.

        Raises the errors of `check`.
        """
        self.check(network)
        from peft import LoraConfig  # noqa: PLC0415
        from peft.tuners.lora import LoraModel  # noqa: PLC0415

        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=list(self.targets)
        )
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, "lora"))
            return LoraModel(network, {"default": config}, "default").merge_and_unload
