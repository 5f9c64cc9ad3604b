"""What surrounds a denoiser in its pipeline: the VAE, the text encoders, and how they are asked."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from datamodules.latents import TextTable

TEXT_FOLDER = "text"
"""folder of stored text states beside the parts of a pipeline"""
REMEMBERED = 8
"""batches of encoded captions that are kept"""


@contextlib.contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """Run frozen parts the same way for every caller: in float32, and with results that training can be done with.

    Under autocast what is remembered would depend on who asked first, and some VAEs overflow in half precision.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings of diffusers."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)


class Surroundings:
    """A diffusers pipeline around a network: frozen, in eval mode, and not a module, so never trained or saved.

    `empty_text` is what the stock pipeline takes for its unconditional pass. `table` has the text states of some
    captions, for a pipeline whose text encoder was left out.
    """

    def __init__(self, pipeline: Any, component: str, table: TextTable | None = None) -> None:
        self.pipeline, self.component, self.table = pipeline, component, table
        self.remembered: dict[tuple[Any, ...], Any] = {}
        pipeline.register_to_config(_name_or_path="")  # where it lay here is nobody's business in an export
        for part in self.modules():
            part.eval().requires_grad_(False)
            if isinstance(part, ConfigMixin):
                part.register_to_config(_name_or_path="")

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def modules(self) -> list[nn.Module]:
        """The networks of the pipeline other than the denoiser."""
        return [
            part
            for name, part in self.pipeline.components.items()
            if isinstance(part, nn.Module) and name != self.component
        ]

    def missing(self) -> list[str]:
        """Parts that the pipeline's class wants and that are None, in the place of which there is `table`."""
        optional = type(self.pipeline)._optional_components
        return [name for name, part in self.pipeline.components.items() if part is None and name not in optional]

    def to(self, device: torch.device, parts: Sequence[nn.Module] | None = None) -> None:
        """Move some of the networks, or all."""
        for part in self.modules() if parts is None else parts:
            part.to(device)

    # Images

    @property
    def vae(self) -> Any:
        return getattr(self.pipeline, "vae", None) or getattr(self.pipeline, "vqvae", None)

    @property
    def encodes(self) -> bool:
        """Is there a VAE between images and samples?"""
        return self.vae is not None

    @property
    def factor(self) -> int:
        """Pixels a latent, along one edge."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def image_channels(self) -> int:
        return self.vae.config.in_channels

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (0 of a VQModel) of the latents of images in [-1,1], before scaling."""
        self.to(images.device, [self.vae])
        with plainly(images.device):
            found = self.vae.encode(images.to(self.vae.dtype))
        if hasattr(found, "latents"):
            mean, std = found.latents, torch.zeros_like(found.latents)
        else:
            mean, std = found.latent_dist.mean, found.latent_dist.std
        self.check_finite("the latents of images", mean, self.vae)
        return mean, std

    def drawn(self, mean: Tensor, std: Tensor, rngs: Sequence[torch.Generator] | None) -> Tensor:
        """Scaled latents: a draw of the posterior, from a generator a sample or the global one."""
        shape = mean.shape
        noise = torch.stack([torch.randn(shape[1:], generator=g) for g in rngs]) if rngs else torch.randn(shape)
        latents = mean + std * noise.to(mean)
        shift, scale = self.scaling(latents)
        return (latents - shift) * scale

    def encode(self, images: Tensor, rngs: Sequence[torch.Generator] | None) -> Tensor:
        """Scaled latents of images in [-1,1], as `drawn` makes them."""
        return self.drawn(*self.posterior(images), rngs)

    def decode(self, latents: Tensor) -> Tensor:
        """Images, about in [-1,1], of scaled latents."""
        self.to(latents.device, [self.vae])
        shift, scale = self.scaling(latents)
        with plainly(latents.device):
            images = self.vae.decode((latents / scale + shift).to(self.vae.dtype)).sample
        self.check_finite("images decoded from latents", images, self.vae)
        return images

    @staticmethod
    def check_finite(what: str, values: Tensor, part: nn.Module) -> None:
        """Raise FloatingPointError where a part of the pipeline gave values that are not finite."""
        if not torch.isfinite(values).all():
            raise FloatingPointError(f"{what} by the pipeline's {type(part).__name__} are not finite")

    def scaling(self, latents: Tensor) -> tuple[Any, Any]:
        """What is subtracted from raw latents, and what they are multiplied with."""
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
        return hasattr(self.pipeline, "encode_prompt")

    def text(self, captions: Sequence[str], device: torch.device) -> dict[str, Any]:
        """The network's arguments for some captions."""
        return self.encoded(list(captions), device, empty=False)

    def empty_text(self, count: int, device: torch.device) -> dict[str, Any]:
        """The network's arguments without a caption."""
        one = self.encoded([""], device, empty=True)
        return by_sample(one, lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def encoded(self, captions: list[str], device: torch.device, empty: bool) -> dict[str, Any]:
        """What the text encoders say. The last few batches are kept: criteria come back to the same captions."""
        if self.table is not None:
            return move(self.table.find(captions), device)
        name = type(self.pipeline).__name__
        if name not in TEXT:
            raise ValueError(f"text for a {name} is not known here; pipelines are: {', '.join(TEXT)}")
        key = (str(device), empty, *captions)
        if key not in self.remembered:
            if len(self.remembered) >= REMEMBERED:
                self.remembered.pop(next(iter(self.remembered)))
            self.to(device, [part for part in self.modules() if part is not self.vae])
            with plainly(device):
                self.remembered[key] = TEXT[name](self.pipeline, captions, device, empty)
        return self.remembered[key]

    def vocabularies(self) -> list[Any]:
        """What tells tokenizers, and stored texts, apart."""
        found: list[Any] = [
            [name, part.model_max_length, sorted(part.get_vocab().items())]
            for name, part in self.pipeline.components.items()
            if hasattr(part, "get_vocab")
        ]
        return found if self.table is None else [*found, self.table.digest()]

    # Files

    def save(self, network: nn.Module, folder: Path) -> None:
        """Write the whole pipeline around another network."""
        pipeline = copy.copy(self.pipeline)
        pipeline.register_modules(**{self.component: network})
        with quietly():  # diffusers warns of every part that is None
            pipeline.save_pretrained(folder, safe_serialization=True)
        if self.table is not None:
            self.table.save(folder / TEXT_FOLDER)


def move(value: Any, device: Any) -> Any:
    """Tensors of a nested dictionary on a device."""
    if isinstance(value, dict):
        return {key: move(part, device) for key, part in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def by_sample(value: Any, change: Callable[[Any], Any]) -> Any:
    """A nested dictionary with what has an entry a sample changed; positions of text tokens are shared by all."""
    if isinstance(value, dict):
        return {key: part if key == "txt_ids" else by_sample(part, change) for key, part in value.items()}
    return change(value)


def clip(pipeline: Any, captions: list[str], device: torch.device, empty: bool) -> dict[str, Any]:
    found = pipeline.encode_prompt(captions, device, 1, empty)
    return {"encoder_hidden_states": found[empty]}


def two_clips(pipeline: Any, captions: list[str], device: torch.device, empty: bool) -> dict[str, Any]:
    found = pipeline.encode_prompt(captions, device=device, do_classifier_free_guidance=empty)
    return {"encoder_hidden_states": found[empty], "added_cond_kwargs": {"text_embeds": found[2 + empty]}}


def t5(pipeline: Any, captions: list[str], device: torch.device, empty: bool) -> dict[str, Any]:
    """Captions in lower case; without the pipeline's further cleaning, which is left out where bs4 is not installed."""
    found = pipeline.encode_prompt(captions, device=device, do_classifier_free_guidance=empty)
    states, seen = found[2:] if empty else found[:2]
    return {"encoder_hidden_states": states, "encoder_attention_mask": seen}


def two_clips_and_t5(pipeline: Any, captions: list[str], device: torch.device, empty: bool) -> dict[str, Any]:
    found = pipeline.encode_prompt(captions, None, None, device=device, do_classifier_free_guidance=empty)
    return {"encoder_hidden_states": found[empty], "pooled_projections": found[2 + empty]}


def clip_and_t5(pipeline: Any, captions: list[str], device: torch.device, empty: bool) -> dict[str, Any]:
    """Its guidance is an argument of the network, so there is no unconditional pass."""
    text, pooled, ids = pipeline.encode_prompt(captions, device=device)
    return {"encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": ids}


TEXT: dict[str, Callable[[Any, list[str], torch.device, bool], dict[str, Any]]] = {
    "StableDiffusionPipeline": clip,
    "StableDiffusionXLPipeline": two_clips,
    "PixArtAlphaPipeline": t5,
    "StableDiffusion3Pipeline": two_clips_and_t5,
    "FluxPipeline": clip_and_t5,
}
"""How the pipelines encode prompts, as arguments of their networks."""
