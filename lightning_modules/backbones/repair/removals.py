"""Outputs without single units whose removal is made up for, with prefix reuse: two passes over the samples."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.backbones.prefix_reuse import Replay
from lightning_modules.backbones.removal import record_features
from lightning_modules.backbones.repair.fit import Fit
from lightning_modules.backbones.repair.least_squares import list_positions
from lightning_modules.backbones.repair.sites import Site


class RepairedRemovals:
    """Removes one unit at a time and refits the layer that can make up for it.

    In a first pass `observe` takes the calibration samples; then `refit` computes new weights; in a second pass
    `outputs` yields the outputs without each unit. The network itself is as it was after each call. A unit that no
    layer can make up for is only removed.

    Args:
        backbone: the network.
        names: the units.
        ridges: see LeastSquares.
    """

    def __init__(self, backbone: Any, names: Sequence[str], ridges: Sequence[float]) -> None:
        self.backbone, self.names, self.ridges = backbone, list(names), list(ridges)
        self.present = set(backbone.repair_sites(backbone, []))
        self.fits = {name: fit for name in self.names if (fit := self.make_fit(name))}

    def make_fit(self, name: str) -> Fit | None:
        """Return the fit of the nearest site of a unit; None where there is none."""
        with self.backbone.without([name]):
            sites: list[Site] = self.backbone.repair_sites(self.backbone, [])
            site = next((site for site in sites if site not in self.present), None)
            return None if site is None else Fit(site, self.backbone.network)

    @property
    def states(self) -> dict[str, Tensor]:
        """The sums of all sites by name."""
        return {f"{name} {key}": value for name, fit in self.fits.items() for key, value in fit.equations.sums.items()}

    @states.setter
    def states(self, states: Mapping[str, Tensor]) -> None:
        for name, fit in self.fits.items():
            fit.equations.sums = {key: states[f"{name} {key}"] for key in fit.equations.sums}

    @torch.no_grad()
    def observe(self, inputs: dict[str, Any], numbers_N: Tensor) -> None:
        """Add some calibration samples, with their numbers, to the sums of every site."""
        replay, maps, _ = self.record(inputs, None)  # compiled functions would not notice the hooks of `observe`
        for name, fit in self.fits.items():
            with self.backbone.without([name]):
                run = functools.partial(self.replay, replay, replay.count_calls_before(fit.layer), inputs)
                fit.observe(run, inputs, numbers_N, maps[fit.site.reference])

    def record(self, inputs: dict[str, Any], compiled: Any) -> tuple[Replay, dict[str, Tensor], Tensor]:
        """Run the whole network; return its replay, the feature maps that fits refer to, and its output.

        `compiled` are the `forwards` of the Replay.
        """
        network = self.backbone.network
        replay = Replay(network, [network.get_submodule(name) for name in self.names], compiled)
        references = {fit.site.reference for fit in self.fits.values()}
        with record_features({path: network.get_submodule(path) for path in references}) as maps, replay.recording():
            output = self.backbone.predict(inputs)
        return replay, {path: list_positions(feature_map) for path, feature_map in maps.items()}, output

    def replay(self, replay: Replay, count: int, inputs: Mapping[str, Any]) -> Tensor:
        """Return the output of the network as it is now; the first `count` calls are not computed again."""
        with replay.replaying(min(count, replay.first_change())):
            output: Tensor = self.backbone.predict(inputs)
        return output

    def refit(self) -> None:
        """Compute the new weights of every site from the sums."""
        for fit in self.fits.values():
            fit.refit(self.ridges)
            fit.move(0)

    @torch.no_grad()
    def outputs(self, inputs: dict[str, Any]) -> Iterator[tuple[str | None, Tensor]]:
        """Yield (None, the dense output), then (name, the output without that unit and with its site refitted)."""
        replay, _, dense = self.record(inputs, self.backbone.compiled)
        yield None, dense
        for name in self.names:
            fit = self.fits.get(name)
            count = len(replay.record) if fit is None else replay.count_calls_before(fit.layer)
            with self.backbone.without([name]):
                if fit is not None:
                    fit.move(1)
                output = self.replay(replay, count, inputs)
                if fit is not None:
                    fit.move(0)
            yield name, output
