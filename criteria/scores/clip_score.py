"""CLIP score: how much worse generated images fit their captions when one unit is removed (arXiv 2104.08718)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from criteria.base import Backbone, Batch, Unit
from criteria.scores.shared.clip import clip_cosines
from criteria.scores.shared.generation import Generation, check_seeds, generates
from criteria.scores.shared.leave_one_out import PerSample


class ClipScore(PerSample):
    """s_i = E[ CLIP score of the dense network's images ] - E[ CLIP score without unit i ], from the same seeds.

    The CLIP score of an image is 100 times the cosine of its embedding and its caption's. The delta CLIP score is a
    baseline that LAPTOP-Diff (arXiv 2404.11098) is said to compare with; its CLIP model, captions and count are not
    known. Ours, too: cosines below 0 are not cut off, and images that are not finite (with their whole batch) count
    as a cosine of 0. `standard_error` is that of the paired difference.

    `path`: a folder, or the id of a model of the Hugging Face hub that has been downloaded, with safetensors.
    `sampler`, `steps`, `guidance`: see criteria.scores.shared.generation.
    """

    needs = "seeds"

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

    def supports(self, backbone: Backbone) -> str | None:
        return generates(backbone) or (None if backbone.takes_text else "it takes no text to compare its images with")

    def files(self) -> list[Path]:
        """Of a local folder; a model of the hub is what its id says."""
        return sorted(Path(self.path).expanduser().glob("*.safetensors"))

    def start(self, backbone: Backbone, units: Sequence[Unit], seed: int) -> None:
        """Raises ValueError where the CLIP model is not here."""
        super().start(backbone, units, seed)
        self.clip, self.processor = load_clip(self.path)

    def update(self, batch: Batch) -> None:
        captions = list(batch["caption"])
        before_N = self.clip_score(self.generation.dense(self.backbone, batch), captions)
        for unit in self.units:
            samples = self.generation.without(self.backbone, batch, unit.name)
            after_N = torch.zeros_like(before_N) if samples is None else self.clip_score(samples, captions)
            self.add(unit.name, before_N - after_N)

    @torch.no_grad()
    def clip_score(self, samples: Tensor, captions: list[str]) -> Tensor:
        """100 times the cosines (N,) of generated samples, as images, with their captions."""
        images = self.backbone.decode(samples).cpu().numpy()
        return 100 * clip_cosines(self.clip, self.processor, images, captions, samples.device)


def load_clip(path: str) -> tuple[Any, Any]:
    """A CLIP model in eval mode and its processor; nothing is downloaded, and no pickled weights are read.

    Raises ValueError naming the command that downloads it.
    """
    from transformers import CLIPModel, CLIPProcessor  # noqa: PLC0415  slow to import

    try:
        model = CLIPModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
        return model.eval(), CLIPProcessor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"criterion.path={path!r} is neither a folder with a CLIP model in safetensors nor one that has been "
            f"downloaded; where there is a network, run `hf download {path}`"
        ) from error
