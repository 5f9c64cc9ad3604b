"""How well images fit their captions, and how well people like them: models like CLIP (arXiv 2103.00020)."""

import functools
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from criteria.scores.shared.clip import clip_cosines
from datamodules.readers.base import MissingData
from lightning_modules.metrics.published import digest_of, local_file, local_folder
from lightning_modules.metrics.text_fit import TextFit


class ClipScore(TextFit):
    """100 times the cosine of the embeddings of image and caption (arXiv 2104.08718), not clipped at 0.

    Args:
        path: a folder with a CLIP model of transformers, or the id of a downloaded model of the hub.
        processor: the same for the model's processor where it is elsewhere; None is `path`.
    """

    def __init__(self, path: str = "openai/clip-vit-large-patch14", processor: str | None = None) -> None:
        self.folder = local_folder(path)
        self.processor = self.folder if processor is None else local_folder(processor, "*processor_config.json")

    @functools.cached_property
    def weights(self) -> str:
        return digest_of(self.folder.glob("*.safetensors"))

    def fingerprint(self) -> str:
        return self.weights

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        from transformers import CLIPModel, CLIPProcessor  # noqa: PLC0415  slow to import

        model = CLIPModel.from_pretrained(self.folder, local_files_only=True, use_safetensors=True).eval()
        return model, CLIPProcessor.from_pretrained(self.processor, local_files_only=True)

    def scores(self, images: np.ndarray, captions: list[str], device: torch.device) -> Tensor:
        network, processor = self.loaded
        return self.scale(network) * clip_cosines(network, processor, images, captions, device)

    def scale(self, network: Any) -> float:
        return 100.0


class PickScore(ClipScore):
    """PickScore (arXiv 2305.01569): the cosine of a CLIP-H trained on people's preferences, times the model's scale."""

    def __init__(
        self,
        path: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ) -> None:
        super().__init__(path, processor)

    def scale(self, network: Any) -> float:
        return float(network.logit_scale.exp())


class OpenClipScore(TextFit):
    """100 times the cosine of the embeddings of image and caption by a model of open_clip.

    With ViT-g-14 it is the CLIP score of BK-SDM's protocol, and with ViT-H-14 and the checkpoint of HPSv2 it is HPSv2
    (arXiv 2306.09341); both publish the cosine itself. Needs the extra `secateur[preference]`.

    Args:
        model: a name of open_clip.
        path: its checkpoint: a file, or `owner/model/file` of a downloaded model of the hub.
    """

    def __init__(self, model: str, path: str) -> None:
        self.model, self.file = model, local_file(path)
        try:
            import open_clip  # noqa: PLC0415  an optional extra
        except ImportError as error:
            raise MissingData(f"model={model!r} needs open_clip: pip install -e '.[preference]'") from error
        if model not in open_clip.list_models():
            raise ValueError(f"model={model!r} is unknown to open_clip; it has: {', '.join(open_clip.list_models())}")

    @functools.cached_property
    def weights(self) -> str:
        return digest_of([self.file])

    def fingerprint(self) -> str:
        return self.weights

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any, Any]:
        import open_clip  # noqa: PLC0415

        network = open_clip.create_model(self.model, pretrained=str(self.file), weights_only=True).eval()
        transform = open_clip.image_transform(network.visual.image_size, is_train=False)
        return network, transform, open_clip.get_tokenizer(self.model)

    def scores(self, images: np.ndarray, captions: list[str], device: torch.device) -> Tensor:
        network, transform, tokenize = self.loaded
        pixels = torch.stack([transform(Image.fromarray(image)) for image in images]).to(device)
        network.to(device)
        image_embeds = network.encode_image(pixels, normalize=True).double()
        return 100 * (image_embeds * network.encode_text(tokenize(captions).to(device), normalize=True).double()).sum(1)
