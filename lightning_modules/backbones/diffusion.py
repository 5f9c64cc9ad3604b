"""What every diffusion network shares as a backbone: batches, noise, prediction, generation, taps, costs."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from criteria.base import Batch, Shared, Unit
from datamodules.seeding import torch_rng
from lightning_modules.backbones.conditions import Surroundings, move
from lightning_modules.backbones.pruned_unet import put
from lightning_modules.backbones.replay import outputs_without_each
from lightning_modules.metrics.cost import Macs, count_macs

Change = Mapping[str, Any]
"""An entry of a plan: {"unit": name, "kind": "bypass" | "replace" | "slice"} or {"kind": "restage", "variant": ...}."""


class DiffusionBackbone(nn.Module):
    """A network that predicts noise (or velocity, sample, flow), with the noise schedule it was trained under.

    `surroundings` are the other parts of its pipeline (VAE, text encoders), frozen and outside the module tree; None
    where the network works on images and takes no conditions. `options` are those of the family: see its `units`.
    Families say what their units are and what the network takes.
    """

    network: Any  # a diffusers model; their mix-ins are not typed
    component = "unet"
    """the network's name in its pipeline"""

    def __init__(
        self, network: nn.Module, noise_scheduler: Any, surroundings: Surroundings | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.network, self.noise_scheduler, self.options = network, noise_scheduler, options
        self.surroundings = surroundings
        self.counted: Macs | None = None
        self.called: list[str] = []
        self.memory_bound: int | None = None
        """bytes of activations that prefix reuse may hold"""
        self.compiled: dict[nn.Module, Any] | None = None
        """compiled forward functions of the parts that scoring calls; None compiles nothing"""
        self.moved: dict[str, str] = {}
        """module paths of the unpruned network -> those in this one, where a plan renumbered them"""

    # Units and their removal: given by the families

    def units(self, level: str = "depth") -> list[Unit]:
        raise NotImplementedError

    def shared(self, level: str = "depth") -> list[Shared]:
        """Parts outside the units that go when all of some units go."""
        return []

    def weights(self) -> dict[str, Tensor]:
        """The network's parameters by name."""
        return dict(self.network.named_parameters())

    def freed_weights(self, name: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """What goes with a unit, of tensors with the names and shapes of the weights: themselves, or gradients."""
        raise NotImplementedError

    def cost(self, names: Sequence[str], budget: str) -> int:
        """What a set of units frees together, where that is not a sum (channels)."""
        raise NotImplementedError

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
        """The same schedule, surroundings and options around another network."""
        made = type(self)(network.eval(), self.noise_scheduler, self.surroundings, **self.options)
        made.moved = moved or {}
        return made.to(next(self.network.parameters()).device)

    # Batches

    def calibration_inputs(self, batch: Batch, seed: int, purpose: str = "calibration") -> Batch:
        """Noised samples with noise and timestep a function of (seed, purpose, sample number), in whatever batch.

        Timesteps are stratified: sample k of n falls into the k-th of n equal parts of the schedule.
        """
        rngs = [torch_rng(seed, purpose, number) for number in batch["number"].tolist()]
        latents = self.latents(batch, [torch_rng(seed, purpose, "latent", n) for n in batch["number"].tolist()])
        noise, timesteps = [], []
        steps = self.noise_scheduler.config.num_train_timesteps
        for rng, number, count in zip(rngs, batch["number"].tolist(), batch["of"].tolist(), strict=True):
            noise.append(torch.randn(latents.shape[1:], generator=rng))
            timesteps.append(int((number + float(torch.rand((), generator=rng))) / count * steps))
        return self.noised(batch, latents, torch.stack(noise), torch.tensor(timesteps))

    def training_inputs(self, batch: Batch) -> Batch:
        """Noised samples with noise and uniform timesteps from the global CPU generator, the same on every device.

        Where there is a VAE, its posterior is drawn from the seeds that come with the samples.
        """
        seeds = batch["posterior"].tolist() if "posterior" in batch else None
        latents = self.latents(batch, seeds and [torch.Generator().manual_seed(seed) for seed in seeds])
        timesteps = torch.randint(0, self.noise_scheduler.config.num_train_timesteps, (len(latents),))
        return self.noised(batch, latents, torch.randn(latents.shape), timesteps)

    @torch.no_grad()
    def latents(self, batch: Batch, rngs: Sequence[torch.Generator] | None) -> Tensor:
        """The clean samples of a batch in the network's own space: its images, or what the VAE makes of them."""
        if "latent_mean" in batch:
            assert self.surroundings is not None
            return self.surroundings.drawn(batch["latent_mean"], batch["latent_std"], rngs)
        image = batch["image"]
        if self.surroundings is None or not self.surroundings.encodes:
            return image
        return self.surroundings.encode(image, rngs)

    def noised(self, batch: Batch, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Batch:
        """What the network takes, and its target, for clean samples, noise and places in the schedule."""
        schedule: Any = self.noise_scheduler
        noise, timesteps = noise.to(sample), timesteps.to(sample.device)
        inputs: Batch = {"conditions": self.conditions(batch, sample.device)}
        if is_flow(schedule):
            # Rectified flow (arXiv 2209.03003): x_s = (1 - s) x + s e, and the network predicts e - x.
            sigmas = schedule.sigmas.to(sample)[timesteps].view(-1, 1, 1, 1)
            noisy, target = (1 - sigmas) * sample + sigmas * noise, noise - sample
            return inputs | {"sample": noisy, "timestep": schedule.timesteps.to(sample)[timesteps], "target": target}
        kind = schedule.config.prediction_type
        if kind == "epsilon":
            target = noise
        elif kind == "v_prediction":
            target = schedule.get_velocity(sample, noise, timesteps)
        else:
            target = sample
        return inputs | {
            "sample": schedule.add_noise(sample, noise, timesteps),
            "timestep": timesteps,
            "target": target,
        }

    # Conditions

    @property
    def takes_text(self) -> bool:
        return self.surroundings is not None and self.surroundings.takes_text

    @torch.no_grad()
    def conditions(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """The network's other arguments: those a batch brings along, else what the text encoders make of captions."""
        if "conditions" in batch:
            return batch["conditions"]
        if not self.takes_text:
            return {}
        assert self.surroundings is not None
        if "text" in batch:  # stored by a precomputation
            return self.with_sizes(move(batch["text"], device), batch, device)
        if "caption" not in batch:
            raise ValueError(
                "the teacher takes text, but the data have no captions; choose data with captions "
                "(data=captioned_folder, or a `caption` column)"
            )
        return self.with_sizes(self.surroundings.text(batch["caption"], device), batch, device)

    def unconditions(self, batch: Batch, conditions: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the unconditional pass of classifier-free guidance."""
        if not self.takes_text:
            return conditions
        assert self.surroundings is not None
        device = next(self.network.parameters()).device
        return self.with_sizes(self.surroundings.empty_text(len(batch["seed"]), device), batch, device)

    def with_sizes(self, conditions: dict[str, Any], batch: Batch, device: torch.device) -> dict[str, Any]:
        """Conditions with what the network wants to know of sizes and crops; for most networks nothing."""
        return conditions

    # The network

    def arguments(self, inputs: Batch) -> dict[str, Any]:
        """The keyword arguments of the network for some inputs."""
        return {"sample": inputs["sample"], "timestep": inputs["timestep"], **inputs["conditions"]}

    def predict(self, inputs: Batch) -> Tensor:
        """The network's output for noised samples: (N,C,H,W); a predicted variance is left out."""
        output = self.network(**self.arguments(inputs), return_dict=False)[0]
        return output[:, : inputs["sample"].shape[1]]

    def predict_without_each(self, inputs: Batch, names: Sequence[str]) -> Iterator[tuple[str | None, Tensor]]:
        """Outputs with one unit removed at a time, reusing what the dense pass computed before that unit.

        Equal to `without([name])` around `predict`, bit for bit on a CPU and not compiled. The dense pass's
        activations are held meanwhile; with a `memory_bound` the batch goes through in parts that keep to it.
        """
        yield from outputs_without_each(self, inputs, names)

    def losses(self, output: Tensor, inputs: Batch) -> Tensor:
        """The task loss of each sample, (N,): mean squared error to the target (noise, velocity, flow or sample)."""
        return (output.float() - inputs["target"].float()).square().flatten(1).mean(1)

    def loss(self, inputs: Batch) -> Tensor:
        """The task loss of a batch."""
        return self.losses(self.predict(inputs), inputs).mean()

    # Generation

    def generate(self, batch: Batch, sampler: Callable[..., Any], steps: int, guidance: float = 1.0) -> Tensor:
        """Samples in the network's own space (N,C,H,W); each depends on its own seed and conditions, not on the batch.

        `sampler(noise schedule's config)` makes a diffusers scheduler. `guidance` above 1 is classifier-free guidance
        (arXiv 2207.12598), for networks that take conditions.
        """
        weight = next(self.network.parameters())
        shape, device, dtype = self.data_shape(), weight.device, weight.dtype
        seeds = [int(seed) for seed in batch["seed"]]
        sample = torch.stack([torch.randn(shape, generator=torch_rng("sample", seed)) for seed in seeds]).to(device)
        scheduler = sampler(self.noise_scheduler.config)
        scheduler.set_timesteps(steps, device=device, **self.step_options(scheduler, steps))
        options: dict[str, Any] = {}
        if "generator" in inspect.signature(scheduler.step).parameters:  # stochastic samplers: a generator an image
            options["generator"] = [torch_rng("sampler", seed) for seed in seeds]
        conditions = self.guided(self.conditions(batch, device), guidance)
        guides = guidance > 1 and bool(conditions) and not self.embeds_guidance
        empty = self.unconditions(batch, conditions) if guides else {}
        sample = sample * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
            inputs = {"sample": scaled.to(dtype), "timestep": t.expand(len(sample)), "conditions": conditions}
            output = self.predict(inputs).float()
            if guides:
                without = self.predict(inputs | {"conditions": empty}).float()
                output = without + guidance * (output - without)
            sample = scheduler.step(output, t, sample, return_dict=False, **options)[0]
        if not torch.isfinite(sample).all():
            raise FloatingPointError(f"samples are not finite after {steps} steps of {type(scheduler).__name__}")
        return sample

    embeds_guidance = False
    """does the network take the guidance scale as an argument, instead of being called twice?"""

    def guided(self, conditions: dict[str, Any], guidance: float) -> dict[str, Any]:
        """Conditions with the guidance scale, for networks that take it as an argument."""
        return conditions

    def step_options(self, scheduler: Any, steps: int) -> dict[str, Any]:
        """What a sampler wants to know beyond the number of steps: those that shift them, by how much."""
        config = scheduler.config
        if not config.get("use_dynamic_shifting"):
            return {}
        # Linear in the number of tokens between two sizes (Stable Diffusion 3, arXiv 2403.03206, section 5.3.2).
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return {"mu": config.base_shift + slope * (self.tokens() - config.base_image_seq_len)}

    def tokens(self) -> int:
        """How many tokens one sample is; of networks with patches of 2x2."""
        return math.prod(self.data_shape()[1:]) // 4

    @torch.no_grad()
    def decode(self, samples: Tensor) -> Tensor:
        """Images of generated samples: uint8 (N,H,W,C), on the CPU."""
        if self.surroundings is not None and self.surroundings.encodes:
            samples = self.surroundings.decode(samples)
        return ((samples.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    # Shapes, costs, files

    def data_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the samples the network takes."""
        size = self.options.get("sample_size") or self.network.config.sample_size
        return (self.network.config.in_channels, *((size, size) if isinstance(size, int) else tuple(size)))

    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images that go with such samples."""
        channels, height, width = self.data_shape()
        if self.surroundings is None or not self.surroundings.encodes:
            return channels, height, width
        factor = self.surroundings.factor
        return self.surroundings.image_channels, height * factor, width * factor

    def example_inputs(self, batch: int, device: torch.device | str) -> Batch:
        """Inputs of the right shape, zeros: for counting and timing."""
        return {
            "sample": torch.zeros(batch, *self.data_shape(), device=device),
            "timestep": torch.zeros(batch, dtype=torch.long, device=device),
            "conditions": move(self.example_conditions(batch), device),
        }

    def example_conditions(self, batch: int) -> dict[str, Any]:
        """Zeros for the network's other arguments."""
        return {}

    def macs(self) -> Macs:
        """Multiply-accumulates of one forward at batch 1, counted once on the meta device."""
        if self.counted is None:
            with torch.device("meta"):
                network = type(self.network).from_config(dict(self.network.config))
            twin = type(self)(network, self.noise_scheduler, None, **self.options)
            inputs = twin.example_inputs(1, "meta")
            handles = [
                module.register_forward_pre_hook(lambda *_, name=name: self.called.append(name))
                for name, module in network.named_modules()
            ]
            self.counted = count_macs(network, lambda: twin.predict(inputs))
            for handle in handles:
                handle.remove()
        return self.counted

    def forward_order(self) -> dict[str, int]:
        """{module path: place among the calls of one forward pass}."""
        self.macs()
        return {name: place for place, name in reversed(list(enumerate(self.called)))}

    def params(self) -> int:
        return sum(p.numel() for p in self.network.parameters())

    def save(self, folder: Path) -> None:
        """config.json and safetensors weights, as diffusers writes them."""
        self.network.save_pretrained(folder, safe_serialization=True)


def hidden(output: Any) -> Tensor:
    """The feature map among a module's outputs: the last tensor (joint blocks give the text stream first)."""
    return output if isinstance(output, Tensor) else [part for part in output if isinstance(part, Tensor)][-1]


def is_flow(schedule: Any) -> bool:
    """Is this the schedule of a flow-matching model?"""
    return isinstance(schedule, FlowMatchEulerDiscreteScheduler)


def copied(network: nn.Module, config: Mapping[str, Any], cls: Any) -> nn.Module:
    """A network of class `cls` with this configuration and the same state, in memory of its own."""
    with next(network.parameters()).device:
        student = cls.from_config(dict(config))
    student.load_state_dict(network.state_dict())
    return student
