"""Low-rank adapters (LoRA, arXiv 2106.09685), through peft."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

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

    def into(self, network: Any, seed: int) -> Callable[[], Any]:
        """Put adapters into a network and freeze the rest; returns what merges them into the weights.

        Raises ValueError for targets that are not there, ImportError where peft is not.
        """
        try:
            from peft import LoraConfig  # noqa: PLC0415  of the extra `language`
            from peft.tuners.lora import LoraModel  # noqa: PLC0415
        except ImportError as error:
            raise ImportError("distillation.lora needs peft: pip install -e '.[language]'") from error
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=list(self.targets)
        )
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, "lora"))
            try:
                return LoraModel(network, {"default": config}, "default").merge_and_unload
            except ValueError as error:
                raise ValueError(f"distillation.lora.targets={list(self.targets)}: {error}") from error
