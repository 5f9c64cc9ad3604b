"""Training a diffusion model from nothing: the task loss alone. It makes the embedded teacher."""

from typing import Any

from torch import Tensor

from lightning_modules.backbones.unet import UNetBackbone
from lightning_modules.base import TrainedModule


class Denoiser(TrainedModule):
    """Mean squared error to the noise that was added (Ho et al. 2020, arXiv 2006.11239, equation 14)."""

    def __init__(self, backbone: UNetBackbone, **training: Any) -> None:
        super().__init__(**training)
        self.backbone = backbone.train()

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self.backbone.loss(self.backbone.training_inputs(batch))}
