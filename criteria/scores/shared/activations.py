"""What the criteria that look at the inputs of layers share: sums over calibration tokens."""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, cast

import torch
from torch import Tensor

from criteria.base import Backbone, Batch, Criterion, Unit, zeros


class Decoder(Backbone, Protocol):
    """A network whose channels are inputs of linear layers, as those of decoders are."""

    def consumers(self, name: str) -> dict[str, Tensor]:
        """{layer: which of its inputs are the channels of a unit}."""
        ...

    def listening(self, listeners: Mapping[str, Callable[[Tensor], None]]) -> AbstractContextManager[None]:
        """Each of some layers gives its input to a function in every forward pass inside."""
        ...


class OfInputs(Criterion):
    """A unit's score is the sum over its channels of what a subclass's `columns` says of them.

    Looked at are the layers that take the channels as inputs (of heads the output projection, of a feed-forward the
    last layer), and all tokens of the calibration samples, of samples with targets of their own those targets.
    """

    level = "channel"

    def supports(self, backbone: Backbone) -> str | None:
        if not hasattr(backbone, "consumers"):
            return "it scores heads and channels of language models by the inputs of linear layers"
        return super().supports(backbone)

    def start(self, backbone: Backbone, units: Sequence[Unit], seed: int) -> None:
        """States: "tokens", and of each layer's inputs (C,) the sum and the sum of squares over the tokens."""
        super().start(backbone, units, seed)
        self.decoder = cast(Decoder, backbone)
        self.inputs = {unit.name: self.decoder.consumers(unit.name) for unit in units}
        weights = backbone.weights()
        self.readers = {layer: weights[f"{layer}.weight"] for inputs in self.inputs.values() for layer in inputs}
        self.states = {"tokens": zeros(1)}
        for layer, weight in self.readers.items():
            self.states |= {f"sum {layer}": zeros(weight.shape[1]), f"square {layer}": zeros(weight.shape[1])}

    def update(self, batch: Batch) -> None:
        inputs = self.backbone.calibration_inputs(batch, self.seed)
        counts_NL = inputs.get("mask", torch.ones_like(inputs["sample"])).bool()
        self.states["tokens"] += int(counts_NL.sum())
        with self.decoder.listening({layer: functools.partial(self.add, layer, counts_NL) for layer in self.readers}):
            self.backbone.predict(inputs)

    def add(self, layer: str, counts_NL: Tensor, x_NLC: Tensor) -> None:
        for x_LC, counts_L in zip(x_NLC.detach(), counts_NL, strict=True):  # in float64 a batch would be large
            x_LC = x_LC[counts_L].double()
            self.states[f"sum {layer}"] += x_LC.sum(0).cpu()
            self.states[f"square {layer}"] += x_LC.square().sum(0).cpu()

    def columns(self, weight_RC: Tensor, sum_C: Tensor, square_C: Tensor, tokens: float) -> Tensor:
        """The harm of each input channel of a layer, (C,), from sums over the tokens; float64, on the CPU."""
        raise NotImplementedError

    @torch.no_grad()
    def compute(self) -> dict[str, dict[str, float]]:
        tokens = float(self.states["tokens"])
        harm = {
            layer: self.columns(weight, self.states[f"sum {layer}"], self.states[f"square {layer}"], tokens)
            for layer, weight in self.readers.items()
        }
        score = zeros(len(self.units))
        for i, unit in enumerate(self.units):
            score[i] = sum(float(harm[layer][indices].sum()) for layer, indices in self.inputs[unit.name].items())
        return self.table(score=score)
