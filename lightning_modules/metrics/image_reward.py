"""ImageReward (arXiv 2304.05977): a linear head on a BLIP (arXiv 2201.12086) that reads an image and its caption."""

import functools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import normalize, to_tensor

from lightning_modules.metrics.features import resized
from lightning_modules.metrics.published import digest_of, local_file, local_folder
from lightning_modules.metrics.text_fit import TextFit

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072
"""Of the rewards of the authors' images; rewards are normalised with them."""
TOKENS = 35
"""Length to which captions are padded and truncated."""

RENAMED = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks.": "encoder.layers.",
    "attn.": "self_attn.",
    "self_attn.proj": "self_attn.projection",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
}
"""{name in BLIP's image encoder: name in transformers}; the names of the text encoder are the same."""


class ImageReward(TextFit):
    """The reward of an image and its caption, normalised as published: about 0 on average, higher is better.

    `path`: the published ImageReward.pt, as a file or as `owner/model/file` of the hub; `tokenizer`: that of BERT, a
    folder or the id of a downloaded model of the hub.
    """

    def __init__(self, path: str = "THUDM/ImageReward/ImageReward.pt", tokenizer: str = "bert-base-uncased") -> None:
        self.file, self.tokenizer = local_file(path), local_folder(tokenizer, "vocab.txt")

    @functools.cached_property
    def weights(self) -> str:
        return digest_of([self.file])

    def fingerprint(self) -> str:
        return self.weights

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any, list[tuple[Tensor, Tensor]], Any]:
        """The image encoder, the text encoder, the layers of the head (without activations), and the tokenizer."""
        from transformers import BertTokenizer  # noqa: PLC0415  slow to import

        state = torch.load(self.file, map_location="cpu", weights_only=True)
        vision, text = (
            {name.removeprefix(part): tensor for name, tensor in state.items() if name.startswith(part)}
            for part in ("blip.visual_encoder.", "blip.text_encoder.")
        )
        numbers = sorted({int(name.split(".")[2]) for name in state if name.startswith("mlp.layers.")})
        head = [(state[f"mlp.layers.{n}.weight"], state[f"mlp.layers.{n}.bias"]) for n in numbers]
        return *encoders(vision, text), head, BertTokenizer.from_pretrained(self.tokenizer, local_files_only=True)

    def scores(self, images: np.ndarray, captions: list[str], device: torch.device) -> Tensor:
        vision, text, head, tokenizer = self.loaded
        pixels = [to_tensor(Image.fromarray(image)) for image in resized(images, vision.config.image_size)]
        states = vision.to(device)(normalize(torch.stack(pixels), MEAN, STD).to(device)).last_hidden_state
        words = tokenizer(captions, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        reward = text.to(device)(
            words.input_ids.to(device),
            attention_mask=words.attention_mask.to(device),
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=device),
        ).last_hidden_state[:, 0]
        for weight, bias in head:
            reward = F.linear(reward, weight.to(device), bias.to(device))
        return (reward.squeeze(1) - REWARD_MEAN) / REWARD_STD


def encoders(vision: dict[str, Tensor], text: dict[str, Tensor]) -> tuple[Any, Any]:
    """Return BLIP's image and text encoders in transformers; sizes follow from the weights, with heads of 64."""
    from transformers import BlipTextConfig, BlipVisionConfig  # noqa: PLC0415  slow to import
    from transformers.models.blip.modeling_blip import BlipVisionModel  # noqa: PLC0415
    from transformers.models.blip.modeling_blip_text import BlipTextModel  # noqa: PLC0415

    _, positions, width = vision["pos_embed"].shape
    patch = vision["patch_embed.proj.weight"].shape[-1]
    image_encoder = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=vision["blocks.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=depth(vision, "blocks."),
            num_attention_heads=width // 64,
            image_size=math.isqrt(positions - 1) * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
    )
    renamed = {}
    for name, tensor in vision.items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        renamed[f"post_layernorm{name[4:]}" if name.startswith("norm.") else name] = tensor
    image_encoder.load_state_dict(renamed)
    vocabulary, hidden = text["embeddings.word_embeddings.weight"].shape
    text_encoder = BlipTextModel(
        BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            encoder_hidden_size=width,
            intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=depth(text, "encoder.layer."),
            num_attention_heads=hidden // 64,
            max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0],
        ),
        add_pooling_layer=False,
    )
    text.pop("embeddings.position_ids", None)  # a buffer: 0, 1, 2, ...
    text_encoder.load_state_dict(text)
    return image_encoder.eval(), text_encoder.eval()


def depth(state: dict[str, Tensor], prefix: str) -> int:
    """Return the number of layers whose names are `prefix` and a number."""
    return 1 + max(int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix))
