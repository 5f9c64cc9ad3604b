"""The training that this project is compared with: one step of BK-SDM's recipe, without this project's modules.

BK-SDM (arXiv 2305.15798) trains with float16 autocast and gradient scaling, a float32 teacher, gradient checkpointing
of the student's blocks, AdamW, gradients clipped to norm 1, and a moving average of the weights. Its loss is the sum of
the task loss and of the mean squared errors of the output and of feature maps. With encoders, pictures and captions are
encoded in every step, as there.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""The VAE of Stable Diffusion 1.x: 8 pixels per latent."""

TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
"""The text encoder of Stable Diffusion 1.x."""


@dataclass
class Encoders:
    """A frozen VAE and text encoder with random weights, in half precision."""

    vae: Any
    text: Any
    pixels: Tensor
    """pictures of a batch, (N,3,H,W)"""
    tokens: Tensor
    """captions of a batch, (N,L)"""

    def encode(self) -> tuple[Tensor, Tensor]:
        """Return latents (N,4,H/8,W/8) and text states (N,L,C) of the batch."""
        with torch.no_grad():
            latents = self.vae.encode(self.pixels).latent_dist.sample() * self.vae.config.scaling_factor
            return latents.float(), self.text(self.tokens)[0].float()


def make_encoders(count: int, latents: int, width: int, device: torch.device, smaller: int = 1) -> Encoders:
    """Return encoders with a batch of noise as pictures and random captions.

    Args:
        count: number of samples of a batch.
        latents: height and width of the latents.
        width: width of the text states.
        device: the device.
        smaller: divisor of the widths and the number of layers, for a trial on a CPU.
    """
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    channels = tuple(c // smaller for c in VAE["block_out_channels"])
    text = TEXT | {"hidden_size": width, "num_hidden_layers": max(1, TEXT["num_hidden_layers"] // smaller)}
    heads = TEXT["num_attention_heads"] if width % TEXT["num_attention_heads"] == 0 else 1
    config = CLIPTextConfig(**text | {"num_attention_heads": heads})
    with torch.device(device):
        vae: Any = AutoencoderKL(**VAE | {"block_out_channels": channels, "norm_num_groups": 4 if smaller > 1 else 32})
        encoder: Any = CLIPTextModel(config)
    pixels = torch.randn(count, 3, 8 * latents, 8 * latents, device=device, dtype=dtype)
    tokens = torch.randint(0, config.vocab_size, (count, 77), device=device)
    return Encoders(vae.to(dtype).eval(), encoder.to(dtype).eval(), pixels, tokens)


class Recipe:
    """Trains a student as BK-SDM's recipe does; see the description of the module.

    Args:
        student: a U-Net of diffusers, in float32 on its device.
        teacher: the teacher, in float32 on the same device.
        pairs: {module path of the teacher: module path of the student} of the feature maps that are compared.
        encoders: the encoders; None trains from given latents and text states.
    """

    def __init__(self, student: Any, teacher: Any, pairs: Mapping[str, str], encoders: Encoders | None = None) -> None:
        self.student, self.teacher, self.encoders = student.train(), teacher.eval().requires_grad_(False), encoders
        self.device = next(student.parameters()).device
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        student.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, weight_decay=1e-2)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.device.type == "cuda")
        self.skipped = False
        """whether the newest step changed no weight, as a scaled gradient was not finite"""
        self.average = copy.deepcopy(student).requires_grad_(False)
        self.maps: dict[str, list[Tensor]] = {"student": [], "teacher": []}
        self.handles = [
            network.get_submodule(path).register_forward_hook(self.record(name))
            for name, network, paths in (("student", student, pairs.values()), ("teacher", teacher, pairs))
            for path in paths
        ]

    def record(self, name: str) -> Any:
        """Return a hook that appends a module's feature map to those of a network."""

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.maps[name].append(output[0] if isinstance(output, tuple) else output)

        return hook

    def step(self, latents: Tensor, text: Tensor) -> Tensor:
        """Take one optimiser step on latents (N,C,H,W) and text states (N,L,C); return the loss."""
        if self.encoders is not None:
            latents, text = self.encoders.encode()
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=self.device)
        noisy = latents + noise  # what a schedule would do, in one product less
        for maps in self.maps.values():
            maps.clear()
        with torch.autocast(self.device.type, self.dtype):
            with torch.no_grad():
                expected = self.teacher(noisy, timesteps, text, return_dict=False)[0]
            output = self.student(noisy, timesteps, text, return_dict=False)[0]
        pairs = [(output, noise), (output, expected), *zip(self.maps["student"], self.maps["teacher"], strict=True)]
        loss = torch.stack([F.mse_loss(found.float(), wanted.float()) for found, wanted in pairs]).sum()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped = self.scaler.get_scale() < scale
        self.optimizer.zero_grad()
        self.update_average()
        return loss.detach()

    @torch.no_grad()
    def update_average(self) -> None:
        """Update the moving average of the weights, one tensor after the other."""
        for average, weight in zip(self.average.parameters(), self.student.parameters(), strict=True):
            average.sub_(1e-4 * (average - weight))


@contextlib.contextmanager
def recipe(*arguments: Any) -> Iterator[Recipe]:
    """Yield a Recipe; its hooks and gradient checkpointing end with the context."""
    made = Recipe(*arguments)
    try:
        yield made
    finally:
        for handle in made.handles:
            handle.remove()
        made.student.disable_gradient_checkpointing()
