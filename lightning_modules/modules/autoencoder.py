"""Training of a variational autoencoder, which encodes images (or mel spectrograms) as latents of a diffusion model."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torchmetrics import SumMetric

from lightning_modules.modules.base import Optimizer, Schedule, TrainedModule, new_mean_metric

RANGE = 2
"""Largest minus smallest value of an image: they lie in [-1, 1]."""


class Autoencoder(TrainedModule):
    """Trains on the mean absolute error of the reconstruction plus `kl_weight` times the KL divergence per latent.

    The divergence is that of the posterior from N(0, 1). The loss is that of Rombach et al. 2022 (arXiv 2112.10752,
    appendix G) without its perceptual and adversarial terms, which need further networks; reconstructions are blurrier
    without them. The weight is ours.

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
        self.square_error, self.latent, self.latent_square = new_mean_metric(), new_mean_metric(), new_mean_metric()
        self.test_images = SumMetric()

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        image = batch["image"]
        posterior = self.vae.encode(image).latent_dist
        noise = torch.randn(posterior.mean.shape).to(posterior.mean)  # drawn on the CPU: the same on every device
        error = F.l1_loss(self.vae.decode(posterior.mean + posterior.std * noise).sample, image)
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return {"loss": error + self.kl_weight * divergence, "l1": error, "kl": divergence}

    def on_test_start(self) -> None:
        for metric in (self.square_error, self.latent, self.latent_square, self.test_images):
            metric.reset()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if batch_idx % self.trainer.world_size != self.global_rank:
            return
        image = batch["image"]
        latents = self.vae.encode(image).latent_dist.mean
        decoded = self.vae.decode(latents).sample.clamp(-1, 1)
        self.square_error.update((decoded - image).double().square().flatten(1).mean(1))
        self.latent.update(latents.double().mean((1, 2, 3)))
        self.latent_square.update(latents.double().square().mean((1, 2, 3)))
        self.test_images.update(len(image))

    def on_test_epoch_end(self) -> None:
        metrics = (self.square_error, self.latent, self.latent_square)
        square_error, mean, mean_square = (float(metric.compute()) for metric in metrics)
        deviation = math.sqrt(mean_square - mean**2)
        psnr = 10 * math.log10(RANGE**2 / square_error)
        images = int(self.test_images.compute())
        self.metrics = {"test_psnr_db": psnr, "latent_std": deviation, "test_images": images}

    def save(self, folder: Path) -> None:
        """Write config.json with the scaling factor, and weights in half precision, as diffusers does."""
        deviation = self.metrics["latent_std"]  # of the test loop
        self.vae.register_to_config(scaling_factor=1 / deviation)  # latents of unit variance (arXiv 2112.10752)
        self.vae.half().save_pretrained(folder, safe_serialization=True)


def new_autoencoder(
    vae: dict[str, Any], kl_weight: float, optimizer: Optimizer, lr_scheduler: Schedule, seed: int, dump: Path
) -> Autoencoder:
    """Return an Autoencoder with random weights.

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
