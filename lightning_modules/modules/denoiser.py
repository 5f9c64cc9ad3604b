"""Training of a diffusion model from random weights on the task loss. The embedded teachers were made with it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric

from lightning_modules.backbones.base import NetworkBackbone
from lightning_modules.backbones.diffusion.backbone import DiffusionBackbone
from lightning_modules.backbones.diffusion.new import build_new_backbone
from lightning_modules.backbones.diffusion.pipeline_parts import TEXT_FOLDER
from lightning_modules.backbones.diffusion.text_states import store_texts
from lightning_modules.losses.timesteps import Timesteps
from lightning_modules.modules.base import Optimizer, Schedule, TrainedModule, new_mean_metric
from lightning_modules.modules.training_inputs import draw_training_inputs


class Denoiser(TrainedModule):
    """A network trained on the mean squared error to the target of its noise schedule.

    Where it predicts the added noise, this is the loss of Ho et al. 2020 (arXiv 2006.11239), equation 14.

    Args:
        backbone: the network with its noise schedule and, if it has them, its VAE and text encoder.
        drop_text: probability that a sample's caption is replaced by the empty one (see `drop_captions`). It has no
            effect on networks that take no text.
        captions: captions whose text states are saved instead of the text encoder; None saves the encoder.
        optimizer: see TrainedModule.
        lr_scheduler: see TrainedModule.
        seed: see TrainedModule.
        dump: see TrainedModule.
        timesteps: which timesteps are drawn, and how much each counts; None is uniform.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        drop_text: float,
        captions: list[str] | None,
        optimizer: Optimizer,
        lr_scheduler: Schedule,
        seed: int,
        dump: Path,
        timesteps: Timesteps | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, dump)
        if not 0 <= drop_text <= 1:
            raise ValueError(f"pretrain.drop_text={drop_text} is out of range; choose a probability, 0 to 1")
        self.backbone, self.drop_text, self.captions = backbone.train(), drop_text, captions
        self.timesteps = timesteps or Timesteps()
        self.test_loss, self.test_images = new_mean_metric(), SumMetric()

    def networks(self) -> dict[NetworkBackbone, list[nn.Module]]:
        return {self.backbone: []}

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        inputs = draw_training_inputs(self.backbone, batch, self.timesteps, self.drop_text)
        self.network_inputs = inputs
        return {"loss": self.backbone.loss(inputs)}

    def on_test_start(self) -> None:
        self.test_loss.reset()
        self.test_images.reset()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        if batch_idx % self.trainer.world_size == self.global_rank:
            inputs = self.backbone.calibration_inputs(batch, seed=0)
            self.test_loss.update(self.backbone.loss(inputs), weight=len(inputs["sample"]))
            self.test_images.update(len(inputs["sample"]))

    def on_test_epoch_end(self) -> None:
        self.metrics = {
            "test_task_loss": float(self.test_loss.compute()),
            "test_images": int(self.test_images.compute()),
        }

    def save(self, folder: Path) -> None:
        """Write a folder for `teacher.path` in half precision: the pipeline, or the network and its noise schedule."""
        backbone = self.backbone.half()
        pipeline_parts = backbone.pipeline_parts
        if pipeline_parts is None:
            backbone.save(folder)
            backbone.noise_scheduler.save_pretrained(folder)
            return
        if self.captions is not None:
            store_texts(pipeline_parts, self.captions, folder / TEXT_FOLDER)
            pipeline_parts.pipeline.register_modules(text_encoder=None, tokenizer=None)
        for module in pipeline_parts.modules():
            module.half()
        pipeline_parts.save(backbone.network, folder)


def new_denoiser(
    network: dict[str, Any],
    noise_scheduler: Any,
    optimizer: Optimizer,
    lr_scheduler: Schedule,
    seed: int,
    dump: Path,
    vae: str | None = None,
    text_encoder: str | None = None,
    text_tokens: int = 77,
    captions: list[str] | None = None,
    drop_text: float = 0.1,
    timesteps: Timesteps | None = None,
) -> Denoiser:
    """Return a Denoiser around a network with new weights; raises ValueError for one that predicts variances.

    Args:
        network: configuration of the network; see `build_new_backbone`.
        noise_scheduler: see `build_new_backbone`.
        optimizer: see TrainedModule.
        lr_scheduler: see TrainedModule.
        seed: seed of the weights, and of training.
        dump: see TrainedModule.
        vae: see `build_new_backbone`.
        text_encoder: see `build_new_backbone`.
        text_tokens: see `build_new_backbone`.
        captions: see Denoiser.
        drop_text: see Denoiser.
        timesteps: see Denoiser.
    """
    torch.manual_seed(seed)
    backbone = build_new_backbone(network, noise_scheduler, vae, text_encoder, text_tokens)
    if backbone.predicts_variance:
        raise ValueError(
            f"pretrain.network.out_channels={network['out_channels']}: half of them would be a variance, which the "
            f"task loss does not train; choose out_channels={network['out_channels'] // 2}"
        )
    if timesteps is not None:
        timesteps.check(backbone)
    return Denoiser(backbone, drop_text, captions, optimizer, lr_scheduler, seed, dump, timesteps)
