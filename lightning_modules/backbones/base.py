"""What every network that can be pruned shares: its units, their removal, prefix reuse, costs."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from criteria.base import Batch, Shared, Unit
from lightning_modules.backbones.diffusion.pruned_unet import put
from lightning_modules.backbones.prefix_reuse import outputs_without_each
from lightning_modules.metrics.cost import Macs, count_macs

Change = Mapping[str, Any]
"""An entry of a plan: {"unit": name, "kind": "bypass" | "replace" | "slice"} or {"kind": "restage", "variant": ...}."""


class NetworkBackbone(nn.Module):
    """A network, how parts of it are taken out, and what its task is; the families say all that is particular.

    `options` are those of the family: see its `units`.
    """

    network: Any  # a model of diffusers or transformers; their mix-ins are not typed
    channels: Any
    """blocks of channels (Blocks), made when first asked for; not of every family"""
    library = ""
    """the package whose loaders open an export: diffusers | transformers | torch; also the name of the program that
    reloads one, lightning_modules/export/reload_<library>.py"""
    pipeline_tag: str | None = None
    """the task under which the Hugging Face hub lists an export"""
    slices = "units"
    """what a plan of width removes, in the plural"""
    has_dense_twin = False
    """can a network of the teacher's own class and shape do what a student of bypassed blocks does?"""
    surroundings: Any = None
    """the other parts of a diffusion pipeline, where there is one"""
    tokenizer: Any = None
    """what a language model reads and writes text by, where it is known"""
    writes_text = False
    """is it a language model?"""
    classifies = False
    """is it an image classifier?"""
    class_names: Mapping[str, int] = {}
    """{name of a class: its label}, where the network takes or gives classes that have names"""
    generates = False
    """does it draw samples from seeds?"""
    stratifies_timesteps = False
    """do calibration samples have timesteps that go with their numbers?"""
    width_changes_stages = True
    """have the outputs of stages fewer channels where channels were removed?"""

    def __init__(self, network: nn.Module, **options: Any) -> None:
        super().__init__()
        self.network, self.options = network, options
        self.counted: Macs | None = None
        self.called: list[str] = []
        self.memory_bound: int | None = None
        """bytes of activations that prefix reuse may hold"""
        self.compiled: dict[nn.Module, Any] | None = None
        """compiled forward functions of the parts that scoring calls; None compiles nothing"""
        self.moved: dict[str, str] = {}
        """module paths of the unpruned network -> those in this one, where a plan renumbered them"""

    @property
    def takes_text(self) -> bool:
        """Is the network conditioned on captions?"""
        return False

    @property
    def predicts_variance(self) -> bool:
        """Whether the output's second half is the variance of a sampling step (arXiv 2102.09672, section 3.1)."""
        return False

    # Units and their removal: given by the families

    def units(self, level: str = "depth") -> list[Unit]:
        raise NotImplementedError

    def shared(self, level: str = "depth") -> list[Shared]:
        """Parts outside the units that go when all of some units go."""
        return []

    def weights(self) -> dict[str, Tensor]:
        """The network's parameters by name."""
        return dict(self.network.named_parameters())

    def freed_weights(self, unit: Unit, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the slices of `tensors` (keyed like `weights()`: weights or gradients) that belong to one unit."""
        raise NotImplementedError

    def cost(self, names: Sequence[str], budget: str) -> int:
        """What a set of units of channels frees together: not a sum, as they share weights."""
        return self.channels.cost(names, budget)

    def survivors(self) -> list[str]:
        """The depth units, by module path, that are still there."""
        raise NotImplementedError

    def kept(self) -> list[str]:
        """The same, under the names they had in the unpruned network."""
        return self.survivors()

    def remove(self, names: Iterable[str]) -> dict[str, nn.Module]:
        """Put stand-ins where units were; returns what was there, for `put`."""
        raise NotImplementedError

    def stand_in(self, unit: nn.Module) -> nn.Module:
        """What takes a unit's place."""
        raise NotImplementedError

    def pruned(self, changes: Sequence[Change]) -> Self:
        """A student of its own: the same weights after the changes of a plan."""
        raise NotImplementedError

    def check_plan(self, changes: Sequence[Change]) -> None:
        """Raise ValueError where changes that were made without scores cannot be applied to this network."""
        if any(change["kind"] == "restage" for change in changes):
            raise ValueError("selection.name='bk_sdm' is for the U-Nets of Stable Diffusion; choose knapsack")

    def adopt(self, network: nn.Module, changes: Sequence[Change] = ()) -> Self:
        """A backbone like this one around another network, made from this one's by these changes."""
        raise NotImplementedError

    def stages(self) -> dict[str, nn.Module]:
        """The stages whose outputs can be compared between teacher and student, in the order of the forward pass."""
        raise NotImplementedError

    @contextlib.contextmanager
    def without(self, names: Iterable[str]) -> Iterator[None]:
        """Remove some units while the context lasts; the network is restored bit for bit, also after an error."""
        removed = self.remove(names)
        try:
            yield
        finally:
            put(self.network, removed)

    @contextlib.contextmanager
    def gated(self, gates: Mapping[str, Tensor], level: str) -> Iterator[None]:
        """Each unit's part in the output is multiplied by its gate while the context lasts; others are as they are.

        `gates` are {group: (units of the group,)}; a unit of depth, and an operator, is a group of its own. At 1 the
        network is as without gates, at 0 as without the unit; in between the output of a unit is weighed against that
        of its stand-in. Gradients reach the gates. Of channels see Blocks.
        """
        if level == "channel":
            with self.channels.gated(gates):
                yield
            return
        whole = {part.name: 1 - joint(gates, part) for part in self.shared(level) if gates.keys() >= set(part.units)}
        handles = []
        for name, gate in (dict(gates) | whole).items():
            unit = self.network.get_submodule(name)
            handles.append(unit.register_forward_hook(blend(self.stand_in(unit), gate), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def soft_cost(self, gates: Mapping[str, Tensor], budget: str, level: str) -> Tensor:
        """What is left of a cost (see `totals`) under gates, a float64 scalar with gradients.

        With gates of 0 and 1 it is the cost of the network without the units of gate 0, exactly. In between every unit
        frees its share, and what goes only with several units the product of theirs (our choice).
        """
        device = next(iter(gates.values())).device
        left = torch.tensor(self.totals()[budget], dtype=torch.float64, device=device)
        if level == "channel":
            return left - self.channels.freed(gates, budget)
        parts: list[Unit | Shared] = [*self.units(level), *self.shared(level)]
        for part in parts:
            if gates.keys() >= set(part.units):
                freed = (part.params if budget == "params" else part.macs) * joint(gates, part).double()
                around = part.inside if isinstance(part, Unit) else None
                # What is in another unit goes with that, and only once.
                left = left - (freed if around is None or around not in gates else freed * gates[around].squeeze())
        return left

    @contextlib.contextmanager
    def watching(self, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Each unit's output, and what its bypass would give for the same input, of the forward pass inside."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str, bypass: nn.Module) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                # Not bypass(...), whose hooks would call it again: a 1x1 convolution stands in for itself.
                seen[name] = hidden(output), hidden(bypass.forward(*args, **kwargs))

            return hook

        handles = []
        for name in names:
            unit = self.network.get_submodule(name)
            handles.append(unit.register_forward_hook(keep(name, self.stand_in(unit)), with_kwargs=True))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def student(self, network: nn.Module, moved: dict[str, str] | None = None) -> Self:
        """A backbone like this one around another network, on the same device."""
        made = self.twin(network.eval())
        made.moved = moved or {}
        return made.to(next(self.network.parameters()).device)

    def twin(self, network: nn.Module) -> Self:
        """The same options and whatever else surrounds the network, around another one."""
        raise NotImplementedError

    # What the network takes and gives: given by the families

    def check_data(self, data: Any) -> None:
        """Raise ValueError for a datamodule whose samples this network cannot take."""
        raise NotImplementedError

    def calibration_inputs(self, batch: Batch, seed: int, purpose: str = "calibration") -> Batch:
        """What the network takes, made from data; whatever is drawn is a function of (seed, purpose, sample number)."""
        raise NotImplementedError

    def training_inputs(self, batch: Batch) -> Batch:
        """What the network takes, made from data; whatever is drawn comes from the global CPU generator."""
        raise NotImplementedError

    def example_inputs(self, batch: int, device: torch.device | str) -> Batch:
        """Inputs of the right shape, zeros: for counting and timing."""
        raise NotImplementedError

    def predict(self, inputs: Batch) -> Tensor:
        """The network's output, batch first."""
        raise NotImplementedError

    def predict_without_each(self, inputs: Batch, names: Sequence[str]) -> Iterator[tuple[str | None, Tensor]]:
        """Outputs with one unit removed at a time, reusing what the dense pass computed before that unit.

        Equal to `without([name])` around `predict`, bit for bit on a CPU and not compiled. The dense pass's
        activations are held meanwhile; with a `memory_bound` the batch goes through in parts that keep to it.
        """
        yield from outputs_without_each(self, inputs, names)

    def losses(self, output: Tensor, inputs: Batch) -> Tensor:
        """The task loss of each sample, (N,)."""
        raise NotImplementedError

    def loss(self, inputs: Batch) -> Tensor:
        """The task loss of a batch."""
        return self.losses(self.predict(inputs), inputs).mean()

    def distance(self, output: Tensor, reference: Tensor, inputs: Batch) -> Tensor:
        """How far an output is from the teacher's for the same inputs, as distillation sees it; a scalar."""
        raise NotImplementedError

    # Costs, files

    def macs(self) -> Macs:
        """Multiply-accumulates of one forward at batch 1, counted once on the meta device."""
        if self.counted is None:
            twin = self.twin(self.meta_network())
            inputs = twin.example_inputs(1, "meta")
            handles = [
                module.register_forward_pre_hook(lambda *_, name=name: self.called.append(name))
                for name, module in twin.network.named_modules()
            ]
            self.counted = count_macs(twin.network, lambda: twin.predict(inputs))
            for handle in handles:
                handle.remove()
        return self.counted

    def meta_network(self) -> nn.Module:
        """A network of the same configuration on the meta device."""
        raise NotImplementedError

    def forward_order(self) -> dict[str, int]:
        """{module path: place among the calls of one forward pass}."""
        self.macs()
        return {name: place for place, name in reversed(list(enumerate(self.called)))}

    def totals(self) -> dict[str, int]:
        """{budget: what the whole network costs}."""
        return {"params": self.params(), "macs": self.macs().linear}

    def params(self) -> int:
        return sum(p.numel() for p in self.network.parameters())

    def save(self, folder: Path) -> None:
        """config.json and safetensors weights, as the network's library writes them."""
        raise NotImplementedError

    # Exports: given by the families

    def save_export(self, folder: Path) -> None:
        """Write what the network's library opens by itself, in safetensors."""
        raise NotImplementedError

    def reload_arguments(self) -> list[str]:
        """Return the further command line arguments of the program that reloads an export."""
        return []

    def random_arguments(self) -> dict[str, Any]:
        """Return arguments of the network for two samples, with noise where there are numbers, on the CPU."""
        raise NotImplementedError

    def expected_outputs(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """Return what a reloaded export has to compute from these arguments: "output", and what else is compared."""
        return {"output": output_of(self.network, arguments)}

    def card_usage(self) -> str:
        """Return how an export is loaded, in Markdown."""
        raise NotImplementedError


def joint(gates: Mapping[str, Tensor], part: Unit | Shared) -> Tensor:
    """How far a part is gone that goes with its units: the product of 1 - gate."""
    return torch.stack([1 - gates[name].squeeze() for name in part.units]).prod()


def blend(bypass: nn.Module, gate: Tensor) -> Any:
    """A forward hook that weighs a module's outputs against those of what stands in for it."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        other = bypass.forward(*args, **kwargs)  # not bypass(...): see `watching`
        if isinstance(output, Tensor):
            return torch.lerp(other, output, gate.to(output))  # at 0 and 1 one of them, bit for bit
        pairs = zip(output, other, strict=True)
        return tuple(torch.lerp(b, a, gate.to(a)) if isinstance(a, Tensor) else a for a, b in pairs)

    return hook


def hidden(output: Any) -> Tensor:
    """The feature map among a module's outputs: the last tensor (joint blocks give the text stream first)."""
    return output if isinstance(output, Tensor) else [part for part in output if isinstance(part, Tensor)][-1]


def output_of(network: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """Return what a network computes from its arguments, in eval mode."""
    with torch.inference_mode():
        output: Tensor = network.eval()(**arguments, return_dict=False)[0]
    return output
