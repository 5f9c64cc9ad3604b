"""What every diffusion network shares as a backbone: batches, noise, prediction, generation."""

import inspect
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from criteria.base import Batch
from datamodules.seeding import torch_rng
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.diffusion import pruned_unet
from lightning_modules.backbones.diffusion.pipeline_parts import PipelineParts, move


class DiffusionBackbone(NetworkBackbone):
    """A network that predicts noise (or velocity, sample, flow), with the noise schedule it was trained under.

    `pipeline_parts` are the other parts of its pipeline (VAE, text encoders), frozen and outside the module tree; None
    where the network works on images and takes no conditions. Families say what their units are and what the network
    takes.
    """

    library = "diffusers"
    has_dense_twin = True
    generates = True
    stratifies_timesteps = True
    component = "unet"
    """the network's name in its pipeline"""

    def __init__(
        self, network: nn.Module, noise_scheduler: Any, pipeline_parts: PipelineParts | None = None, **options: Any
    ) -> None:
        super().__init__(network, **options)
        self.noise_scheduler, self.pipeline_parts = noise_scheduler, pipeline_parts

    def twin(self, network: nn.Module) -> Self:
        return type(self)(network, self.noise_scheduler, self.pipeline_parts, **self.options)

    # Batches

    def check_data(self, data: Any) -> None:
        """Pictures of another size, and samples without the conditions that the network takes."""
        found, wanted = data.image_shape(), self.image_shape()
        if found != wanted:
            raise ValueError(
                f"images are of (channels, height, width) {found}, but the teacher takes {wanted}; resize or convert "
                "them in the data's configuration (size, mode), or choose another teacher"
            )
        for split in ("train", "holdout"):  # one sample: its text goes through encoders on the CPU
            self.conditions(next(iter(data.subset(split, 1, 0, 1))), torch.device("cpu"))

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
            assert self.pipeline_parts is not None
            return self.pipeline_parts.draw_latents(batch["latent_mean"], batch["latent_std"], rngs)
        image = batch["image"]
        if self.pipeline_parts is None or not self.pipeline_parts.has_vae:
            return image
        return self.pipeline_parts.encode(image, rngs)

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
        return self.pipeline_parts is not None and self.pipeline_parts.takes_text

    @torch.no_grad()
    def conditions(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """The network's other arguments: those a batch brings along, else what the text encoders make of captions."""
        if "conditions" in batch:
            return batch["conditions"]
        if not self.takes_text:
            return {}
        assert self.pipeline_parts is not None
        if "text" in batch:  # stored by a precomputation
            return self.with_sizes(move(batch["text"], device), batch, device)
        if "caption" not in batch:
            raise ValueError(
                "the teacher takes text, but the data have no captions; choose data with captions "
                "(data=captioned_folder, or a `caption` column)"
            )
        return self.with_sizes(self.pipeline_parts.encode_text(batch["caption"], device), batch, device)

    def unconditions(self, batch: Batch, conditions: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the unconditional pass of classifier-free guidance."""
        if not self.takes_text:
            return conditions
        assert self.pipeline_parts is not None
        device = next(self.network.parameters()).device
        return self.with_sizes(self.pipeline_parts.encode_empty_text(len(batch["seed"]), device), batch, device)

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

    def losses(self, output: Tensor, inputs: Batch) -> Tensor:
        """The task loss of each sample, (N,): mean squared error to the target (noise, velocity, flow or sample)."""
        return (output.float() - inputs["target"].float()).square().flatten(1).mean(1)

    def distance(self, output: Tensor, reference: Tensor, inputs: Batch) -> Tensor:
        """The mean squared difference."""
        return F.mse_loss(output, reference)

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
        if self.pipeline_parts is not None and self.pipeline_parts.has_vae:
            samples = self.pipeline_parts.decode(samples)
        return ((samples.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    # Shapes, costs, files

    def data_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the samples the network takes."""
        size = self.options.get("sample_size") or self.network.config.sample_size
        return (self.network.config.in_channels, *((size, size) if isinstance(size, int) else tuple(size)))

    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images that go with such samples."""
        channels, height, width = self.data_shape()
        if self.pipeline_parts is None or not self.pipeline_parts.has_vae:
            return channels, height, width
        factor = self.pipeline_parts.pixels_per_latent
        return self.pipeline_parts.image_channels, height * factor, width * factor

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

    def meta_network(self) -> nn.Module:
        with torch.device("meta"):
            return type(self.network).from_config(dict(self.network.config))

    def save(self, folder: Path) -> None:
        self.network.save_pretrained(folder, safe_serialization=True)

    # Exports

    def save_export(self, folder: Path) -> None:
        """Write the pipeline around the network; a class that diffusers has not lies beside its weights.

        `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` opens it where only diffusers is installed.
        Without `trust_remote_code` it is refused, rather than opened as a stock network with untrained parts.
        """
        parts = self.pipeline_parts
        assert parts is not None, "a teacher is loaded with its pipeline"
        parts.to(torch.device("cpu"))
        parts.save(self.network, folder)
        if not is_stock(self.network):
            index = folder / "model_index.json"
            content = json.loads(index.read_text())
            content[self.component] = ["pruned_unet", type(self.network).__name__]
            index.write_text(json.dumps(content, indent=2) + "\n")
            shutil.copyfile(pruned_unet.__file__, folder / self.component / "pruned_unet.py")

    def reload_arguments(self) -> list[str]:
        return [self.component, str(int(not is_stock(self.network)))]

    def random_arguments(self) -> dict[str, Any]:
        rng = torch.Generator().manual_seed(0)
        inputs = self.example_inputs(2, "cpu")
        inputs["sample"] = torch.randn(inputs["sample"].shape, generator=rng)
        inputs["timestep"] = torch.tensor([10, 500])
        states = inputs["conditions"].get("encoder_hidden_states")
        if states is not None:
            inputs["conditions"]["encoder_hidden_states"] = torch.randn(states.shape, generator=rng)
        return self.arguments(inputs)

    def card_usage(self) -> str:
        parts = self.pipeline_parts
        without, captions = ([], []) if parts is None else (parts.absent_parts(), list(parts.table or ()))
        absent = "".join(f", {name}=None" for name in without)
        return f"""    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True{absent})

(`trust_remote_code` is needed where a file `pruned_unet.py` lies beside the weights.)
{stored_captions_usage(captions)}"""


def is_stock(network: nn.Module) -> bool:
    """Tell whether diffusers itself has the class of a network."""
    return type(network).__module__.startswith("diffusers.")


def stored_captions_usage(captions: Sequence[str]) -> str:
    """Return how to ask for pictures where there is no text encoder, in Markdown; "" where there are no captions."""
    if not captions:
        return ""
    rows = "\n".join(f"- {row}: {caption or '(no caption)'}" for row, caption in enumerate(captions[:20]))
    return f"""
There is no text encoder: the states of {len(captions)} captions lie in `text/`, by row.

    from safetensors.torch import load_file
    states = load_file(f"{{folder}}/text/text-00000.safetensors")["encoder_hidden_states"].float()
    pipeline(prompt_embeds=states[1:2], negative_prompt_embeds=states[:1], guidance_scale=3.0)

{rows}
"""


def is_flow(schedule: Any) -> bool:
    """Is this the schedule of a flow-matching model?"""
    return isinstance(schedule, FlowMatchEulerDiscreteScheduler)


def copied(network: nn.Module, config: Mapping[str, Any], cls: Any) -> nn.Module:
    """A network of class `cls` with this configuration and the same state, in memory of its own."""
    with next(network.parameters()).device:
        student = cls.from_config(dict(config))
    student.load_state_dict(network.state_dict())
    return student
