"""The other parts of a diffusion network's pipeline: VAE, text encoders and tokenizers, and how they are called."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from diffusers import ConfigMixin
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from datamodules.latents import TextTable

TEXT_FOLDER = "text"
"""Folder of stored text states, beside the parts of a pipeline"""
CACHED_BATCHES = 8
"""Batches of encoded captions that are kept: criteria come back to the same few"""
DOWNSAMPLING = 2
"""Each stage of a VAE but the last halves height and width"""


class Autoencoder(Protocol):
    """A VAE or VQModel of diffusers, as far as it is used here."""

    config: Any
    dtype: torch.dtype

    def encode(self, x: Tensor) -> Any:
        """Return an object with `latent_dist` (VAE) or `latents` (VQModel) of images (N,C,H,W) in [-1,1]."""

    def decode(self, z: Tensor) -> Any:
        """Return an object whose `sample` has the images of raw latents."""


@contextlib.contextmanager
def run_in_float32(device: torch.device) -> Iterator[None]:
    """Run frozen parts the same way for every caller: without autocast, and with results that a loss can be made of.

    Under autocast the cached states would depend on who asked first, and some VAEs overflow in half precision. Tensors
    made under inference mode could not be saved for a backward pass.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def hide_diffusers_warnings() -> Iterator[None]:
    """Let diffusers log errors only."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)


class PipelineParts:
    """The frozen parts of a diffusers pipeline around a network. It is no module, so they are never trained or saved.

    Args:
        pipeline: a DiffusionPipeline of any class, the network included; its other networks are put into eval mode.
        component: the network's name in the pipeline, such as "unet".
        table: text states of some captions, for a pipeline whose text encoder was left out.
    """

    def __init__(self, pipeline: Any, component: str, table: TextTable | None = None) -> None:
        self.pipeline, self.component, self.table = pipeline, component, table
        self.text_cache: dict[tuple[Any, ...], dict[str, Any]] = {}
        pipeline.register_to_config(_name_or_path="")  # exports must not contain the path on this machine
        for part in self.modules():
            part.eval().requires_grad_(False)
            if isinstance(part, ConfigMixin):
                part.register_to_config(_name_or_path="")

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def copy(self, memo: dict[int, Any]) -> Self:
        """Return parts that share nothing with these; `memo` is that of `copy.deepcopy`, of the whole backbone."""
        twin = copy.copy(self)
        twin.pipeline, twin.text_cache = copy.deepcopy(self.pipeline, memo), {}
        return twin

    def modules(self) -> list[nn.Module]:
        """Return the networks of the pipeline other than the denoiser."""
        return [
            part
            for name, part in self.pipeline.components.items()
            if isinstance(part, nn.Module) and name != self.component
        ]

    def absent_parts(self) -> list[str]:
        """Return the names of required parts that are None because `table` replaces them."""
        optional = type(self.pipeline)._optional_components
        return [name for name, part in self.pipeline.components.items() if part is None and name not in optional]

    def to(self, device: torch.device, parts: Sequence[nn.Module] | None = None) -> None:
        """Move some of the networks to a device; all of them where `parts` is None."""
        for part in self.modules() if parts is None else parts:
            part.to(device)

    # Images

    @property
    def vae(self) -> Any:
        """The pipeline's `Autoencoder`, which is a module; None where the network works on images."""
        return getattr(self.pipeline, "vae", None) or getattr(self.pipeline, "vqvae", None)

    @property
    def has_vae(self) -> bool:
        """Whether the network works on latents of a VAE."""
        return self.vae is not None

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along one edge of an image per latent along that edge."""
        return DOWNSAMPLING ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def image_channels(self) -> int:
        """Channels of the images that the VAE encodes."""
        return self.vae.config.in_channels

    def encode_posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (0 for a VQModel) of the raw latents of images (N,C,H,W) in [-1,1].

        Raises FloatingPointError where they are not finite.
        """
        self.to(images.device, [self.vae])
        vae: Autoencoder = self.vae
        with run_in_float32(images.device):
            encoded = vae.encode(images.to(vae.dtype))
        if hasattr(encoded, "latents"):
            mean, std = encoded.latents, torch.zeros_like(encoded.latents)
        else:
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        self.check_finite("the latents of images", mean)
        return mean, std

    def draw_latents(self, mean: Tensor, std: Tensor, rngs: Sequence[torch.Generator] | None) -> Tensor:
        """Return scaled latents drawn from the posterior, with one generator per sample or the global one."""
        shape = mean.shape
        noise = torch.stack([torch.randn(shape[1:], generator=rng) for rng in rngs]) if rngs else torch.randn(shape)
        latents = mean + std * noise.to(mean)
        shift, scale = self.shift_and_scale(latents)
        return (latents - shift) * scale

    def encode(self, images: Tensor, rngs: Sequence[torch.Generator] | None) -> Tensor:
        """Return scaled latents of images (N,C,H,W) in [-1,1], drawn as `draw_latents` does."""
        return self.draw_latents(*self.encode_posterior(images), rngs)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of scaled latents, about in [-1,1]. Raises FloatingPointError where they are not finite."""
        self.to(latents.device, [self.vae])
        vae: Autoencoder = self.vae
        shift, scale = self.shift_and_scale(latents)
        with run_in_float32(latents.device):
            images: Tensor = vae.decode((latents / scale + shift).to(vae.dtype)).sample
        self.check_finite("the images decoded from latents", images)
        return images

    def check_finite(self, description: str, values: Tensor) -> None:
        """Raise FloatingPointError where values that the VAE returned are not finite."""
        if not torch.isfinite(values).all():
            raise FloatingPointError(
                f"{description} are not finite: the pipeline's {type(self.vae).__name__} made them"
            )

    def shift_and_scale(self, latents: Tensor) -> tuple[Any, Any]:
        """Return what is subtracted from raw latents and what they are then multiplied by: numbers, or (1,C,1,1)."""
        config = self.vae.config
        shift, scale = config.get("shift_factor") or 0.0, config.scaling_factor
        if config.get("latents_mean") and config.get("latents_std"):
            mean, std = (
                torch.tensor(config[key]).view(1, -1, 1, 1).to(latents) for key in ("latents_mean", "latents_std")
            )
            return mean, scale / std
        return shift, scale

    # Text

    @property
    def takes_text(self) -> bool:
        """Whether the network is conditioned on captions."""
        return hasattr(self.pipeline, "encode_prompt")

    def encode_text(self, captions: Sequence[str], device: torch.device) -> dict[str, Any]:
        """Return the network's arguments for some captions, batch first."""
        return self.encode_captions(list(captions), device, unconditional=False)

    def encode_empty_text(self, count: int, device: torch.device) -> dict[str, Any]:
        """Return the network's arguments for `count` unconditional samples, as the stock pipeline makes them."""
        one = self.encode_captions([""], device, unconditional=True)
        return by_sample(one, lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def encode_captions(self, captions: list[str], device: torch.device, unconditional: bool) -> dict[str, Any]:
        """Return what the text encoders make of captions, or what is stored of them.

        Raises ValueError for a caption that is not stored, and for a pipeline that is not among TEXT_ENCODERS.
        """
        if self.table is not None:
            return move(self.table.find(captions), device)
        name = type(self.pipeline).__name__
        if name not in TEXT_ENCODERS:
            raise ValueError(f"how a {name} encodes text is not known; choose one of: {', '.join(TEXT_ENCODERS)}")
        key = (str(device), unconditional, *captions)
        if key not in self.text_cache:
            if len(self.text_cache) >= CACHED_BATCHES:
                self.text_cache.pop(next(iter(self.text_cache)))
            self.to(device, [part for part in self.modules() if part is not self.vae])
            with run_in_float32(device):
                self.text_cache[key] = TEXT_ENCODERS[name](self.pipeline, captions, device, unconditional)
        return self.text_cache[key]

    def describe_vocabularies(self) -> list[Any]:
        """Return what distinguishes these tokenizers and stored texts from others: JSON-able."""
        vocabularies: list[Any] = [
            [name, part.model_max_length, sorted(part.get_vocab().items())]
            for name, part in self.pipeline.components.items()
            if hasattr(part, "get_vocab")
        ]
        return vocabularies if self.table is None else [*vocabularies, self.table.digest()]

    # Files

    def save(self, network: nn.Module, folder: Path, scheduler: Any = None) -> None:
        """Write the whole pipeline, with `network` in the place of its denoiser, and the stored text states.

        `scheduler` takes the place of the pipeline's own unless it is None.
        """
        pipeline = copy.copy(self.pipeline)
        others = {} if scheduler is None else {"scheduler": scheduler}
        pipeline.register_modules(**{self.component: network}, **others)
        with hide_diffusers_warnings():  # diffusers warns about every part that is None
            pipeline.save_pretrained(folder, safe_serialization=True)
        if self.table is not None:
            self.table.save(folder / TEXT_FOLDER)


def move(value: Any, device: Any) -> Any:
    """Return a nested dictionary with its tensors on a device."""
    if isinstance(value, dict):
        return {key: move(part, device) for key, part in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def by_sample(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a nested dictionary in which `change` was applied to every entry that has one row per sample.

    Positions of text tokens (`txt_ids`) are shared by all samples and stay as they are.
    """
    if isinstance(value, dict):
        return {key: part if key == "txt_ids" else by_sample(part, change) for key, part in value.items()}
    return change(value)


# Text encoders: how each pipeline encodes prompts, as arguments of its network. Where a pipeline returns both prompts,
# the one for the unconditional pass comes second.


def encode_with_clip(pipeline: Any, captions: list[str], device: torch.device, unconditional: bool) -> dict[str, Any]:
    """Return the states of Stable Diffusion's text encoder, (N,tokens,width)."""
    states = pipeline.encode_prompt(captions, device, 1, unconditional)
    return {"encoder_hidden_states": states[unconditional]}


def encode_with_two_clips(
    pipeline: Any, captions: list[str], device: torch.device, unconditional: bool
) -> dict[str, Any]:
    """Return the states of SDXL's two text encoders, side by side, and the pooled state of the second."""
    encoded = pipeline.encode_prompt(captions, device=device, do_classifier_free_guidance=unconditional)
    states, pooled = encoded[:2], encoded[2:]
    return {
        "encoder_hidden_states": states[unconditional],
        "added_cond_kwargs": {"text_embeds": pooled[unconditional]},
    }


def encode_with_t5(pipeline: Any, captions: list[str], device: torch.device, unconditional: bool) -> dict[str, Any]:
    """Return the states of PixArt's text encoder and their attention mask, of captions in lower case.

    The pipeline's further cleaning is left out, as the pipeline itself does where bs4 is not installed.
    """
    encoded = pipeline.encode_prompt(captions, device=device, do_classifier_free_guidance=unconditional)
    states, mask = encoded[2:] if unconditional else encoded[:2]
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def encode_with_two_clips_and_t5(
    pipeline: Any, captions: list[str], device: torch.device, unconditional: bool
) -> dict[str, Any]:
    """Return the states of Stable Diffusion 3's text encoders, and the pooled states of its two CLIPs."""
    encoded = pipeline.encode_prompt(captions, None, None, device=device, do_classifier_free_guidance=unconditional)
    states, pooled = encoded[:2], encoded[2:]
    return {"encoder_hidden_states": states[unconditional], "pooled_projections": pooled[unconditional]}


def encode_with_clip_and_t5(
    pipeline: Any, captions: list[str], device: torch.device, unconditional: bool
) -> dict[str, Any]:
    """Return the states of FLUX's T5, the pooled state of its CLIP, and the positions of text tokens.

    Its guidance is an argument of the network, so there is no unconditional pass.
    """
    states, pooled, positions = pipeline.encode_prompt(captions, device=device)
    return {"encoder_hidden_states": states, "pooled_projections": pooled, "txt_ids": positions}


TEXT_ENCODERS: dict[str, Callable[[Any, list[str], torch.device, bool], dict[str, Any]]] = {
    "StableDiffusionPipeline": encode_with_clip,
    "StableDiffusionXLPipeline": encode_with_two_clips,
    "PixArtAlphaPipeline": encode_with_t5,
    "StableDiffusion3Pipeline": encode_with_two_clips_and_t5,
    "FluxPipeline": encode_with_clip_and_t5,
}
"""{class of a pipeline: the function that encodes its prompts}"""
