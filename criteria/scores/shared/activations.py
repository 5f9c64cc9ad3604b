"""Criteria that use the inputs of linear layers: sums over calibration tokens."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from criteria.base import Batch, Criterion, Level, Scores, Unit, zeros
from criteria.protocols import ReadsInputs


class InputStatistics(Criterion[ReadsInputs]):
    """Base class: a unit's score is the sum over its channels of a subclass's `harm_by_input`.

    The layers are those that read the channels as inputs (the output projection for heads, the last layer of a
    feed-forward). All tokens of the calibration samples count; of samples with a mask, only those that
    the mask selects.
    """

    level = Level.CHANNEL

    def supports(self, backbone: ReadsInputs) -> str | None:
        """Return a reason as well for networks whose channels are no inputs of linear layers."""
        if not hasattr(backbone, "consumers"):
            return "it scores heads and channels of language models by the inputs of linear layers"
        return super().supports(backbone)

    def start(self, backbone: ReadsInputs, units: Sequence[Unit], seed: int) -> None:
        """Begin with zeros: "tokens", and per layer the sum and the sum of squares of each input over the tokens, (C,).

        Sums are float64 on the CPU.
        """
        super().start(backbone, units, seed)
        self.inputs = {unit.name: backbone.consumers(unit.name) for unit in units}
        weights = backbone.weights()
        self.readers = {layer: weights[f"{layer}.weight"] for inputs in self.inputs.values() for layer in inputs}
        self.states = {"tokens": zeros(1)}
        for layer, weight in self.readers.items():
            self.states |= {f"sum {layer}": zeros(weight.shape[1]), f"square {layer}": zeros(weight.shape[1])}

    def update(self, batch: Batch) -> None:
        inputs = self.backbone.calibration_inputs(batch, self.seed)
        counts_NL = inputs.get("mask", torch.ones_like(inputs["sample"])).bool()
        self.states["tokens"] += int(counts_NL.sum())
        with self.backbone.listening({layer: functools.partial(self.add, layer, counts_NL) for layer in self.readers}):
            self.backbone.predict(inputs)

    def add(self, layer: str, counts_NL: Tensor, x_NLC: Tensor) -> None:
        """Add the inputs of a layer at the tokens that count."""
        for x_LC, counts_L in zip(x_NLC.detach(), counts_NL, strict=True):  # in float64 a batch would be large
            x_LC = x_LC[counts_L].double()
            self.states[f"sum {layer}"] += x_LC.sum(0).cpu()
            self.states[f"square {layer}"] += x_LC.square().sum(0).cpu()

    def harm_by_input(self, weight_RC: Tensor, sum_C: Tensor, square_C: Tensor, tokens: float) -> Tensor:
        """Return the harm of each input channel of a layer, (C,) in float64 on the CPU, from sums over `tokens`."""
        raise NotImplementedError

    @torch.no_grad()
    def compute(self) -> Scores:
        tokens = float(self.states["tokens"])
        harm = {
            layer: self.harm_by_input(weight, self.states[f"sum {layer}"], self.states[f"square {layer}"], tokens)
            for layer, weight in self.readers.items()
        }
        score = zeros(len(self.units))
        for i, unit in enumerate(self.units):
            score[i] = sum(float(harm[layer][indices].sum()) for layer, indices in self.inputs[unit.name].items())
        return self.table(score=score)
