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
    """W x + alpha / rank * B A dropout(x) in every linear layer or convolution whose path ends in one of `targets`.

    A is drawn as a function of the seed of training, B begins at zero.
    """

    targets: list[str]
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"distillation.lora.rank={self.rank} is out of range; choose a whole number of 1 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"distillation.lora.dropout={self.dropout} is out of range; choose 0 <= dropout < 1")

    def check(self, network: nn.Module) -> None:
        """Raise ImportError without peft, and ValueError for targets that are not there or share their weight."""
        try:
            import peft  # noqa: F401, PLC0415  of the extra `language`
        except ImportError as error:
            raise ImportError("distillation.lora needs peft: pip install -e '.[language]'") from error
        layers = {name: part for name, part in network.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))}
        weights = [part.weight for part in network.modules() if isinstance(part, (nn.Linear, nn.Conv2d, nn.Embedding))]
        for target in self.targets:
            meant = [part for name, part in layers.items() if f".{name}".endswith(f".{target}")]
            if not meant:
                near = difflib.get_close_matches(target, {name.rpartition(".")[2] for name in layers}, n=3, cutoff=0.3)
                raise ValueError(
                    f"distillation.lora.targets: {target!r} is no linear layer or convolution of a "
                    f"{type(network).__name__}; the nearest are: {', '.join(near)}"
                )
            if any(sum(weight is part.weight for weight in weights) > 1 for part in meant):
                raise ValueError(f"distillation.lora.targets: {target!r} shares its weight with another layer")

    def into(self, network: Any, seed: int) -> Callable[[], Any]:
        """Put adapters into a network and freeze the rest; returns what merges them. Raises what `check` raises."""
        self.check(network)
        from peft import LoraConfig  # noqa: PLC0415
        from peft.tuners.lora import LoraModel  # noqa: PLC0415

        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=list(self.targets)
        )
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, "lora"))
            return LoraModel(network, {"default": config}, "default").merge_and_unload
