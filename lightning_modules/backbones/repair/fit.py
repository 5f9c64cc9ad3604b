"""The refit of one site: what its layer gets and what its feature map lacks, and the weights that follow.

Shapes: N samples, P positions (pixels or tokens), I inputs of the layer, O channels of the feature map.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.backbones.removal import get_feature_map, removing
from lightning_modules.backbones.repair.least_squares import (
    NormalEquations,
    change_layer,
    list_inputs,
    list_positions,
)
from lightning_modules.backbones.repair.sites import Site

HELD_OUT = 4
"""One of so many calibration samples is held out to choose the ridge."""

PERTURBATIONS = (1.0, 0.5)
"""Sizes of the two perturbations by which a gain is measured, relative to the root mean square of the layer's output or
the feature map, whichever is larger."""

TOLERANCE = 0.02
"""Greatest relative difference between two measurements of one gain; rounding to bfloat16 makes less."""


class Fit:
    """The layer of a site, with the sums over calibration samples that determine its new weights."""

    def __init__(self, site: Site, network: nn.Module) -> None:
        self.site, self.layer = site, network.get_submodule(site.layer)
        self.network = network
        self.before = copy_weights(self.layer)
        self.reason: str | None = None
        """why the layer keeps its weights; None where it gets new ones"""
        self.figures: dict[str, float] = {}
        """the chosen ridge, and the share of the feature map's squared error that is left"""
        weight = self.before["weight"]
        self.equations = NormalEquations(weight[0].numel() + ("bias" in self.before), len(weight))
        self.gain: Tensor | None = None
        self.after = self.before

    @property
    def module(self) -> nn.Module:
        """The module of the student's feature map; stand-ins for removed units are made anew each time."""
        return self.network.get_submodule(self.site.student)

    def observe(self, run: Callable[[], Any], inputs: Mapping[str, Any], numbers_N: Tensor, target: Tensor) -> None:
        """Add some calibration samples to the sums.

        Args:
            run: runs the network, without the units that are made up for, on the samples.
            inputs: its inputs.
            numbers_N: numbers of the samples.
            target: the feature map of the network with all units, (N,P,channels).
        """
        if self.equations.sums["rejected"]:
            return
        if self.site.channels is not None:
            target = target[..., self.site.channels.to(target.device)]
        present, x = run_to(self.module, run, self.layer)
        if self.gain is None or self.gain.ndim:  # one that is the same everywhere is measured once
            self.gain = measure_gain(self, run, present)
        if self.gain is None:
            self.equations.sums["rejected"] += 1
            return
        counts = mark_positions(inputs, present)
        rows, error = list_inputs(self.layer, x) * counts, (target - present) * counts
        held_out_N = numbers_N.to(rows.device) % HELD_OUT == HELD_OUT - 1
        self.equations.add(rows, error, self.gain.expand_as(error), held_out_N)

    def refit(self, ridges: Sequence[float]) -> None:
        """Give the layer the weights that the sums determine, unless no ridge helps; the sums are then deleted."""
        equations = self.equations
        self.equations = NormalEquations(0, 0)
        if equations.sums["rejected"]:
            self.reason = "the feature map does not depend on the layer's output element by element"
            return
        fitted = equations.fit(ridges)
        if fitted is None:
            self.reason = "no ridge lowers the error on held-out samples"
            return
        ridge, change = fitted
        error_left = equations.error(change, [0, 1]) / float(equations.sums["errors"].sum())
        self.figures = {"ridge": ridge, "error_left": error_left}
        change_layer(self.layer, change)
        self.after = copy_weights(self.layer)

    @torch.no_grad()
    def move(self, step: float) -> None:
        """Set the weights to those before the refit plus a share of their change."""
        for name, parameter in self.layer.named_parameters(recurse=False):
            before, after = self.before[name].to(parameter), self.after[name].to(parameter)
            parameter.copy_(after if step == 1 else before + step * (after - before))

    def describe(self) -> dict[str, Any]:
        """Return plain values for a record."""
        site = {"layer": self.site.layer, "feature_map": self.site.student}
        return site | ({"reason": self.reason} if self.reason else self.figures)


def copy_weights(layer: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters of a layer by name, on the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in layer.named_parameters(recurse=False)}


class EndOfPass(Exception):
    """Ends a forward pass behind the last module that is needed."""


def run_to(module: nn.Module, run: Callable[[], Any], layer: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """Return the feature map of a module, (N,P,channels), and the input of `layer`; nothing behind it is computed.

    Without a layer the second value is the feature map, too. `run` runs the network that they are in.
    """
    seen: dict[str, Tensor] = {}

    def end(module: nn.Module, args: Any, output: Any) -> None:
        seen["map"] = list_positions(get_feature_map(output))
        raise EndOfPass

    handles = [] if layer is None else [layer.register_forward_pre_hook(lambda _, args: seen.update(input=args[0]))]
    handles.append(module.register_forward_hook(end))
    with contextlib.suppress(EndOfPass), torch.no_grad(), removing(handles):
        run()
    return seen["map"], seen["map" if layer is None else "input"]


def measure_gain(fit: Fit, run: Callable[[], Any], present: Tensor) -> Tensor | None:
    """Return how much each element of the feature map changes per change of the same element of the layer's output.

    The gain has the shape of the feature map, (N,P,O), or no dimensions where it is the same everywhere. It is measured
    by adding noise of random signs to the layer's output, twice. None where the two measurements differ: the map is not
    affine in the output element by element.
    """
    first, second = (measure_gain_once(fit, run, present, size) for size in PERTURBATIONS)
    if first is None or second is None or not first.any():
        return None
    limit = TOLERANCE * float(first.norm())
    if float((first - second).norm()) > limit:
        return None
    return first.mean() if float((first - first.mean()).norm()) <= limit else first


def measure_gain_once(fit: Fit, run: Callable[[], Any], present: Tensor, size: float) -> Tensor | None:
    """Return the change of the feature map divided by noise of a relative size; None where they differ in shape."""
    added: list[Tensor] = []

    def perturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=torch.Generator().manual_seed(int(1 / size))) * 2 - 1
        scale = size * max(float(values.float().square().mean().sqrt()) for values in (output, present))
        added.append((scale * signs.to(output.device)).to(output.dtype))
        return output + added[0]

    with removing([fit.layer.register_forward_hook(perturb)]):
        changed, _ = run_to(fit.module, run)
    noise = list_positions(added[0]).float()
    same_shape = noise.shape == present.shape and bool(noise.all())
    return (changed.float() - present.float()) / noise if same_shape else None


def mark_positions(inputs: Mapping[str, Any], feature_map: Tensor) -> Tensor:
    """Return 1 for each token that predicts a target and 0 for others, (N,P,1), or (1,1,1) where all positions count.

    The mask (N,P) of the inputs says which tokens are targets; each is predicted by the token before it.
    """
    mask = inputs.get("mask")
    if mask is None or mask.shape != feature_map.shape[:2]:
        return feature_map.new_ones(1, 1, 1)
    return F.pad(mask[:, 1:], (0, 1))[..., None].to(feature_map)
