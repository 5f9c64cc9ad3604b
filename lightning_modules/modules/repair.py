"""Repair of a pruned network in closed form: layers beside the removed units are refitted, without training."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_modules.backbones.base import Change, NetworkBackbone
from lightning_modules.backbones.removal import get_feature_map
from lightning_modules.backbones.repair_sites import Site
from lightning_modules.modules.base import Reference
from lightning_modules.modules.joint_loss import sum_square_errors
from lightning_modules.modules.least_squares import NormalEquations, change_layer, list_inputs, list_positions
from lightning_modules.training.ranks import sum_over_ranks

HELD_OUT = 4
"""One of so many calibration samples is held out to choose the ridge."""

PERTURBATIONS = (0.25, 0.125)
"""Sizes of the two perturbations by which a gain is measured, relative to the root mean square of what is perturbed."""

TOLERANCE = 0.02
"""Greatest relative difference between two measurements of one gain; rounding to bfloat16 makes less."""

STEPS = (1.0, 0.5, 0.25, 0.125)
"""Shares of the whole change that are tried in turn, until the output loss on the calibration samples is no higher."""


class LeastSquares:
    """Refits one layer beside each removed unit, so that the feature map behind the unit is the teacher's again.

    The backbone's `repair_sites` says which layers these are. They are refitted one after the other in the order of the
    forward pass by ridge least squares towards their present weights, so each corrects what those before it left over.
    No parameter is added. The output loss on the calibration samples never rises: if the new weights raised it, they
    would be moved back towards the old ones. The method is ours. For decoders the idea is that of ReplaceMe (arXiv
    2505.02819), which fits a linear map in the place of removed layers and merges it into the layer before them; here
    the weights of that layer are fitted themselves.

    Args:
        ridges: ridges to choose from by the error on held-out samples, relative to the mean squared input.
        samples: number of calibration samples.
    """

    def __init__(self, ridges: Sequence[float], samples: int) -> None:
        if not ridges or min(ridges) <= 0:
            raise ValueError(f"repair.ridges={list(ridges)}: choose one or more numbers above 0")
        if samples < HELD_OUT:
            raise ValueError(f"repair.samples={samples}: choose {HELD_OUT} or more, as one of {HELD_OUT} is held out")
        self.ridges, self.samples = list(ridges), samples

    def repair(
        self,
        student: NetworkBackbone,
        reference: NetworkBackbone,
        changes: Sequence[Change],
        batches: DataLoader,
        trainer: pl.Trainer,
        seed: int,
    ) -> dict[str, Any]:
        """Refit layers of the student in place; return a record of the sites and of the output loss.

        Args:
            student: the pruned network.
            reference: the network it was pruned from.
            changes: the plan by which it was pruned.
            batches: calibration batches.
            trainer: runs the batches.
            seed: seed of the noise of the calibration samples.
        """
        sites = reference.repair_sites(student, changes)
        if not sites:
            return {"sites": [], "step": 0.0}
        fits = [Fit(site, student.network.get_submodule(site.layer)) for site in sites]
        trainer.test(Fitting(student, reference, fits, self.ridges, seed), [batches] * len(fits), verbose=False)
        losses: dict[float, float] = {}
        for steps in ((0.0, STEPS[0]), STEPS[1:]):
            module = OutputLosses(student, reference, fits, steps, seed)
            trainer.test(module, batches, verbose=False)
            losses |= module.losses
            if min(losses.values()) < losses[0.0]:
                break
        step = min(losses, key=losses.__getitem__)
        for fit in fits:
            fit.move(step)
        return {
            "output_loss_before": losses[0.0],
            "output_loss": losses[step],
            "step": step,
            "sites": [fit.describe() for fit in fits],
        }


class Fit:
    """What becomes of the layer of a site."""

    def __init__(self, site: Site, layer: nn.Module) -> None:
        self.site, self.layer = site, layer
        self.reason: str | None = None
        """why the layer keeps its weights; None where it gets new ones"""
        self.figures: dict[str, float] = {}
        """the chosen ridge, and the relative squared error of the feature map before and after"""
        self.before = copy_weights(layer)
        self.after = self.before

    def refit(self, equations: NormalEquations, ridges: Sequence[float]) -> None:
        """Give the layer new weights, unless no ridge helps."""
        fitted = equations.fit(ridges)
        if fitted is None:
            self.reason = "no ridge lowers the error on held-out samples"
            return
        ridge, change = fitted
        left = equations.error(change, [0, 1]) / float(equations.errors.sum())
        self.figures = {"ridge": ridge, "error_left": left}
        change_layer(self.layer, change)
        self.after = copy_weights(self.layer)

    @torch.no_grad()
    def move(self, step: float) -> None:
        """Set the weights to those before the repair plus a share of their change."""
        for name, parameter in self.layer.named_parameters(recurse=False):
            before, after = self.before[name].to(parameter), self.after[name].to(parameter)
            parameter.copy_(after if step == 1 else before + step * (after - before))

    def describe(self) -> dict[str, Any]:
        """Return plain values for repair.json."""
        site = {"layer": self.site.layer, "feature_map": self.site.student}
        return site | ({"reason": self.reason} if self.reason else self.figures)


def copy_weights(layer: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters of a layer by name, on the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in layer.named_parameters(recurse=False)}


class PassOverSamples(pl.LightningModule):
    """A test loop over calibration batches that go round the ranks."""

    def __init__(self, student: NetworkBackbone, reference: NetworkBackbone, fits: Sequence[Fit], seed: int) -> None:
        super().__init__()
        self.student, self.reference, self.fits, self.noise_seed = student, Reference(reference), fits, seed

    def on_test_start(self) -> None:
        self.reference.network.to(self.device)
        self.student.eval()

    def is_mine(self, batch_idx: int) -> bool:
        """Tell whether a batch is one of this rank's."""
        return bool(batch_idx % self.trainer.world_size == self.global_rank)


class Fitting(PassOverSamples):
    """Refits the layers one after the other, each with a loader of its own."""

    def __init__(
        self,
        student: NetworkBackbone,
        reference: NetworkBackbone,
        fits: Sequence[Fit],
        ridges: Sequence[float],
        seed: int,
    ) -> None:
        super().__init__(student, reference, fits, seed)
        self.ridges = ridges
        self.index = 0
        self.equations: NormalEquations | None = None
        self.gain: Tensor | None = None

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx != self.index:
            self.refit()
            self.index, self.equations, self.gain = dataloader_idx, None, None
        fit = self.fits[self.index]
        if not self.is_mine(batch_idx) or fit.reason:
            return
        inputs = self.student.calibration_inputs(batch, self.noise_seed)
        target, _ = run_to(self.reference.network, fit.site.reference, inputs)
        if fit.site.channels is not None:
            target = target[..., fit.site.channels.to(target.device)]
        present, x = run_to(self.student, fit.site.student, inputs, fit.layer)
        if self.gain is None or self.gain.ndim:  # one that is the same everywhere is measured once
            self.gain = measure_gain(self.student, fit, inputs, present)
        if self.gain is None:
            fit.reason = "the feature map does not depend on the layer's output element by element"
            return
        counts = mark_positions(inputs, present)
        rows = list_inputs(fit.layer, x) * counts
        self.equations = self.equations or NormalEquations(rows.shape[-1], present.shape[-1])
        held_out_N = batch["number"] % HELD_OUT == HELD_OUT - 1
        error = (target - present) * counts
        self.equations.add(rows, error, self.gain.expand_as(error), held_out_N.to(rows.device))

    def on_test_epoch_end(self) -> None:
        self.refit()

    def refit(self) -> None:
        """Sum over ranks and refit the present layer; a rank without equations keeps all ranks from it."""
        fit, fitting = self.fits[self.index], torch.tensor(float(self.equations is not None))
        if sum_over_ranks(fitting, self.device) < self.trainer.world_size:
            fit.reason = fit.reason or "a rank has no calibration samples"
            return
        assert self.equations is not None
        self.equations.sum_over_ranks(self.device)
        fit.refit(self.equations, self.ridges)


class OutputLosses(PassOverSamples):
    """Measures the output loss on the calibration samples with shares of the change of all weights, {share: loss}."""

    def __init__(
        self,
        student: NetworkBackbone,
        reference: NetworkBackbone,
        fits: Sequence[Fit],
        steps: Sequence[float],
        seed: int,
    ) -> None:
        super().__init__(student, reference, fits, seed)
        self.steps = steps
        self.sums = torch.zeros(len(steps) + 1, dtype=torch.float64)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if not self.is_mine(batch_idx):
            return
        inputs = self.student.calibration_inputs(batch, self.noise_seed)
        output = self.reference.network.predict(inputs)
        self.sums[-1] += len(output)
        for i, step in enumerate(self.steps):
            for fit in self.fits:
                fit.move(step)
            self.sums[i] += sum_square_errors(self.student.predict(inputs), output)

    def on_test_epoch_end(self) -> None:
        *errors, count = sum_over_ranks(self.sums, self.device).tolist()
        self.losses = {step: error / count for step, error in zip(self.steps, errors, strict=True)}


class EndOfPass(Exception):
    """Ends a forward pass behind the last module that is needed."""


def run_to(
    backbone: NetworkBackbone, path: str, inputs: dict[str, Any], layer: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """Return the feature map of a module, (N,P,C), and the input of `layer`; nothing behind the module is computed.

    Without a layer the second value is the feature map, too.
    """
    seen: dict[str, Tensor] = {}

    def end(module: nn.Module, args: Any, output: Any) -> None:
        seen["map"] = list_positions(get_feature_map(output))
        raise EndOfPass

    handles = [] if layer is None else [layer.register_forward_pre_hook(lambda _, args: seen.update(input=args[0]))]
    handles.append(backbone.network.get_submodule(path).register_forward_hook(end))
    with contextlib.suppress(EndOfPass), torch.no_grad(), removing(handles):
        backbone.predict(inputs)
    return seen["map"], seen.get("input", seen["map"])


def measure_gain(student: NetworkBackbone, fit: Fit, inputs: dict[str, Any], present: Tensor) -> Tensor | None:
    """Return how much each element of the feature map changes per change of the same element of the layer's output.

    The gain has the shape of the feature map (N,P,C), or none where it is the same everywhere. It is measured by adding
    noise of random signs to the layer's output, twice. None where the two measurements differ: the map is not affine in
    the output element by element.
    """
    gains = [measure_gain_once(student, fit, inputs, present, size) for size in PERTURBATIONS]
    first, second = gains
    if first is None or second is None or not first.any():
        return None
    limit = TOLERANCE * float(first.norm())
    if float((first - second).norm()) > limit:
        return None
    return first.mean() if float((first - first.mean()).norm()) <= limit else first


def measure_gain_once(
    student: NetworkBackbone, fit: Fit, inputs: dict[str, Any], present: Tensor, size: float
) -> Tensor | None:
    """Return the change of the feature map divided by noise of a relative size; None where they differ in shape."""
    added: list[Tensor] = []

    def perturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=torch.Generator().manual_seed(int(1 / size))) * 2 - 1
        scale = size * (output.float().square().mean().sqrt() or present.float().square().mean().sqrt())
        added.append((scale * signs.to(output.device)).to(output.dtype))
        return output + added[0]

    with removing([fit.layer.register_forward_hook(perturb)]):
        changed, _ = run_to(student, fit.site.student, inputs)
    noise = list_positions(added[0]).float()
    same_shape = noise.shape == present.shape and bool(noise.all())
    return (changed.float() - present.float()) / noise if same_shape else None


@contextlib.contextmanager
def removing(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hooks at the end of the context."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mark_positions(inputs: Mapping[str, Any], feature_map: Tensor) -> Tensor:
    """Return 1 for each position that counts and 0 for padding, (N,P,1) or (1,1,1) where all count."""
    mask = inputs.get("mask")
    if mask is None or mask.shape != feature_map.shape[:2]:
        return feature_map.new_ones(1, 1, 1)
    return mask[..., None].to(feature_map)
