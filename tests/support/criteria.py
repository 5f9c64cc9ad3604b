"""A network whose every unit can be worked out by hand, as criteria see networks, and calibration samples for it."""

import contextlib
import functools
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from criteria.base import Criterion, Unit

SAMPLES = 6
STEPS = 100
"""of the fake noise schedule"""


class Fake(nn.Module):
    """Three linear units in a row on a residual stream of 4 values, in float64; `last` is in no unit.

    A sample's image is its input, its target is drawn from its number, and its timestep the middle of its
    part of the schedule. Generated samples are 1x2x2: what the network makes of noise, times steps and guidance.
    """

    takes_text = True
    writes_text = False

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.a, self.b, self.c, self.last = (nn.Linear(4, 4).double() for _ in range(4))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64) / 2)
        self.noise_scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=STEPS))
        self.removed: set[str] = set()
        self.generations = 0

    def units(self, level: str = "depth") -> list[Unit]:
        return [Unit(name, "block", 20, 16) for name in "abc"]

    @contextlib.contextmanager
    def without(self, names):
        self.removed |= set(names)
        try:
            yield
        finally:
            self.removed -= set(names)

    @contextlib.contextmanager
    def watching(self, names):
        seen = {}
        handles = [
            getattr(self, name).register_forward_hook(
                lambda module, args, output, name=name: seen.update({name: (args[0], args[0] + output)})
            )
            for name in names
        ]
        yield seen
        for handle in handles:
            handle.remove()

    def calibration_inputs(self, batch, seed):
        targets = [
            torch.randn(4, generator=torch.Generator().manual_seed(1000 * seed + int(n))) for n in batch["number"]
        ]
        timestep = (2 * batch["number"] + 1) * STEPS // (2 * batch["of"])
        return {"sample": batch["image"], "target": torch.stack(targets).double(), "timestep": timestep}

    def predict(self, inputs):
        x = inputs["sample"]
        for name in "abc":
            x = x if name in self.removed else x + getattr(self, name)(x)
        return self.last(x)

    def predict_without_each(self, inputs, names):
        yield None, self.predict(inputs)
        for name in reversed(names):
            with self.without([name]):
                yield name, self.predict(inputs)

    def losses(self, output, inputs):
        return (output - inputs["target"]).square().mean(1)

    def weights(self):
        return dict(self.named_parameters())

    def freed_weights(self, unit, tensors):
        return [tensors[f"{unit.name}.{key}"] for key, _ in getattr(self, unit.name).named_parameters()]

    def generate(self, batch, sampler, steps, guidance=1.0):
        self.generations += 1
        noise = [torch.randn(4, generator=torch.Generator().manual_seed(int(seed))) for seed in batch["seed"]]
        sample = sampler(self.predict({"sample": torch.stack(noise).double()})) * steps * guidance
        return sample.view(-1, 1, 2, 2)

    def decode(self, samples):
        grey = (samples.sigmoid() * 255).to(torch.uint8)  # 1x2x2, stretched to 8x8
        return F.interpolate(grey.float(), size=8).to(torch.uint8).repeat(1, 3, 1, 1).permute(0, 2, 3, 1)


def batches(size: int = 2) -> list[dict]:
    """Calibration samples and seeds in one, in batches of a size."""
    images = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    whole = {
        "image": images,
        "number": torch.arange(SAMPLES),
        "of": torch.full((SAMPLES,), SAMPLES),
        "seed": torch.arange(SAMPLES),
        "caption": ["a red cat", "a blue dog", "a cat", "a dog", "red", "blue"],
    }
    return [{key: value[i : i + size] for key, value in whole.items()} for i in range(0, SAMPLES, size)]


def scored(criterion: Criterion, backbone: Fake | None = None, of: list[dict] | None = None, seed: int = 0) -> dict:
    backbone = backbone or Fake()
    criterion.start(backbone, backbone.units(), seed)
    with torch.no_grad():
        for batch in batches() if of is None else of:
            criterion.update(batch)
    return criterion.finish()


def column(scores: dict, name: str = "score") -> list[float]:
    return [scores[unit][name] for unit in "abc"]


def close(found: dict, other: dict, rtol: float = 1e-6) -> None:
    """The same names and columns, and the same values up to rounding."""
    assert found.keys() == other.keys()
    for unit, entry in found.items():
        assert entry.keys() == other[unit].keys()
        np.testing.assert_allclose(list(entry.values()), list(other[unit].values()), rtol=rtol, atol=1e-9)


def whole_batch(seed: int = 0) -> tuple[Fake, dict]:
    backbone = Fake()
    return backbone, backbone.calibration_inputs(batches(SAMPLES)[0], seed)


IDENTITY = functools.partial(torch.mul, 1.0)
"""a sampler that leaves what the fake network makes as it is"""
