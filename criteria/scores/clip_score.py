"""CLIP score: how much worse generated images fit their captions when one unit is removed (arXiv 2104.08718)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from criteria.base import Batch, Needs, Unit
from criteria.protocols import Generative
from criteria.scores.shared.clip import clip_cosines
from criteria.scores.shared.generation import Generation, check_seeds, explain_no_samples
from criteria.scores.shared.leave_one_out import PerSample


class ClipScore(PerSample[Generative]):
    """s_i = E[ CLIP score of the dense network's images ] - E[ CLIP score without unit i ], from the same seeds.

    The CLIP score of an image is 100 times the cosine between its embedding and its caption's. A baseline of
    LAPTOP-Diff (arXiv 2404.11098), as far as we know; its CLIP model, captions and number of images are not known.
    Ours: negative cosines are kept, and a batch with images that are not finite counts as cosines of 0.
    `standard_error` is the one of the paired difference.

    Args:
        sampler: makes the diffusers scheduler that generates.
        steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 is none.
        seeds: how many images are generated per unit.
        path: a CLIP model in safetensors: a folder, or the id of a model of the Hugging Face hub that has been
            downloaded.
    """

    needs = Needs.SEEDS

    def __init__(
        self,
        sampler: Callable[..., Any],
        steps: int,
        guidance: float = 1.0,
        seeds: int = 50,
        path: str = "openai/clip-vit-large-patch14",
    ) -> None:
        self.seeds, self.path = check_seeds(seeds), path
        self.generation = Generation(sampler, steps, guidance)

    def supports(self, backbone: Generative) -> str | None:
        """Return why a network cannot be scored, or None: networks have to generate samples, and to take captions."""
        if reason := explain_no_samples(backbone):
            return reason
        return None if backbone.takes_text else "it takes no text to compare its images with"

    def files(self) -> list[Path]:
        """Return the weight files of a local CLIP folder; a model of the hub is identified by its id."""
        return sorted(Path(self.path).expanduser().glob("*.safetensors"))

    def start(self, backbone: Generative, units: Sequence[Unit], seed: int) -> None:
        """Begin a measurement; raises ValueError where the CLIP model is not on this machine."""
        super().start(backbone, units, seed)
        self.clip, self.processor = load_clip(self.path)

    def update(self, batch: Batch) -> None:
        captions = list(batch["caption"])
        before_N = self.clip_score(self.generation.generate(self.backbone, batch), captions)
        for unit in self.units:
            samples = self.generation.generate_without(self.backbone, batch, unit.name)
            try:
                after_N = torch.zeros_like(before_N) if samples is None else self.clip_score(samples, captions)
            except FloatingPointError:  # finite latents can be too large for the VAE
                after_N = torch.zeros_like(before_N)
            self.add(unit.name, before_N - after_N)

    @torch.no_grad()
    def clip_score(self, samples: Tensor, captions: list[str]) -> Tensor:
        """Return 100 times the cosines of generated samples, as images, with their captions, (N,)."""
        images = self.backbone.decode(samples).cpu().numpy()
        return 100 * clip_cosines(self.clip, self.processor, images, captions, samples.device)


def load_clip(path: str) -> tuple[Any, Any]:
    """Return a CLIP model in eval mode and its processor; nothing is downloaded, and no pickled weights are read.

    Raises ValueError naming the command that downloads it.
    """
    from transformers import CLIPModel, CLIPProcessor  # noqa: PLC0415  slow to import

    try:
        model: Any = CLIPModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
        return model.eval(), CLIPProcessor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"criterion.path={path!r} is neither a folder with a CLIP model in safetensors nor one that has been "
            f"downloaded; where there is a network, run `hf download {path}`"
        ) from error
