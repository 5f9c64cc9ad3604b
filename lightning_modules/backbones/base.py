"""The base class of all networks that can be pruned, and what a family of networks has to implement."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from criteria.base import Batch, Shared, Unit
from lightning_modules.backbones.costs import count_forward_pass
from lightning_modules.backbones.gating import cost_under_gates, gate_units
from lightning_modules.backbones.prefix_reuse import outputs_without_each
from lightning_modules.backbones.removal import record_outputs, remove_for_a_while
from lightning_modules.backbones.repair.removals import RepairedRemovals
from lightning_modules.backbones.repair.sites import Site
from lightning_modules.metrics.cost import Macs

Change = Mapping[str, Any]
"""An entry of a plan: {"unit": name, "kind": "bypass" | "replace" | "slice"} or {"kind": "restage", "variant": ...}."""


class NetworkBackbone(nn.Module):
    """A network with its units, their removal, its inputs and outputs, its costs and its files.

    A family is a subclass that implements the methods which raise NotImplementedError here. The methods that criteria
    use are described in criteria/protocols.py. `options` are the family's own: see its `units`.
    """

    # Properties of a family

    network: Any
    """a model of diffusers or transformers, whose mix-ins are not typed, or an ImageNetwork"""
    channels: Any
    """Blocks of channels, made at first use; only in families that can lose channels"""
    library = ""
    """the package whose loaders open an export: diffusers | transformers | torch; also the name of the program that
    reloads one, lightning_modules/export/reload_<library>.py"""
    pipeline_tag: str | None = None
    """the task under which the Hugging Face hub lists an export"""
    slices = "units"
    """the plural noun for what a plan of width removes, such as channels"""
    has_onnx = True
    """whether the network can be written as ONNX"""
    has_dense_twin = False
    """whether a student of bypassed blocks equals a network of the teacher's class and shape with zeroed branches"""
    pipeline_parts: Any = None
    """the other parts of a diffusion pipeline, if any"""
    noise_scheduler: Any = None
    """the training schedule of a network that takes timesteps"""
    tokenizer: Any = None
    """the tokenizer of a language model, if it is known"""
    writes_text = False
    """whether the network is a language model"""
    classifies = False
    """whether the network is an image classifier"""
    class_names: Mapping[str, int] = {}
    """{name of a class: its label}, where the network takes or gives classes that have names"""
    generates = False
    """whether the network generates samples from seeds"""
    can_embed_guidance = False
    """whether `add_guidance_embedding` can make the network take a guidance scale as an argument"""
    stratifies_timesteps = False
    """whether the timestep of a calibration sample depends on the sample's number"""
    width_changes_stages = True
    """whether the outputs of stages have fewer channels in a student that lost channels"""

    def __init__(self, network: nn.Module, **options: Any) -> None:
        super().__init__()
        self.network, self.options = network, options
        self.counts: tuple[Macs, dict[str, int]] | None = None
        """see costs.py; None until first use"""
        self.memory_bound: int | None = None
        """bytes of activations that prefix reuse may hold; None sets no bound"""
        self.compiled: dict[nn.Module, Any] | None = None
        """compiled forward functions of the modules that scoring calls; None compiles nothing"""
        self.moved: dict[str, str] = {}
        """{module path in the unpruned network: path in this one}, of modules that a plan renumbered"""

    def copy(self) -> Self:
        """Return a network with the same weights that shares nothing with this one."""
        return copy.deepcopy(self)

    @property
    def takes_text(self) -> bool:
        """Whether the network is conditioned on captions."""
        return False

    @property
    def predicts_variance(self) -> bool:
        """Whether the output's second half is the variance of a sampling step (arXiv 2102.09672, section 3.1)."""
        return False

    # Units

    def units(self, level: str = "depth") -> list[Unit]:
        """Return the removable units of one level in the order of the forward pass.

        Raises ValueError, with the levels to choose from, where this network has no such units.
        """
        raise NotImplementedError

    def shared(self, level: str = "depth") -> list[Shared]:
        """Return the parts outside all units that are removed once all of certain units are."""
        return []

    def weights(self) -> dict[str, Tensor]:
        """Return the network's parameters by name."""
        return dict(self.network.named_parameters())

    def freed_weights(self, unit: Unit, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the slices of `tensors` that belong to one unit.

        `tensors` have the names and shapes of `weights()`: the weights themselves, gradients, or sums.
        """
        raise NotImplementedError

    def survivors(self) -> list[str]:
        """Return the module paths of the depth units that were not removed."""
        raise NotImplementedError

    def self_contained(self) -> list[str]:
        """Return the survivors of which the network uses nothing but their outputs, no weight and no part of theirs."""
        return self.survivors()

    def kept(self) -> list[str]:
        """Return the depth units that were not removed, by their module paths in the unpruned network."""
        return self.survivors()

    # Removal

    def remove(self, names: Iterable[str]) -> dict[str, nn.Module]:
        """Replace some units by their stand-ins; return the replaced modules by path, for `put_modules`."""
        raise NotImplementedError

    def stand_in(self, unit: nn.Module) -> nn.Module:
        """Return the module that replaces a removed unit."""
        raise NotImplementedError

    def without(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Remove some units while the context lasts; the network is restored bit for bit, also after an error."""
        return remove_for_a_while(self, names)

    def watching(self, names: Sequence[str]) -> AbstractContextManager[dict[str, tuple[Tensor, Tensor]]]:
        """Record the forward pass inside: {unit: (its output, the output of its stand-in for the same input)}."""
        return record_outputs(self, names)

    def check_plan(self, changes: Sequence[Change]) -> None:
        """Raise ValueError if this network cannot take `changes`, a plan made without scores."""
        if any(change["kind"] == "restage" for change in changes):
            raise ValueError("selection.name='bk_sdm' is for the U-Nets of Stable Diffusion; choose knapsack")

    def pruned(self, changes: Sequence[Change]) -> Self:
        """Return a student with its own copy of the weights that are left after the changes of a plan."""
        raise NotImplementedError

    def adopt(self, network: nn.Module, changes: Sequence[Change] = ()) -> Self:
        """Return a backbone around another network, which these changes made from this backbone's network."""
        raise NotImplementedError

    def repair_sites(self, student: Self, changes: Sequence[Change]) -> list[Site]:
        """Return the layers of a student, pruned from this network by `changes`, that can make up for what is removed.

        They are in the order of the forward pass. The student may be this network itself while units are removed from
        it.
        """
        return []

    def paths_in(self, student: Self) -> dict[str, str]:
        """Return {module path of a depth unit that a student still has: its module path there}."""
        return {name: name for name in self.survivors()} if student is self else student.moved

    def repaired_removals(self, names: Sequence[str], ridges: Sequence[float]) -> RepairedRemovals:
        """Return what yields the outputs without single units whose removal is made up for by least squares."""
        return RepairedRemovals(self, names, ridges)

    def student(self, network: nn.Module, moved: dict[str, str] | None = None) -> Self:
        """Return a backbone around another network in eval mode, on this backbone's device."""
        student = self.twin(network.eval())
        student.moved = moved or {}
        return student.to(next(self.network.parameters()).device)

    def twin(self, network: nn.Module) -> Self:
        """Return a backbone around another network, with the options and the pipeline parts of this one."""
        raise NotImplementedError

    # Gates

    def gated(self, gates: Mapping[str, Tensor], level: str) -> AbstractContextManager[None]:
        """Weigh each gated unit against its stand-in while the context lasts; see `gating.gate_units`."""
        return gate_units(self, gates, level)

    def soft_cost(self, gates: Mapping[str, Tensor], budget: str, level: str) -> Tensor:
        """Return the cost of the gated network, with gradients; see `gating.cost_under_gates`."""
        return cost_under_gates(self, gates, budget, level)

    # Inputs and outputs

    def stages(self) -> dict[str, nn.Module]:
        """Return {module path: module} of the stages whose outputs distillation can compare, in forward order."""
        raise NotImplementedError

    def check_data(self, data: Any) -> None:
        """Raise ValueError for a datamodule whose samples this network cannot take."""
        raise NotImplementedError

    def calibration_inputs(self, batch: Batch, seed: int, purpose: str = "calibration") -> Batch:
        """Return the network's inputs for some samples; noise and timestep are functions of (seed, purpose, number)."""
        raise NotImplementedError

    def training_inputs(self, batch: Batch) -> Batch:
        """Return the network's inputs for some samples; noise and timestep come from the global CPU generator."""
        raise NotImplementedError

    def example_inputs(self, batch: int, device: torch.device | str) -> Batch:
        """Return inputs of zeros for `batch` samples, for counting and timing."""
        raise NotImplementedError

    def example_training_inputs(self, batch: int, device: torch.device | str, shape: Sequence[int] = ()) -> Batch:
        """Return what `training_inputs` returns for `batch` samples, all zeros.

        `shape` is that of a sample of the data; networks that take samples of one shape only do not need it.
        """
        return self.example_inputs(batch, device)

    def predict(self, inputs: Batch) -> Tensor:
        """Return the network's output, batch first."""
        raise NotImplementedError

    def predict_without_each(self, inputs: Batch, names: Sequence[str]) -> Iterator[tuple[str | None, Tensor]]:
        """Yield (None, the dense output), then (name, the output with only that unit removed).

        Equal to `predict` inside `without([name])`, bit for bit on a CPU without compilation, but what the dense pass
        computed before a unit is not computed again. See prefix_reuse.py for the memory that this takes.
        """
        yield from outputs_without_each(self, inputs, names)

    def losses(self, output: Tensor, inputs: Batch) -> Tensor:
        """Return the task loss of each sample, (N,)."""
        raise NotImplementedError

    def loss(self, inputs: Batch) -> Tensor:
        """Return the mean task loss of a batch, a scalar."""
        return self.losses(self.predict(inputs), inputs).mean()

    def distance(self, output: Tensor, reference: Tensor, inputs: Batch) -> Tensor:
        """Return the distance between an output and the teacher's for the same inputs, a scalar, for distillation."""
        raise NotImplementedError

    # Costs

    def meta_network(self) -> nn.Module:
        """Return a network of the same configuration on the meta device."""
        raise NotImplementedError

    def macs(self) -> Macs:
        """Return the multiply-accumulates of one forward pass at batch size 1, counted at first use."""
        self.counts = self.counts or count_forward_pass(self)
        return self.counts[0]

    def forward_order(self) -> dict[str, int]:
        """Return {module path: position of its first call} for one forward pass, counted at first use."""
        self.counts = self.counts or count_forward_pass(self)
        return self.counts[1]

    def params(self) -> int:
        """Return the number of parameters."""
        return sum(p.numel() for p in self.network.parameters())

    def totals(self) -> dict[str, int]:
        """Return {budget: the cost of the whole network}."""
        return {"params": self.params(), "macs": self.macs().linear}

    def cost(self, names: Sequence[str], budget: str) -> int:
        """Return the cost that removing these channel units together frees.

        It is not the sum of their single costs, as they share weights.
        """
        return self.channels.cost(names, budget)

    # Files and exports

    def save(self, folder: Path) -> None:
        """Write config.json and safetensors weights, as the network's library does."""
        raise NotImplementedError

    def save_export(self, folder: Path, sampler: Callable[..., Any] | None = None) -> None:
        """Write files that the network's library opens by itself, in safetensors.

        `sampler` makes the scheduler beside a diffusion network (see `generate`); None is the teacher's.
        """
        raise NotImplementedError

    def reload_arguments(self) -> list[str]:
        """Return further command line arguments for the program that reloads an export."""
        return []

    def random_arguments(self, samples: int = 2) -> dict[str, Any]:
        """Return arguments of the network for some samples, with noise where there are numbers, on the CPU."""
        raise NotImplementedError

    def forward(self, **arguments: Any) -> Tensor:
        """Return the network's output for its own arguments, those of `random_arguments`."""
        output: Tensor = self.network(**arguments, return_dict=False)[0]
        return output

    def expected_outputs(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """Return what a reloaded export has to compute from these arguments: "output", and what else is compared."""
        with torch.inference_mode():
            return {"output": self.eval()(**arguments)}

    def card_usage(self) -> str:
        """Return how an export is loaded, in Markdown."""
        raise NotImplementedError


def run_network(network: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """Return the output of a network in eval mode for its arguments."""
    with torch.inference_mode():
        output: Tensor = network.eval()(**arguments, return_dict=False)[0]
    return output
