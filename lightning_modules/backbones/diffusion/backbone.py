"""The base class of diffusion networks: their inputs, predictions, losses, samples and exports."""

import copy
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn

from criteria.base import Batch
from datamodules.seeding import torch_rng
from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.diffusion import pruned_unet
from lightning_modules.backbones.diffusion.pipeline_parts import PipelineParts, move
from lightning_modules.backbones.diffusion.schedule import (
    add_noise,
    check_sampler,
    make_sampler,
    takes_argument,
    takes_variance,
    training_schedule,
)


class DiffusionBackbone(NetworkBackbone):
    """A network that predicts noise (or velocity, sample, flow), with the noise schedule it was trained under.

    Subclasses define the units of a family of networks and the arguments that its forward pass takes.

    Args:
        network: the network, a model of diffusers.
        noise_scheduler: a diffusers scheduler; see `training_schedule` for the schedule that follows from it.
        pipeline_parts: the other parts of the pipeline (VAE, text encoders), frozen and outside the module tree; None
            where the network works on images and takes no conditions.
        options: options of the subclass.
    """

    library = "diffusers"
    has_dense_twin = True
    generates = True
    stratifies_timesteps = True
    component = "unet"
    """name of the network among the components of its pipeline"""

    def __init__(
        self, network: nn.Module, noise_scheduler: Any, pipeline_parts: PipelineParts | None = None, **options: Any
    ) -> None:
        super().__init__(network, **options)
        self.noise_scheduler, self.pipeline_parts = training_schedule(noise_scheduler), pipeline_parts

    def twin(self, network: nn.Module) -> Self:
        return type(self)(network, self.noise_scheduler, self.pipeline_parts, **self.options)

    def copy(self) -> Self:
        memo: dict[int, Any] = {}
        if self.pipeline_parts is not None:
            memo[id(self.pipeline_parts)] = self.pipeline_parts.copy(memo)
        return copy.deepcopy(self, memo)

    # Batches

    def check_data(self, data: Any) -> None:
        """Raise ValueError for images of another size, and for samples without the conditions the network takes."""
        shape, expected = data.image_shape(), self.image_shape()
        if shape != expected:
            raise ValueError(
                f"images are of (channels, height, width) {shape}, but the teacher takes {expected}; resize or convert "
                "them in the data's configuration (size, mode), or choose another teacher"
            )
        for split in ("train", "holdout"):  # one sample: its text goes through encoders on the CPU
            self.conditions(next(iter(data.subset(split, 1, 0, 1))), torch.device("cpu"))

    def calibration_inputs(self, batch: Batch, seed: int, purpose: str = "calibration") -> Batch:
        """Return the inputs of a batch, with noise and timestep a function of (seed, purpose, sample number) alone.

        Timesteps are stratified: sample k of n gets one from the k-th of n equal parts of the schedule.
        """
        rngs = [torch_rng(seed, purpose, number) for number in batch["number"].tolist()]
        latents = self.latents(batch, [torch_rng(seed, purpose, "latent", n) for n in batch["number"].tolist()])
        noise, timesteps = [], []
        steps = self.noise_scheduler.config.num_train_timesteps
        for rng, number, count in zip(rngs, batch["number"].tolist(), batch["of"].tolist(), strict=True):
            noise.append(torch.randn(latents.shape[1:], generator=rng))
            timesteps.append(int((number + float(torch.rand((), generator=rng))) / count * steps))
        return self.noise_batch(batch, latents, torch.stack(noise), torch.tensor(timesteps))

    def training_inputs(self, batch: Batch) -> Batch:
        """Return the inputs of a batch, with noise and uniform timesteps from the global CPU generator.

        They are the same on every device. Latents are drawn from a VAE's posterior with the seeds in the batch. A batch
        with "noise_step" (N,) gives the steps of the schedule itself. In a batch with "draw_seed" (N,), everything that
        is drawn for a sample is a function of the sample's seed there.
        """
        if "draw_seed" in batch:
            return self.inputs_of_draws(batch)
        seeds = batch["posterior"].tolist() if "posterior" in batch else None
        latents = self.latents(batch, seeds and [torch.Generator().manual_seed(seed) for seed in seeds])
        steps = self.noise_scheduler.config.num_train_timesteps
        timesteps = batch["noise_step"] if "noise_step" in batch else torch.randint(0, steps, (len(latents),))
        return self.noise_batch(batch, latents, torch.randn(latents.shape), timesteps)

    def inputs_of_draws(self, batch: Batch) -> Batch:
        """Return the inputs of a batch whose latents, timesteps and noise are functions of its "draw_seed" (N,)."""
        rngs = [torch.Generator().manual_seed(seed) for seed in batch["draw_seed"].tolist()]
        latents, steps = self.latents(batch, rngs), self.noise_scheduler.config.num_train_timesteps
        timesteps = torch.cat([torch.randint(0, steps, (1,), generator=rng) for rng in rngs])
        noise = torch.stack([torch.randn(latents.shape[1:], generator=rng) for rng in rngs])
        return self.noise_batch(batch, latents, noise, timesteps)

    @torch.no_grad()
    def latents(self, batch: Batch, rngs: Sequence[torch.Generator] | None) -> Tensor:
        """Return the clean samples of a batch, (N,C,H,W): its images, or latents where there is a VAE.

        `rngs` has one generator per sample for the VAE's posterior; None takes the global generator.
        """
        if "latent_mean" in batch:
            assert self.pipeline_parts is not None
            return self.pipeline_parts.draw_latents(batch["latent_mean"], batch["latent_std"], rngs)
        image = batch["image"]
        if self.pipeline_parts is None or not self.pipeline_parts.has_vae:
            return image
        return self.pipeline_parts.encode(image, rngs)

    def noise_batch(self, batch: Batch, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Batch:
        """Return the network's inputs and target for clean samples (N,C,H,W), noise and steps of the schedule (N,)."""
        conditions = self.conditions(batch, sample.device)
        noisy, timesteps, target = add_noise(
            self.noise_scheduler, sample, noise.to(sample), timesteps.to(sample.device)
        )
        return {"conditions": conditions, "sample": noisy, "timestep": timesteps, "target": target}

    # Conditions

    @property
    def takes_text(self) -> bool:
        """Whether the network is conditioned on captions."""
        return self.pipeline_parts is not None and self.pipeline_parts.takes_text

    @torch.no_grad()
    def conditions(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """Return the network's other arguments: those in the batch, else the encoded captions.

        Raises ValueError where the network takes text and the batch has no captions.
        """
        if "conditions" in batch:
            return batch["conditions"]
        if not self.takes_text:
            return {}
        assert self.pipeline_parts is not None
        if "text" in batch:  # stored by a precomputation
            return self.complete_conditions(move(batch["text"], device), batch, device)
        if "caption" not in batch:
            raise ValueError(
                "the teacher takes text, but the data have no captions; choose data with captions "
                "(data=captioned_folder, or a `caption` column)"
            )
        return self.complete_conditions(self.pipeline_parts.encode_text(batch["caption"], device), batch, device)

    def empty_conditions(self, batch: Batch, conditions: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the unconditional pass of classifier-free guidance."""
        if not self.takes_text:
            return conditions
        assert self.pipeline_parts is not None
        device = next(self.network.parameters()).device
        return self.complete_conditions(
            self.pipeline_parts.encode_empty_text(len(batch["seed"]), device), batch, device
        )

    def complete_conditions(self, conditions: dict[str, Any], batch: Batch, device: torch.device) -> dict[str, Any]:
        """Return the conditions with the sizes, crops or guidance scale that some networks take besides."""
        return conditions

    # The network

    def arguments(self, inputs: Batch) -> dict[str, Any]:
        """Return the keyword arguments of the network's forward pass."""
        return {"sample": inputs["sample"], "timestep": inputs["timestep"], **inputs["conditions"]}

    def predict(self, inputs: Batch) -> Tensor:
        """Return the network's output, (N,C,H,W); with a variance in the second half of the channels, (N,2C,H,W)."""
        output: Tensor = self.network(**self.arguments(inputs), return_dict=False)[0]
        return output

    def losses(self, output: Tensor, inputs: Batch) -> Tensor:
        """Return the task loss of each sample, (N,): the mean squared error to the target, times its "weight" if any.

        The target is the noise, velocity, flow or sample. A predicted variance has none: it is learned from the
        teacher alone, by `distance`.
        """
        target = inputs["target"].float()
        losses_N = (output[:, : target.shape[1]].float() - target).square().flatten(1).mean(1)
        return losses_N * inputs["weight"] if "weight" in inputs else losses_N

    def distance(self, output: Tensor, reference: Tensor, inputs: Batch) -> Tensor:
        """Return the mean squared difference; a predicted variance counts like the prediction.

        A sample's difference is multiplied by its "weight" in the inputs, if any.
        """
        if "weight" not in inputs:
            return F.mse_loss(output, reference)
        return ((output - reference).square().flatten(1).mean(1) * inputs["weight"]).mean()

    # Generation

    def generate(self, batch: Batch, sampler: Callable[..., Any], steps: int, guidance: float = 1.0) -> Tensor:
        """Return generated samples (N,C,H,W): latents where there is a VAE, else images.

        A sample depends on its own seed and conditions, not on the batch it is in. Raises FloatingPointError where
        samples are not finite.

        Args:
            batch: {"seed": (N,)}, with captions or labels where the network takes them.
            sampler: makes a diffusers scheduler from the configuration of the noise schedule.
            steps: number of sampling steps.
            guidance: scale of classifier-free guidance (arXiv 2207.12598) for networks that take conditions; 1 is none.
        """
        weight = next(self.network.parameters())
        shape, device, dtype = self.data_shape(), weight.device, weight.dtype
        seeds = [int(seed) for seed in batch["seed"]]
        sample = torch.stack([torch.randn(shape, generator=torch_rng("sample", seed)) for seed in seeds]).to(device)
        scheduler = make_sampler(sampler, self.noise_scheduler)
        scheduler.set_timesteps(steps, device=device, **self.step_options(scheduler, steps))
        options: dict[str, Any] = {}
        if takes_argument(scheduler.step, "generator"):  # stochastic samplers: one generator per image
            options["generator"] = [torch_rng("sampler", seed) for seed in seeds]
        conditions = self.with_guidance(self.conditions(batch, device), guidance)
        guides = guidance > 1 and bool(conditions) and not self.embeds_guidance
        empty = self.empty_conditions(batch, conditions) if guides else {}
        sample = sample * getattr(scheduler, "init_noise_sigma", 1.0)
        kept = 2 * shape[0] if takes_variance(scheduler) else shape[0]  # channels of the output that the sampler takes
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
            inputs = {"sample": scaled.to(dtype), "timestep": t.expand(len(sample)), "conditions": conditions}
            output = self.predict(inputs)[:, :kept].float()
            if guides:
                predicted, variance = output[:, : shape[0]], output[:, shape[0] :]
                without = self.predict(inputs | {"conditions": empty})[:, : shape[0]].float()
                output = torch.cat([without + guidance * (predicted - without), variance], dim=1)
            sample = scheduler.step(output, t, sample, return_dict=False, **options)[0]
        if not torch.isfinite(sample).all():
            raise FloatingPointError(f"samples are not finite after {steps} steps of {type(scheduler).__name__}")
        return sample

    def check_sampler(self, sampler: Callable[..., Any], steps: int) -> None:
        """Raise ValueError where a sampler, as `generate` takes it, does not fit this network or number of steps."""
        scheduler = make_sampler(sampler, self.noise_scheduler)
        check_sampler(scheduler, self.noise_scheduler, self.predicts_variance)
        scheduler.set_timesteps(steps, **self.step_options(scheduler, steps))

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network takes the guidance scale as an argument, instead of being called twice."""
        return False

    def with_guidance(self, conditions: dict[str, Any], guidance: float | Tensor) -> dict[str, Any]:
        """Return the conditions with a guidance scale, or one per sample (N,), for networks that take it."""
        return conditions

    def step_options(self, scheduler: Any, steps: int) -> dict[str, Any]:
        """Return further arguments of a sampler's `set_timesteps`: the shift, for samplers that shift steps by size."""
        config = scheduler.config
        if not config.get("use_dynamic_shifting"):
            return {}
        # Linear in the number of tokens between two sizes (Stable Diffusion 3, arXiv 2403.03206, section 5.3.2).
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return {"mu": config.base_shift + slope * (self.tokens() - config.base_image_seq_len)}

    def tokens(self) -> int:
        """Return the number of tokens of one sample, for networks with patches of 2x2."""
        return math.prod(self.data_shape()[1:]) // 4

    @torch.no_grad()
    def decode(self, samples: Tensor) -> Tensor:
        """Return the images of generated samples, uint8 (N,H,W,C), on the CPU."""
        if self.pipeline_parts is not None and self.pipeline_parts.has_vae:
            samples = self.pipeline_parts.decode(samples)
        return ((samples.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    # Shapes, costs, files

    def data_shape(self) -> tuple[int, int, int]:
        """Return (channels, height, width) of the samples the network takes.

        Raises ValueError where neither `teacher.sample_size` nor the network's configuration gives the size.
        """
        size = self.options.get("sample_size") or self.network.config.sample_size
        if size is None:
            raise ValueError(
                f"teacher.sample_size=null: the configuration of this {type(self.network).__name__} gives no size of "
                "its samples (sample_size: null); set teacher.sample_size to their height and width"
            )
        return (self.network.config.in_channels, *((size, size) if isinstance(size, int) else tuple(size)))

    def image_shape(self) -> tuple[int, int, int]:
        """Return (channels, height, width) of the images that such samples stand for."""
        channels, height, width = self.data_shape()
        if self.pipeline_parts is None or not self.pipeline_parts.has_vae:
            return channels, height, width
        factor = self.pipeline_parts.pixels_per_latent
        return self.pipeline_parts.image_channels, height * factor, width * factor

    def example_inputs(self, batch: int, device: torch.device | str) -> Batch:
        """Return inputs of the right shape, all zeros, for counting operations and timing."""
        return {
            "sample": torch.zeros(batch, *self.data_shape(), device=device),
            "timestep": torch.zeros(batch, dtype=torch.long, device=device),
            "conditions": move(self.example_conditions(batch), device),
        }

    def example_training_inputs(self, batch: int, device: torch.device | str, shape: Sequence[int] = ()) -> Batch:
        inputs = self.example_inputs(batch, device)
        return inputs | {"target": torch.zeros_like(inputs["sample"])}

    def example_conditions(self, batch: int) -> dict[str, Any]:
        """Return zeros for the network's other arguments."""
        return {}

    def meta_network(self) -> nn.Module:
        with torch.device("meta"):
            return type(self.network).from_config(dict(self.network.config))

    def save(self, folder: Path) -> None:
        self.network.save_pretrained(folder, safe_serialization=True)

    # Exports

    def save_export(self, folder: Path, sampler: Callable[..., Any] | None = None) -> None:
        """Write the pipeline with this network; beside the weights lies the code of a class that diffusers lacks.

        `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` opens it where only diffusers is installed.
        Without `trust_remote_code` diffusers refuses it, rather than opening a stock network with untrained parts.
        """
        parts = self.pipeline_parts
        assert parts is not None, "a teacher is loaded with its pipeline"
        parts.to(torch.device("cpu"))
        parts.save(self.network, folder, None if sampler is None else make_sampler(sampler, self.noise_scheduler))
        if not is_stock(self.network):
            index = folder / "model_index.json"
            content = json.loads(index.read_text())
            content[self.component] = ["pruned_unet", type(self.network).__name__]
            index.write_text(json.dumps(content, indent=2) + "\n")
            shutil.copyfile(pruned_unet.__file__, folder / self.component / "pruned_unet.py")

    def reload_arguments(self) -> list[str]:
        return [self.component, str(int(not is_stock(self.network)))]

    def random_arguments(self, samples: int = 2) -> dict[str, Any]:
        rng = torch.Generator().manual_seed(0)
        inputs = self.example_inputs(samples, "cpu")
        inputs["sample"] = torch.randn(inputs["sample"].shape, generator=rng)
        inputs["timestep"] = torch.linspace(10, 500, samples).long()
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
    """Return whether the class of a network is part of diffusers."""
    return type(network).__module__.startswith("diffusers.")


def stored_captions_usage(captions: Sequence[str]) -> str:
    """Return, in Markdown, how to generate images from stored text states; "" where no captions are stored."""
    if not captions:
        return ""
    rows = "\n".join(f"- {row}: {caption or '(no caption)'}" for row, caption in enumerate(captions[:20]))
    return f"""
There is no text encoder: the folder `text/` has the text states of {len(captions)} captions, one per row.

    from safetensors.torch import load_file
    states = load_file(f"{{folder}}/text/text-00000.safetensors")["encoder_hidden_states"].float()
    pipeline(prompt_embeds=states[1:2], negative_prompt_embeds=states[:1], guidance_scale=3.0)

{rows}
"""


def copy_network(network: nn.Module, config: Mapping[str, Any], cls: Any) -> nn.Module:
    """Return a network of class `cls` with this configuration and a copy of the weights."""
    with next(network.parameters()).device, no_init_weights():
        student = cls.from_config(dict(config))
    student.load_state_dict(network.state_dict())
    return student
