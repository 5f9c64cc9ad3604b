"""Backbone of class-conditional diffusion transformers (DiT, arXiv 2212.09748)."""

from typing import Any

import torch

from criteria.base import Batch
from datamodules.seeding import torch_rng
from lightning_modules.backbones.diffusion.transformer import TransformerBackbone


class DiTBackbone(TransformerBackbone):
    """DiT (arXiv 2212.09748), conditioned on class labels.

    The first block is not removable: the output layer takes the embedding of timestep and class from its `norm1`.
    """

    LABEL_DROPOUT = 0.1
    """share of training labels that are replaced by the null class, as in the paper"""

    def required_blocks(self) -> set[str]:
        return {"transformer_blocks.0"}

    @property
    def null_class(self) -> int:
        """The label of "no class", for classifier-free guidance."""
        return self.network.config.num_embeds_ada_norm

    @property
    def class_names(self) -> dict[str, int]:  # type: ignore[override]
        """{name: label}, of the `id2label` of a DiTPipeline; several names may have one label."""
        pipeline: Any = getattr(self.pipeline_parts, "pipeline", None)
        return dict(getattr(pipeline, "labels", None) or {})

    def check_data(self, data: Any) -> None:
        data.match_classes(self.class_names, self.null_class)
        super().check_data(data)

    def conditions(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """Return the labels of a batch, or for images to generate the seed modulo the number of classes.

        Raises ValueError where the batch has no labels, or labels that the network does not know.
        """
        if "conditions" in batch:
            return batch["conditions"]
        labels = batch.get("label", None if "seed" not in batch else batch["seed"] % self.null_class)
        largest = self.null_class if "seed" in batch else self.null_class - 1  # no data are of the null class
        if labels is None or int(labels.min()) < 0 or int(labels.max()) > largest:
            raise ValueError(
                f"the teacher takes class labels from 0 to {self.null_class - 1}, and the data give "
                f"{'none' if labels is None or int(labels.min()) < 0 else int(labels.max())}; choose labelled data"
            )
        return {"class_labels": labels.to(device)}

    def empty_conditions(self, batch: Batch, conditions: dict[str, Any]) -> dict[str, Any]:
        return {"class_labels": torch.full_like(conditions["class_labels"], self.null_class)}

    def training_inputs(self, batch: Batch) -> Batch:
        inputs = super().training_inputs(batch)
        labels = inputs["conditions"]["class_labels"]
        if "draw_seed" in batch:
            rngs = [torch_rng("label", seed) for seed in batch["draw_seed"].tolist()]
            values_N = torch.cat([torch.rand(1, generator=rng) for rng in rngs])
        else:
            values_N = torch.rand(len(labels))
        dropped = (values_N < self.LABEL_DROPOUT).to(labels.device)
        return inputs | {"conditions": {"class_labels": torch.where(dropped, self.null_class, labels)}}

    def example_conditions(self, batch: int) -> dict[str, Any]:
        return {"class_labels": torch.zeros(batch, dtype=torch.long)}
