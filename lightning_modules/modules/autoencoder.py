"""Training of a variational autoencoder, which encodes pictures (or mel pictures) as latents of a diffusion model."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from lightning_modules.modules.base import Optimizer, Schedule, TrainedModule, sum_over_ranks


class Autoencoder(TrainedModule):
    """Mean absolute error of the reconstruction, plus `kl_weight` times the divergence per latent from N(0, 1).

    The loss of Rombach et al. 2022 (arXiv 2112.10752, appendix G) without its perceptual and adversarial terms, which
    need networks of their own, so that reconstructions are softer. The weight is ours.

    Args:
        vae: an AutoencoderKL of diffusers.
        kl_weight: weight of the divergence.
        optimizer: see TrainedModule.
        lr_scheduler: see TrainedModule.
        seed: see TrainedModule.
        dump: see TrainedModule.
    """

    def __init__(
        self,
        vae: Any,
        kl_weight: float,
        optimizer: Optimizer,
        lr_scheduler: Schedule,
        seed: int,
        dump: Path,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, dump)
        if kl_weight < 0:
            raise ValueError(f"pretrain.kl_weight={kl_weight} is out of range; choose 0 or more")
        self.vae, self.kl_weight = vae.train(), kl_weight

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        image = batch["image"]
        posterior = self.vae.encode(image).latent_dist
        noise = torch.randn(posterior.mean.shape).to(posterior.mean)  # drawn on the CPU: the same on every device
        error = F.l1_loss(self.vae.decode(posterior.mean + posterior.std * noise).sample, image)
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": error + self.kl_weight * divergence, "l1": error, "kl": divergence}

    def on_test_start(self) -> None:
        # Over samples: squared error, mean latent, mean squared latent, and their number.
        self.sums = torch.zeros(4, dtype=torch.float64)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if batch_idx % self.trainer.world_size != self.global_rank:
            return
        image = batch["image"]
        latents = self.vae.encode(image).latent_dist.mean
        error = (self.vae.decode(latents).sample.clamp(-1, 1) - image).double().square().flatten(1).mean(1)
        moments = (error.sum(), latents.double().mean((1, 2, 3)).sum(), latents.double().square().mean((1, 2, 3)).sum())
        self.sums += torch.tensor([*map(float, moments), len(image)], dtype=torch.float64)

    def on_test_epoch_end(self) -> None:
        error, mean, square, count = sum_over_ranks(self, self.sums).tolist()
        deviation = math.sqrt(square / count - (mean / count) ** 2)
        self.vae.register_to_config(scaling_factor=1 / deviation)  # latents of unit variance (arXiv 2112.10752)
        psnr = 10 * math.log10(4 / (error / count))  # values lie in [-1, 1]
        self.metrics = {"test_psnr_db": psnr, "latent_std": deviation, "test_images": int(count)}

    def save(self, folder: Path) -> None:
        """Write config.json with the scaling factor, and half-precision safetensors, as diffusers does."""
        assert hasattr(self, "metrics"), "the test loop, which measures the scaling factor, has to run before save"
        self.vae.half().save_pretrained(folder, safe_serialization=True)


def new_autoencoder(
    vae: dict[str, Any], kl_weight: float, optimizer: Optimizer, lr_scheduler: Schedule, seed: int, dump: Path
) -> Autoencoder:
    """Return an Autoencoder with new weights.

    Args:
        vae: configuration of diffusers' AutoencoderKL.
        kl_weight: see Autoencoder.
        optimizer: see TrainedModule.
        lr_scheduler: see TrainedModule.
        seed: seed of the weights, and of training.
        dump: see TrainedModule.
    """
    torch.manual_seed(seed)
    return Autoencoder(AutoencoderKL.from_config(dict(vae)), kl_weight, optimizer, lr_scheduler, seed, dump)
